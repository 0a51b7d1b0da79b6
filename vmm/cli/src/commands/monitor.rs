//! `hull monitor`: the metrics of all pods of this host, for Prometheus.

mod exposition;
mod http;
mod node;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};

use crate::Host;
use crate::failure::Failure;
use crate::output::print_text;
use crate::pods;
use exposition::exposition;
use node::Node;

/// Serve the metrics of all pods of this host, for Prometheus
///
/// Asks each pod when it is asked itself: those of `hull run` and those of containerd alike. Answers
/// GET /metrics over HTTP in Prometheus' text format. One for a host is enough.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where to listen: an address of this host, or unix:PATH
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9465")]
    listen: Place,
    /// So many seconds a pod may take to answer; then it counts as down (1 to 60)
    #[arg(long, value_name = "SECONDS", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=60))]
    timeout: u64,
    /// Print the metrics once, and listen nowhere
    #[arg(long, conflicts_with = "listen")]
    once: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Address(SocketAddr),
    Unix(PathBuf),
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("unix:") {
            Some(path) if !path.is_empty() => Ok(Self::Unix(path.into())),
            Some(_) => Err("unix: needs a path".into()),
            None => text
                .parse()
                .map(Self::Address)
                .map_err(|_| format!("{text:?} must be IP:PORT or unix:PATH")),
        }
    }
}

pub fn run(host: &Host, args: Args) -> Result<(), Failure> {
    let mut node = Node::new(host.registry()?, Duration::from_secs(args.timeout));
    pods::runtime()?.block_on(async {
        if args.once {
            let seen = node.look().await;
            return print_text(&exposition(seen)?);
        }
        let mut ended = [SignalKind::terminate(), SignalKind::interrupt()].map(signal);
        let [terminate, interrupt] = &mut ended;
        let watching = |error: &mut std::io::Error| {
            Failure::io("watching signals", std::io::Error::from(error.kind()))
        };
        let terminate = terminate.as_mut().map_err(watching)?;
        let interrupt = interrupt.as_mut().map_err(watching)?;
        tokio::select! {
            served = http::serve(&args.listen, node) => served,
            _ = terminate.recv() => Ok(()),
            _ = interrupt.recv() => Ok(()),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_listens_at_an_address_or_a_path() {
        assert_eq!(
            "127.0.0.1:9465".parse(),
            Ok(Place::Address(([127, 0, 0, 1], 9465).into()))
        );
        assert_eq!("unix:/run/x".parse(), Ok(Place::Unix("/run/x".into())));
        for wrong in ["9465", "unix:", "localhost:1", ""] {
            assert!(wrong.parse::<Place>().is_err(), "{wrong}");
        }
    }
}
