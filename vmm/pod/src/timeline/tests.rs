use hull_machine::steps::{Started, Step as MachineStep};
use std::time::Duration;
use tokio::time::timeout;

use super::*;

fn written(recorder: &Recorder) -> Timeline {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join(FILE);
    recorder.write(&path);
    Timeline::read(root.path()).unwrap()
}

fn step<'a>(timeline: &'a Timeline, name: &str) -> &'a Step {
    timeline.steps.iter().find(|s| s.name == name).unwrap()
}

/// A start whose machine is said to have run first at `first_run`.
fn launched(first_run: u64) -> Recorder {
    let recorder = Recorder::begin(None);
    let launch = recorder.step("launch");
    let started = Started {
        begun: first_run,
        steps: Vec::new(),
        first_run,
    };
    recorder.machine(&launch, &started, Some(std::process::id()));
    recorder
}

#[test]
fn a_cold_start_has_every_stamp_in_order() {
    let asked = now_micros() - 5_000;
    let recorder = Recorder::begin(Some(asked));
    recorder.ended(Place::Hull, "hull run", asked);
    let launch = recorder.step("launch");
    let begun = now_micros();
    std::thread::sleep(Duration::from_millis(4));
    let now = now_micros();
    let started = Started {
        begun,
        steps: vec![MachineStep {
            name: "jail".into(),
            ended: begun + 2000,
        }],
        first_run: now,
    };
    recorder.machine(&launch, &started, Some(std::process::id()));
    drop(launch);
    std::thread::sleep(Duration::from_millis(10));
    let clock = GuestClock {
        answered: now_micros(),
        now: 8000,
        agent_start: 5000,
        agent_ready: 7000,
    };
    recorder.guest(&clock, true);
    for mark in [Mark::Infra, Mark::Exec, Mark::Output, Mark::Output] {
        recorder.mark(mark);
    }

    let timeline = written(&recorder);

    let marks: Vec<Mark> = timeline.stamps.iter().map(|stamp| stamp.stamp).collect();
    let times: Vec<u64> = timeline
        .stamps
        .iter()
        .map(|stamp| stamp.at_micros)
        .collect();
    assert_eq!(marks, Mark::ALL);
    assert!(times.is_sorted() && times[0] == 0, "{times:?}");
    assert!(timeline.at(Mark::FirstRun).unwrap() >= 5_000);
    assert_eq!(step(&timeline, "jail").took_micros, 2000);
    assert_eq!(step(&timeline, "kernel").took_micros, 5000);
    assert!(step(&timeline, "hull run").took_micros >= 5_000);
    assert!(timeline.steps.is_sorted_by_key(|step| step.at_micros));
    assert!(timeline.cpu.supervisor_micros.is_some() && timeline.cpu.vmm_micros.is_some());
    assert_eq!(timeline.end(), *times.last().unwrap());
}

#[test]
fn a_clones_guest_began_before_its_machine() {
    let recorder = launched(now_micros());
    let clock = GuestClock {
        answered: now_micros(),
        now: 86_400_000_000,
        agent_start: 300_000,
        agent_ready: 400_000,
    };
    recorder.guest(&clock, false);

    let timeline = written(&recorder);

    assert!(timeline.at(Mark::Answer).is_some());
    assert_eq!(timeline.at(Mark::Kernel), None);
    assert_eq!(timeline.at(Mark::Agent), None);
}

#[test]
fn lies_stay_within_the_start() {
    let numbers = [0, 1, 1000, 1_000_000, u64::MAX / 2, u64::MAX];
    for now in numbers {
        for agent_start in numbers {
            for agent_ready in numbers {
                let recorder = launched(now);
                let clock = GuestClock {
                    answered: agent_start.max(now_micros()),
                    now,
                    agent_start,
                    agent_ready,
                };
                recorder.guest(&clock, true);
                let timeline = written(&recorder);
                let times: Vec<u64> = timeline.stamps.iter().map(|s| s.at_micros).collect();
                assert!(times.is_sorted(), "{clock:?} {times:?}");
                assert!(timeline.end() < 60_000_000, "{clock:?} {timeline:?}");
            }
        }
    }
}

#[test]
fn a_machine_that_lies_is_bounded() {
    let recorder = Recorder::begin(None);
    let launch = recorder.step("launch");
    let step = |ended| MachineStep {
        name: "x".into(),
        ended,
    };
    let started = Started {
        begun: u64::MAX,
        steps: (0..10_000).map(|n| step(n * 7919)).collect(),
        first_run: 3,
    };

    recorder.machine(&launch, &started, None);

    let timeline = written(&recorder);
    assert!(timeline.steps.len() <= STEPS_MAX);
    assert!(timeline.end() < 60_000_000, "{}", timeline.end());
}

#[test]
fn a_request_of_long_ago_or_to_come_is_none() {
    for requested in [0, u64::MAX] {
        let recorder = Recorder::begin(Some(requested));
        recorder.mark(Mark::Infra);
        let at = written(&recorder).at(Mark::Infra).unwrap();
        assert!(at <= 61_000_000, "{requested}: {at}");
    }
}

#[test]
fn it_is_written_once() {
    let root = tempfile::tempdir().unwrap();
    let recorder = Recorder::begin(None);
    let file = root.path().join(FILE);

    recorder.write(&file);
    std::fs::remove_file(&file).unwrap();
    recorder.mark(Mark::Output);
    recorder.write(&file);

    assert!(matches!(
        Timeline::read(root.path()),
        Err(TimelineError::None(_))
    ));
}

#[tokio::test]
async fn it_is_kept_when_the_first_byte_is_out() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join(FILE);
    let recorder = Recorder::begin(None);
    let kept = tokio::spawn(recorder.clone().keep(file.clone()));

    // In the other order the first byte has overtaken the agent's answer.
    for mark in [Mark::Output, Mark::Exec] {
        tokio::task::yield_now().await;
        assert!(!file.exists());
        recorder.mark(mark);
    }

    timeout(Duration::from_secs(60), kept)
        .await
        .unwrap()
        .unwrap();
    let kept = Timeline::read(&file).unwrap();
    assert!(kept.at(Mark::Exec).is_some() && kept.at(Mark::Exec) <= kept.at(Mark::Output));
}

#[test]
fn another_file_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("state.json");
    std::fs::write(&file, "{}").unwrap();

    assert!(matches!(
        Timeline::read(&file),
        Err(TimelineError::Malformed { .. })
    ));
}
