//! A timeline in the trace event format, which chrome://tracing and Perfetto show.

use hull_pod::timeline::{Place, Step, Timeline};
use serde_json::{Value, json};

const PLACES: [Place; 4] = [Place::Hull, Place::Supervisor, Place::HullVmm, Place::Guest];

/// All of it. Each place is a process there; steps that overlap are on threads of their own.
pub fn events(pod: &str, timeline: &Timeline) -> Value {
    let mut events = Vec::new();
    for (pid, place) in PLACES.into_iter().enumerate() {
        events.push(json!({
            "name": "process_name",
            "ph": "M",
            "pid": pid,
            "args": {"name": place.name()},
        }));
        let steps = timeline.steps.iter().filter(|step| step.place == place);
        for (tid, step) in lanes(steps) {
            events.push(json!({
                "name": step.name,
                "ph": "X",
                "pid": pid,
                "tid": tid,
                "ts": step.at_micros,
                "dur": step.took_micros,
            }));
        }
    }
    for stamp in &timeline.stamps {
        events.push(json!({
            "name": format!("{} {}", stamp.stamp.name(), stamp.stamp.meaning()),
            "ph": "i",
            // Of all processes.
            "s": "g",
            "pid": 0,
            "tid": 0,
            "ts": stamp.at_micros,
        }));
    }
    json!({
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"pod": pod, "requested": timeline.requested},
    })
}

/// Each step with the first thread that is free when it begins. They come by their beginnings.
fn lanes<'a>(steps: impl Iterator<Item = &'a Step>) -> Vec<(usize, &'a Step)> {
    let mut busy_until: Vec<u64> = Vec::new();
    let mut placed = Vec::new();
    for step in steps {
        let free = busy_until.iter().position(|until| *until <= step.at_micros);
        let lane = free.unwrap_or(busy_until.len());
        let end = step.at_micros.saturating_add(step.took_micros);
        match busy_until.get_mut(lane) {
            Some(until) => *until = end,
            None => busy_until.push(end),
        }
        placed.push((lane, step));
    }
    placed
}

#[cfg(test)]
mod tests {
    use hull_pod::timeline::{CpuTime, Mark, Stamp};
    use jiff::Timestamp;

    use super::*;

    #[test]
    fn what_overlaps_is_side_by_side() {
        let step = |name: &str, at_micros, took_micros| Step {
            place: Place::Supervisor,
            name: name.into(),
            at_micros,
            took_micros,
        };
        let timeline = Timeline {
            requested: Timestamp::UNIX_EPOCH,
            stamps: vec![Stamp {
                stamp: Mark::Infra,
                at_micros: 7,
            }],
            steps: vec![
                step("mounts", 0, 10),
                step("network", 5, 10),
                step("infra", 10, 5),
            ],
            cpu: CpuTime::default(),
        };

        let trace = events("web", &timeline);

        let all = trace["traceEvents"].as_array().unwrap();
        let find = |name| all.iter().find(|event| event["name"] == name).unwrap();
        assert_eq!(find("mounts")["tid"], 0);
        assert_eq!(find("network")["tid"], 1);
        assert_eq!(find("infra")["tid"], 0);
        assert_eq!(
            (&find("infra")["ts"], &find("infra")["dur"]),
            (&json!(10), &json!(5))
        );
        assert_eq!(find("T5 infra up")["ph"], "i");
    }
}
