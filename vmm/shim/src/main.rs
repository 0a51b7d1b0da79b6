//! containerd's task API over a pod: the runtime `io.containerd.hull.v2`.
//!
//! containerd runs this program for each container, with `start` and `delete`. The first container of a pod makes
//! `start` run it once more, as the shim: a pod's supervisor that containerd asks over ttrpc.

mod arguments;
mod bundle;
mod cgroup;
mod delete;
mod events;
mod failure;
mod forward;
mod hooks;
mod host;
mod logger;
mod machine;
mod managed;
mod metrics;
mod mounts;
mod options;
mod pids;
mod pod;
mod serve;
mod service;
mod spec;
mod start;
mod steer;
mod streams;
mod tasks;
mod templates;
mod usage;

use std::error::Error;
use std::io::Write;
use std::process::ExitCode;

use arguments::Action;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use hull_pod::text::chain;

const RUNTIME: &str = "io.containerd.hull.v2";

fn main() -> ExitCode {
    let parsed = arguments::parse(std::env::args_os().skip(1));
    let (action, arguments) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => return fail(&error),
    };
    let printed = match action {
        Action::Start => start::start(&arguments).map_err(Box::<dyn Error>::from),
        Action::Delete => delete::delete(&arguments).map_err(Box::<dyn Error>::from),
        Action::Serve => return serve(&arguments),
        Action::MakeTemplate => templates::make()
            .map(|()| Vec::new())
            .map_err(Box::<dyn Error>::from),
        Action::Version => {
            Ok(format!("containerd-shim-hull-v2 {}\n", env!("CARGO_PKG_VERSION")).into_bytes())
        }
        Action::Info => info(),
    };
    let printed = printed.and_then(|bytes| {
        let mut stdout = std::io::stdout();
        stdout.write_all(&bytes)?;
        Ok(stdout.flush()?)
    });
    match printed {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(error.as_ref()),
    }
}

/// What it says before it serves is for `start`, and comes by standard output.
fn serve(arguments: &arguments::Arguments) -> ExitCode {
    match serve::serve(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = chain(&error), "the shim ends");
            // Nobody may read it.
            let _ = writeln!(std::io::stdout(), "{}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn info() -> Result<Vec<u8>, Box<dyn Error>> {
    let info = RuntimeInfo {
        name: RUNTIME.into(),
        version: Some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    Ok(info.write_to_bytes()?)
}

/// containerd shows all that is printed by a start that fails.
fn fail(error: &dyn Error) -> ExitCode {
    // There is nobody else to tell.
    let _ = writeln!(std::io::stderr(), "{}", chain(error));
    ExitCode::FAILURE
}
