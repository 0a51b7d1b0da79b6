//! The agent with real containers, without a machine of its own.
//!
//! Runs as root where cgroup v2 is the only hierarchy, in namespaces of its own:
//! `scripts/lab target/x86_64-unknown-linux-gnu/debug/deps/guest-…`, or `cargo test
//! -p hull-agent --test guest` on such a machine. This program is the helpers, too: the
//! agent starts itself from /proc/self/exe.

mod amounts;
mod containers;
mod execs;
mod network;
mod pod;
mod world;

use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use world::World;

/// Set in the namespaces.
const INSIDE: &str = "HULL_AGENT_TEST_INSIDE";

fn main() -> ExitCode {
    if let Some(code) = hull_agent::run_helper() {
        return code;
    }
    if std::env::var_os(INSIDE).is_none() {
        let error = Command::new("unshare")
            .args(["--mount", "--pid", "--fork", "--mount-proc"])
            .args(["--propagation", "private", "--"])
            .arg(std::env::current_exe().expect("/proc"))
            .args(std::env::args_os().skip(1))
            .env(INSIDE, "1")
            .exec();
        eprintln!("unshare: {error}");
        return ExitCode::FAILURE;
    }
    let filter = std::env::args()
        .skip(1)
        .find(|argument| !argument.starts_with('-'))
        .unwrap_or_default();
    let runtime = hull_agent::runtime().expect("a runtime");
    runtime.block_on(async {
        let world = World::new().await;
        let mut failed = 0;
        // The last test ends the pod.
        let mut tests = containers::tests();
        tests.extend(amounts::tests());
        tests.extend(execs::tests());
        tests.extend(network::tests());
        tests.extend(pod::tests());
        for (name, test) in tests {
            if !name.contains(&filter) {
                continue;
            }
            let passed = tokio::spawn(test(world.clone())).await.is_ok();
            println!("test {name} ... {}", if passed { "ok" } else { "FAILED" });
            failed += u32::from(!passed);
        }
        println!("{failed} failed");
        ExitCode::from(u8::from(failed > 0))
    })
}
