//! `hull logs`: what containers have printed.

use std::io;

use hull_pod::logs::{self, Follow, LogLine, LogOptions, Since};
use hull_pod::state::PodRecord;
use indicatif::ProgressBar;
use jiff::{SignedDuration, Timestamp};

use crate::Host;
use crate::failure::Failure;
use crate::pods;
use crate::printer::{Printer, Style};

/// Show what a container has printed
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name or id
    pod: String,
    /// The container [default: the first]
    #[arg(conflicts_with_all = ["container", "all_containers"], value_name = "CONTAINER")]
    container_name: Option<String>,
    /// The container [default: the first]
    #[arg(short, long, value_name = "NAME")]
    container: Option<String>,
    /// Every container, each line behind its name
    #[arg(long, conflicts_with = "container")]
    all_containers: bool,
    /// Wait for more, until the container has ended for good
    #[arg(short, long, conflicts_with = "previous")]
    follow: bool,
    /// Only so many of the last lines
    #[arg(long, value_name = "LINES")]
    tail: Option<usize>,
    /// Only what is younger: a duration (5m, 2h) or a time (2026-01-02T03:04:05Z)
    #[arg(long, value_name = "WHEN", value_parser = parse_since)]
    since: Option<Timestamp>,
    /// When each line was printed
    #[arg(long)]
    timestamps: bool,
    /// The name of pod and container before each line
    #[arg(long)]
    prefix: bool,
    /// The run before the last restart
    #[arg(short, long)]
    previous: bool,
}

fn parse_since(text: &str) -> Result<Timestamp, String> {
    if let Ok(time) = text.parse::<Timestamp>() {
        return Ok(time);
    }
    let ago: SignedDuration = text
        .parse()
        .map_err(|_| "neither a duration (5m, 2h) nor a time (2026-01-02T03:04:05Z)".to_owned())?;
    Timestamp::now()
        .checked_sub(ago)
        .map_err(|_| "too long ago".to_owned())
}

pub fn run(host: &Host, args: Args) -> Result<(), Failure> {
    let record = host.registry()?.find(&args.pod)?;
    let names: Vec<String> = if args.all_containers {
        record
            .status
            .all_containers()
            .map(|c| c.name.clone())
            .collect()
    } else {
        let name = args.container.as_deref().or(args.container_name.as_deref());
        vec![pods::container(&record.status, name)?.name.clone()]
    };
    let style = Style {
        prefix: args.prefix || args.all_containers,
        timestamps: args.timestamps,
    };
    let labels: Vec<String> = names.iter().map(|name| label(&record, name)).collect();
    let printer = Printer::new(style, &labels, ProgressBar::hidden());
    let options = LogOptions {
        tail: args.tail,
        since: args.since.map(Since),
        previous: args.previous,
        from_first: false,
    };
    std::thread::scope(|scope| {
        let show = |name: &str| show(&record, name, options, args.follow, &printer);
        if !args.follow {
            return names.iter().try_for_each(|name| show(name));
        }
        let threads: Vec<_> = names
            .iter()
            .map(|name| scope.spawn(move || show(name)))
            .collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().unwrap_or(Ok(())))
    })
}

/// How a container is called before its lines.
pub fn label(record: &PodRecord, container: &str) -> String {
    format!("{}/{container}", record.status.name)
}

fn show(
    record: &PodRecord,
    container: &str,
    options: LogOptions,
    follow: bool,
    printer: &Printer,
) -> Result<(), Failure> {
    let label = label(record, container);
    let mut printed = Ok(());
    let mut print = |line: LogLine| {
        printed = printer.print(&label, line);
        printed.is_ok()
    };
    if follow {
        let each = |line| match print(line) {
            true => Follow::On,
            false => Follow::Stop,
        };
        logs::follow(&record.dir, container, options, each, || {
            if printer.flush().is_err() || reader_is_gone() {
                Follow::Stop
            } else {
                Follow::On
            }
        })?;
    } else {
        logs::read(&record.dir.container_logs(container), options, &mut print)?;
    }
    printed
        .and_then(|()| printer.finish(&label))
        .map_err(|e| Failure::io("printing", e))
}

/// Whether nobody reads standard output any more: then there is nothing to wait for.
pub fn reader_is_gone() -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let stdout = io::stdout();
    let mut fds = [PollFd::new(&stdout, PollFlags::empty())];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().contains(PollFlags::ERR)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn since_takes_durations_and_times() {
        let hour_ago = parse_since("1h").unwrap();
        let then = parse_since("2000-01-01T00:00:00Z").unwrap();

        let age = Timestamp::now().duration_since(hour_ago).as_secs();
        assert!((3600..3700).contains(&age));
        assert_eq!(then.as_second(), 946_684_800);
        assert!(parse_since("0s").is_ok());
        assert!(parse_since("yesterday").is_err());
    }
}
