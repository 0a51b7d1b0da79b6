//! `hull attach-container`: a further container in a running pod.

use hull_pod::client::Client;
use hull_pod::manifest::RestartPolicy;
use hull_pod::state::Liveness;
use hull_pod::supervisor::api::Join;
use k8s_openapi::api::core::v1::{Capabilities, Container, EnvVar, SecurityContext, VolumeMount};

use crate::Host;
use crate::failure::{Failure, exit};
use crate::pods;
use crate::session::{HULL_FAILED, attend, parse_env, refused};
use crate::terminal;

/// Add a container to a running pod
///
/// It joins the pod's network, hostname and IPC, as docker's --network container:NAME has it, and is a
/// member like those of the manifest: in ps, logs, exec, kill, events and inspect, and stopped with the
/// pod. Its own end ends neither the pod nor counts for its result. In the foreground it ends with this
/// command: a client that is killed takes it along.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The image, as a manifest names it
    #[arg(long)]
    image: String,
    /// The container's name [default: attached-N]
    #[arg(long)]
    name: Option<String>,
    /// Pass standard input on
    #[arg(short = 'i', long)]
    stdin: bool,
    /// Give the container a terminal
    #[arg(short = 't', long)]
    tty: bool,
    /// Return when the container has been started, and print its name
    #[arg(short, long, conflicts_with_all = ["stdin", "tty"])]
    detach: bool,
    /// Remove the container, with its log, when it has ended. Else that is done with the pod
    #[arg(long)]
    rm: bool,
    /// When to start it again: Always, OnFailure or Never
    #[arg(
        long,
        value_name = "POLICY",
        default_value = "Never",
        value_parser = parse_policy,
        requires_ifs = [("Always", "detach"), ("OnFailure", "detach")]
    )]
    restart: RestartPolicy,
    /// Set an environment variable
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = parse_env)]
    env: Vec<String>,
    /// Mount a volume that the pod has: VOLUME:PATH[:ro]
    #[arg(short, long, value_name = "VOLUME", value_parser = parse_volume)]
    volume: Vec<VolumeMount>,
    /// The directory to start in [default: the image's]
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// The user, in place of the pod's and the image's: uid, uid:gid, name or name:group
    #[arg(short, long)]
    user: Option<String>,
    /// Give a capability that containers don't have otherwise: NET_ADMIN, or ALL
    #[arg(long, value_name = "CAPABILITY")]
    cap_add: Vec<String>,
    /// Take a capability away that containers have otherwise: NET_RAW, or ALL
    #[arg(long, value_name = "CAPABILITY")]
    cap_drop: Vec<String>,
    /// The command replaces the image's entrypoint, too, not only its arguments
    #[arg(long, requires = "args")]
    command: bool,
    /// Name or id
    pod: String,
    /// The command and its arguments [default: the image's]
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "COMMAND"
    )]
    args: Vec<String>,
}

fn parse_policy(text: &str) -> Result<RestartPolicy, String> {
    match text {
        "Always" => Ok(RestartPolicy::Always),
        "OnFailure" => Ok(RestartPolicy::OnFailure),
        "Never" => Ok(RestartPolicy::Never),
        _ => Err("not Always, OnFailure or Never".to_owned()),
    }
}

fn parse_volume(text: &str) -> Result<VolumeMount, String> {
    let (name, path) = text
        .split_once(':')
        .ok_or("not VOLUME:PATH, VOLUME a name of the manifest's spec.volumes")?;
    let (path, read_only) = match path.strip_suffix(":ro") {
        Some(path) => (path, true),
        None => (path.strip_suffix(":rw").unwrap_or(path), false),
    };
    if !path.starts_with('/') {
        return Err(format!("{path:?} is not an absolute path"));
    }
    Ok(VolumeMount {
        name: name.to_owned(),
        mount_path: path.to_owned(),
        read_only: read_only.then_some(true),
        ..VolumeMount::default()
    })
}

pub fn run(host: &Host, args: Args) -> Result<(), Failure> {
    let code = attach(host, args).map_err(|failure| failure.with_code(HULL_FAILED))?;
    exit(code)
}

fn attach(host: &Host, args: Args) -> Result<i32, Failure> {
    let record = host.registry()?.find(&args.pod)?;
    if record.liveness == Liveness::Dead || record.status.phase.ended() {
        return Err(Failure::Failed(format!(
            "pod {} is not running; run it again first: hull run FILE",
            record.status.name
        )));
    }
    let tty = args.tty;
    let join = join(args);
    let runtime = pods::runtime()?;
    let code = runtime.block_on(async {
        let (name, session) = Client::connect(&record.dir)?
            .join(join)
            .await
            .map_err(|error| refused(error, ""))?;
        match session {
            Some(session) => attend(session, tty, host.limits()).await,
            None => {
                println!("{name}");
                Ok(0)
            }
        }
    });
    // The thread that reads our standard input may wait for ever.
    runtime.shutdown_background();
    code
}

fn join(args: Args) -> Join {
    let (ids, user) = match args.user {
        Some(text) => match ids(&text) {
            Some(ids) => (Some(ids), None),
            None => (None, Some(text)),
        },
        None => (None, None),
    };
    let words = args.args.iter().map(|text| escape(text)).collect();
    let listed = |list: Vec<String>| (!list.is_empty()).then_some(list);
    let (command, arguments) = if args.command {
        (Some(words), None)
    } else {
        (None, listed(words))
    };
    let container = Container {
        name: args.name.unwrap_or_default(),
        image: Some(args.image),
        command,
        args: arguments,
        env: Some(args.env.iter().map(|text| variable(text)).collect()),
        working_dir: args.workdir,
        stdin: Some(args.stdin),
        stdin_once: Some(args.stdin),
        tty: Some(args.tty),
        volume_mounts: Some(args.volume),
        security_context: Some(SecurityContext {
            run_as_user: ids.map(|(user, _)| user),
            run_as_group: ids.and_then(|(_, group)| group),
            capabilities: Some(Capabilities {
                add: listed(args.cap_add),
                drop: listed(args.cap_drop),
            }),
            ..SecurityContext::default()
        }),
        ..Container::default()
    };
    Join {
        container,
        user,
        restart: args.restart,
        remove: args.rm,
        attach: !args.detach,
        size: args.tty.then(terminal::size_or_default),
    }
}

/// A user and perhaps a group by number, which the pod's rules for them can be held against.
fn ids(text: &str) -> Option<(i64, Option<i64>)> {
    let number = |text: &str| text.parse::<u32>().ok().map(i64::from);
    match text.split_once(':') {
        Some((user, group)) => Some((number(user)?, Some(number(group)?))),
        None => Some((number(text)?, None)),
    }
}

fn variable(text: &str) -> EnvVar {
    let (name, value) = text.split_once('=').unwrap_or((text, ""));
    EnvVar {
        name: name.to_owned(),
        value: Some(escape(value)),
        value_from: None,
    }
}

/// Nothing is to be put in place of `$(NAME)`.
fn escape(text: &str) -> String {
    text.replace('$', "$$")
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn parse(words: &[&str]) -> Result<Join, clap::Error> {
        let line = ["hull", "web", "--image", "busybox"].iter().chain(words);
        Line::try_parse_from(line).map(|line| join(line.args))
    }

    #[test]
    fn a_line_becomes_a_container() {
        let line = [
            "-d",
            "--name",
            "x",
            "-e",
            "A=b$(C)",
            "-v",
            "data:/d:ro",
            "-u",
            "1:2",
            "-w",
            "/tmp",
            "--cap-add",
            "NET_ADMIN",
            "--restart",
            "OnFailure",
            "--",
            "echo",
            "$$",
        ];

        let join = parse(&line).unwrap();

        let container = join.container;
        assert_eq!((container.name.as_str(), join.attach), ("x", false));
        assert_eq!(container.args.unwrap(), ["echo", "$$$$"]);
        assert_eq!(container.env.unwrap()[0].value.as_deref(), Some("b$$(C)"));
        let wanted = VolumeMount {
            name: "data".into(),
            mount_path: "/d".into(),
            read_only: Some(true),
            ..VolumeMount::default()
        };
        assert_eq!(container.volume_mounts.unwrap(), [wanted]);
        let context = container.security_context.unwrap();
        assert_eq!(
            (context.run_as_user, context.run_as_group, join.user),
            (Some(1), Some(2), None)
        );
        assert_eq!(context.capabilities.unwrap().add.unwrap(), ["NET_ADMIN"]);
        assert_eq!(join.restart, RestartPolicy::OnFailure);
    }

    #[test]
    fn a_user_by_name_is_the_images() {
        assert_eq!(
            parse(&["-u", "nobody"]).unwrap().user.as_deref(),
            Some("nobody")
        );
        assert_eq!(
            parse(&["-u", "1:wheel"]).unwrap().user.as_deref(),
            Some("1:wheel")
        );
    }

    #[test]
    fn what_does_not_go_together_is_refused() {
        for words in [
            ["-d", "-i"].as_slice(),
            &["--restart", "Always"],
            &["--restart", "Sometimes"],
            &["-v", "data"],
            &["-v", "data:x"],
            &["-e", "A"],
            &["--command"],
        ] {
            assert!(parse(words).is_err(), "{words:?}");
        }
        assert!(
            parse(&["--command", "--", "sh"])
                .unwrap()
                .container
                .args
                .is_none()
        );
    }
}
