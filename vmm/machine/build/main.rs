//! Compiles the seccomp filters of `hull-vmm`, so that no machine's start has to.

mod calls;

use std::collections::BTreeMap;
use std::error::Error;
use std::path::PathBuf;
use std::{env, fs};

use calls::{Arguments, Call, FILTERS};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build");
    let directory = PathBuf::from(env::var("OUT_DIR")?);
    for (name, lists) in FILTERS {
        let program = program(lists)?;
        fs::write(directory.join(name).with_extension("bpf"), bytes(&program))?;
    }
    Ok(())
}

/// Instructions as `struct sock_filter` has them (linux/filter.h).
fn bytes(program: &BpfProgram) -> Vec<u8> {
    program
        .iter()
        .flat_map(|instruction| {
            let mut bytes = [0; 8];
            bytes[..2].copy_from_slice(&instruction.code.to_le_bytes());
            bytes[2] = instruction.jt;
            bytes[3] = instruction.jf;
            bytes[4..].copy_from_slice(&instruction.k.to_le_bytes());
            bytes
        })
        .collect()
}

/// # Errors
/// When a list is longer than a filter can be.
fn program(lists: &[&[Call]]) -> Result<BpfProgram, BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    // An empty chain of rules allows a call whatever its arguments are, so a list
    // that says so must win over one with conditions.
    let mut unconditional = Vec::new();
    for call in lists.iter().copied().flatten() {
        let chain = rules.entry(call.number).or_default();
        let alternatives = conditions(call.arguments)?;
        if alternatives.is_empty() {
            unconditional.push(call.number);
        }
        chain.extend(alternatives);
    }
    for number in unconditional {
        rules.insert(number, Vec::new());
    }
    SeccompFilter::new(
        rules,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?
    .try_into()
}

fn conditions(arguments: Arguments) -> Result<Vec<SeccompRule>, BackendError> {
    let condition = |place, operator, value: u32| {
        SeccompCondition::new(place, SeccompCmpArgLen::Dword, operator, u64::from(value))
    };
    match arguments {
        Arguments::Any => Ok(Vec::new()),
        Arguments::OneOf(place, values) => values
            .iter()
            .map(|&value| SeccompRule::new(vec![condition(place, SeccompCmpOp::Eq, value)?]))
            .collect(),
        Arguments::Bits {
            place,
            without,
            with,
        } => {
            let mask = SeccompCmpOp::MaskedEq(u64::from(without | with));
            Ok(vec![SeccompRule::new(vec![condition(place, mask, with)?])?])
        }
    }
}
