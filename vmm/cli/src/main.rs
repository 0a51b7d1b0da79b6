//! `hull`: pods in virtual machines, from the command line.

mod commands;
mod failure;
mod interrupts;
mod output;
mod pods;
mod printer;
mod progress;
mod session;
mod terminal;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use hull_pod::configuration::Configuration;
use hull_pod::networks;
use hull_pod::state::{Directories, Registry};
use hull_pod::supervisor::{Limits, MAKE_TEMPLATE};
use hull_pod::timeline::now_micros;

use crate::commands::supervise::Order;
use crate::failure::Failure;

const EXIT_CODES: &str = "\
Exit codes:
  0    done; for `run`: every container returned 0
  1    it failed
  2    bad input: the command line, the manifest or what it names; nothing was started
  125  exec, attach-container: hull itself failed
  126  exec, attach-container: the program can't be executed
  127  exec, attach-container: there is no such program
  130  run, snapshot: interrupted by Ctrl-C
  `run` returns the code of the container that failed first, `exec` and `attach-container`
  that of their process (128 + N when signal N ended it).";

/// Pods in virtual machines
#[derive(Debug, Parser)]
#[command(name = "hull", version, after_help = EXIT_CODES, propagate_version = true)]
struct Cli {
    /// State of running pods
    #[arg(
        long,
        global = true,
        env = "HULL_RUN_DIR",
        default_value = "/run/hull",
        value_name = "DIR",
        hide_env_values = true
    )]
    run_dir: PathBuf,
    /// Images, logs and what pods keep on disk
    #[arg(
        long,
        global = true,
        env = "HULL_DATA_DIR",
        default_value = "/var/lib/hull",
        value_name = "DIR",
        hide_env_values = true
    )]
    data_dir: PathBuf,
    /// Settings for the pods that are started; /etc/hull/config.toml, if there is one
    #[arg(
        long,
        global = true,
        env = "HULL_CONFIG",
        value_name = "FILE",
        hide_env_values = true
    )]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(commands::run::Args),
    Ps(commands::ps::Args),
    Logs(commands::logs::Args),
    Exec(commands::exec::Args),
    AttachContainer(commands::attach_container::Args),
    Kill(commands::kill::Args),
    Pause(commands::pause::PauseArgs),
    Resume(commands::pause::ResumeArgs),
    Snapshot(commands::snapshot::SnapshotArgs),
    Restore(commands::snapshot::RestoreArgs),
    Stop(commands::stop::Args),
    Rm(commands::rm::Args),
    Inspect(commands::inspect::Args),
    Wait(commands::wait::Args),
    Events(commands::events::Args),
    Timeline(commands::timeline::Args),
    Load(commands::load::Args),
    Images(commands::images::Args),
    Rmi(commands::rmi::Args),
    Network(commands::network::Args),
    Template(commands::template::Args),
    PortForward(commands::port_forward::Args),
    Monitor(commands::monitor::Args),
    Check(commands::check::Args),
    Gc(commands::gc::Args),
    Completion(commands::completion::Args),
    #[command(hide = true, name = MAKE_TEMPLATE)]
    MakeTemplate,
}

/// What every command works with.
#[derive(Debug, Clone)]
struct Host {
    directories: Directories,
    /// None: the default one.
    configuration: Option<PathBuf>,
    /// When the command began, on [`now_micros`].
    began: u64,
}

impl Host {
    /// For the pods that are started.
    fn configuration(&self) -> Result<Configuration, Failure> {
        Ok(Configuration::load(self.configuration.as_deref())?)
    }

    /// A configuration that is broken keeps nobody from stopping a pod.
    fn limits(&self) -> Limits {
        Limits::of(&self.configuration().unwrap_or_default())
    }

    /// The pods of this host; makes the directories that are missing.
    fn registry(&self) -> Result<Registry, Failure> {
        Ok(Registry::open(
            self.directories.clone(),
            |directories, pod| {
                let configuration = Configuration::load(None).unwrap_or_default();
                let limit = Limits::of(&configuration).call;
                Ok(networks::release(directories, pod, limit)?)
            },
        )?)
    }
}

fn main() -> ExitCode {
    let began = now_micros();
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    if let Some(order) = Order::read(&arguments) {
        return ended(order.run());
    }
    let cli = Cli::parse();
    let host = Host {
        directories: Directories::new(absolute(cli.run_dir), absolute(cli.data_dir)),
        configuration: cli.config.map(absolute),
        began,
    };
    ended(match cli.command {
        Command::Run(args) => commands::run::run(&host, args),
        Command::Ps(args) => commands::ps::run(&host, &args),
        Command::Logs(args) => commands::logs::run(&host, args),
        Command::Exec(args) => commands::exec::run(&host, args),
        Command::AttachContainer(args) => commands::attach_container::run(&host, args),
        Command::Kill(args) => commands::kill::run(&host, args),
        Command::Pause(args) => commands::pause::pause(&host, &args),
        Command::Resume(args) => commands::pause::resume(&host, &args),
        Command::Snapshot(args) => commands::snapshot::snapshot(&host, &args),
        Command::Restore(args) => commands::snapshot::restore(&host, args),
        Command::Stop(args) => commands::stop::run(&host, &args),
        Command::Rm(args) => commands::rm::run(&host, &args),
        Command::Inspect(args) => commands::inspect::run(&host, &args),
        Command::Wait(args) => commands::wait::run(&host, &args),
        Command::Events(args) => commands::events::run(&host, &args),
        Command::Timeline(args) => commands::timeline::run(&host, &args),
        Command::Load(args) => commands::load::run(&host, &args),
        Command::Images(args) => commands::images::run(&host, &args),
        Command::Rmi(args) => commands::rmi::run(&host, &args),
        Command::Network(args) => commands::network::run(&host, args),
        Command::Template(args) => commands::template::run(&host, args),
        Command::PortForward(args) => commands::port_forward::run(&host, &args),
        Command::Monitor(args) => commands::monitor::run(&host, args),
        Command::Check(args) => commands::check::run(&host, &args),
        Command::Gc(args) => commands::gc::run(&host, &args),
        Command::Completion(args) => commands::completion::run(&args),
        Command::MakeTemplate => commands::template::make(),
    })
}

fn ended(done: Result<(), Failure>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

/// The supervisor works in another directory than its starter.
fn absolute(path: PathBuf) -> PathBuf {
    std::path::absolute(&path).unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn exec_takes_its_command_after_a_double_dash_or_without() {
        for line in [
            ["hull", "exec", "-it", "web", "-c", "one", "--", "sh", "-c"].as_slice(),
            ["hull", "exec", "-it", "web", "-c", "one", "sh", "-c"].as_slice(),
        ] {
            let Command::Exec(args) = Cli::try_parse_from(line).unwrap().command else {
                panic!("not exec");
            };
            assert_eq!(args.command, ["sh", "-c"]);
            assert_eq!(args.container.as_deref(), Some("one"));
        }
    }
}
