//! What a jailed process is, seen from outside: by /proc, by files, and by what kills it.
//!
//! The process is this program itself, which enters the jail by the library's own
//! functions as `hull-vmm` does, and then runs one thread of each class in place of
//! a machine. Where `HULL_GUEST_DIR` and KVM are there (`scripts/with-kvm`), `hull-vmm`
//! with a real machine is looked at, too. Needs root.

#![expect(clippy::unwrap_used, reason = "all of it is a test")]

#[path = "jail/inmate.rs"]
mod inmate;
#[path = "jail/outside.rs"]
mod outside;
#[path = "jail/supervisor.rs"]
mod supervisor;

use std::io::Write;
use std::process::ExitCode;

type Test = (&'static str, fn());

const TESTS: &[Test] = &[
    (
        "every_thread_has_its_filter",
        outside::every_thread_has_its_filter,
    ),
    (
        "only_file_server_threads_have_capabilities",
        outside::only_file_server_threads_have_capabilities,
    ),
    (
        "no_namespace_is_the_hosts",
        outside::no_namespace_is_the_hosts,
    ),
    ("every_id_is_itself", outside::every_id_is_itself),
    (
        "the_root_holds_only_the_shares",
        outside::the_root_holds_only_the_shares,
    ),
    (
        "no_descriptor_is_left_over",
        outside::no_descriptor_is_left_over,
    ),
    (
        "no_memory_is_writable_and_executable",
        outside::no_memory_is_writable_and_executable,
    ),
    ("resources_are_limited", outside::resources_are_limited),
    (
        "a_mount_made_later_comes_and_goes",
        outside::a_mount_made_later_comes_and_goes,
    ),
    (
        "the_file_server_acts_as_any_owner",
        outside::the_file_server_acts_as_any_owner,
    ),
    (
        "procfs_ends_at_the_descriptors",
        outside::procfs_ends_at_the_descriptors,
    ),
    (
        "a_forbidden_call_of_a_vcpu_kills",
        outside::a_forbidden_call_of_a_vcpu_kills,
    ),
    (
        "a_forbidden_call_of_a_device_kills",
        outside::a_forbidden_call_of_a_device_kills,
    ),
    (
        "a_forbidden_call_of_the_file_server_kills",
        outside::a_forbidden_call_of_the_file_server_kills,
    ),
    (
        "a_forbidden_call_of_the_control_thread_kills",
        outside::a_forbidden_call_of_the_control_thread_kills,
    ),
    ("executable_memory_kills", outside::executable_memory_kills),
    (
        "a_heap_that_shrinks_calls_nothing_forbidden",
        outside::a_heap_that_shrinks_calls_nothing_forbidden,
    ),
    (
        "a_panic_ends_the_machine_with_its_reason",
        outside::a_panic_ends_the_machine_with_its_reason,
    ),
    ("a_kill_is_seen", outside::a_kill_is_seen),
    ("stop_gives_stopped", outside::stop_gives_stopped),
    (
        "dropping_the_machine_kills_it",
        outside::dropping_the_machine_kills_it,
    ),
    (
        "the_supervisors_death_ends_the_machine",
        outside::the_supervisors_death_ends_the_machine,
    ),
    (
        "a_missing_program_says_so",
        outside::a_missing_program_says_so,
    ),
    (
        "a_program_that_just_ends_says_so",
        outside::a_program_that_just_ends_says_so,
    ),
    (
        "a_share_that_is_no_directory_says_so",
        outside::a_share_that_is_no_directory_says_so,
    ),
    (
        "a_machine_that_cannot_be_made_says_so",
        outside::a_machine_that_cannot_be_made_says_so,
    ),
    (
        "too_many_descriptors_are_refused",
        outside::too_many_descriptors_are_refused,
    ),
];

/// Those that need KVM and a guest.
const WITH_KVM: &[Test] = &[("hull_vmm_is_jailed", outside::hull_vmm_is_jailed)];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments
        .iter()
        .map(String::as_str)
        .collect::<Vec<_>>()
        .as_slice()
    {
        ["--control-fd", "0"] => return inmate::run(),
        ["--supervise", share] => return supervisor::run(share),
        _ => {}
    }
    let wanted = |name: &str| {
        let mut filters = arguments.iter().filter(|a| !a.starts_with('-')).peekable();
        filters.peek().is_none() || filters.any(|filter| name.contains(filter.as_str()))
    };
    if arguments.iter().any(|a| a == "--list") {
        for (name, _) in TESTS.iter().chain(WITH_KVM) {
            println!("{name}: test");
        }
        return ExitCode::SUCCESS;
    }
    supervisor::own_mounts();
    let (mut passed, mut failed, mut left_out) = (0, 0, 0);
    let with_kvm = std::env::var_os("HULL_GUEST_DIR").is_some();
    for (name, test) in TESTS
        .iter()
        .chain(WITH_KVM)
        .filter(|(name, _)| wanted(name))
    {
        print!("test {name} ... ");
        let _ = std::io::stdout().flush();
        if !with_kvm && WITH_KVM.iter().any(|(other, _)| other == name) {
            left_out += 1;
            println!("ignored, needs HULL_GUEST_DIR and KVM (scripts/with-kvm)");
        } else if std::panic::catch_unwind(test).is_ok() {
            passed += 1;
            println!("ok");
        } else {
            failed += 1;
            println!("FAILED");
        }
    }
    println!("\ntest result: {passed} passed; {failed} failed; {left_out} ignored");
    ExitCode::from(u8::from(failed > 0))
}
