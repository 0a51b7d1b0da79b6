//! `hull exec`: a further process in a container, with our standard streams.

use hull_pod::client::Client;
use hull_pod::state::Liveness;
use hull_pod::supervisor::api::Exec;

use crate::Host;
use crate::failure::{Failure, exit};
use crate::pods;
use crate::session::{HULL_FAILED, attend, parse_env, refused};
use crate::terminal;

/// Run a command in a running container. It ends with this one: a client that is killed takes it along
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Pass standard input on
    #[arg(short = 'i', long)]
    stdin: bool,
    /// Give the command a terminal
    #[arg(short = 't', long)]
    tty: bool,
    /// The container [default: the first]
    #[arg(short, long, value_name = "NAME")]
    pub container: Option<String>,
    /// Set an environment variable
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = parse_env)]
    env: Vec<String>,
    /// Another directory than the container's
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// Another user than the container's: uid, uid:gid, name or name:group
    #[arg(short, long)]
    user: Option<String>,
    /// Name or id
    pod: String,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

pub fn run(host: &Host, args: Args) -> Result<(), Failure> {
    let code = session(host, args).map_err(|failure| failure.with_code(HULL_FAILED))?;
    exit(code)
}

fn session(host: &Host, args: Args) -> Result<i32, Failure> {
    let record = host.registry()?.find(&args.pod)?;
    if record.liveness == Liveness::Dead {
        return Err(Failure::Failed(format!(
            "pod {} is not running",
            record.status.name
        )));
    }
    let container = pods::container(&record.status, args.container.as_deref())?;
    let exec = Exec {
        container: container.name.clone(),
        args: args.command,
        env: args.env,
        cwd: args.workdir,
        user: args.user,
        stdin: args.stdin,
        tty: args.tty.then(terminal::size_or_default),
    };
    let tty = args.tty;
    let program = exec.args.first().cloned().unwrap_or_default();
    let runtime = pods::runtime()?;
    let code = runtime.block_on(async {
        let session = Client::connect(&record.dir)?
            .exec(exec)
            .await
            .map_err(|error| refused(error, &format!("running {program:?}: ")))?;
        attend(session, tty, host.limits()).await
    });
    // The thread that reads our standard input may wait for ever.
    runtime.shutdown_background();
    code
}
