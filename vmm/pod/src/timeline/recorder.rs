//! Notes a start while it happens.

use std::borrow::Cow;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hull_machine::steps::Started;
use jiff::{SignedDuration, Timestamp};
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::watch;
use tokio::time::timeout;

use super::{CpuTime, GuestClock, Mark, Place, STEPS_MAX, Stamp, Step, Timeline, now_micros};
use crate::footprint;
use crate::metrics::cpu_time;
use crate::state::replace_file;

/// A request is not taken to be older than this, in microseconds.
const OLDEST_REQUEST: u64 = 60 * 1_000_000;
/// A container that prints nothing for so long is not waited for.
const SILENCE: Duration = Duration::from_secs(10);

/// Where a start is noted, by all that have a part in it. Clones are of the same start.
#[derive(Debug, Clone)]
pub struct Recorder(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Told of each mark.
    marked: watch::Sender<()>,
}

#[derive(Debug)]
struct State {
    requested: Timestamp,
    /// On the clock, as all that follow.
    marks: [Option<u64>; Mark::ALL.len()],
    steps: Vec<Taken>,
    /// `hull-vmm`, a child of this process's.
    vmm: Option<u32>,
    cpu: CpuTime,
    written: bool,
}

#[derive(Debug)]
struct Taken {
    place: Place,
    name: Cow<'static, str>,
    begun: u64,
    ended: u64,
}

impl Recorder {
    /// A start that was asked for at this moment of [`now_micros`]; or now.
    #[must_use]
    pub fn begin(requested: Option<u64>) -> Self {
        let now = now_micros();
        let requested = requested
            .unwrap_or(now)
            .clamp(now.saturating_sub(OLDEST_REQUEST), now);
        let ago = i64::try_from(now - requested).unwrap_or(0);
        let wall = Timestamp::now();
        let mut state = State {
            requested: wall
                .checked_sub(SignedDuration::from_micros(ago))
                .unwrap_or(wall),
            marks: Default::default(),
            steps: Vec::new(),
            vmm: None,
            cpu: CpuTime::default(),
            written: false,
        };
        state.set(Mark::Request, requested);
        Self(Arc::new(Shared {
            state: Mutex::new(state),
            marked: watch::Sender::new(()),
        }))
    }

    /// Notes that it has come so far. The first time counts.
    pub fn mark(&self, mark: Mark) {
        self.set(mark, now_micros());
    }

    /// Notes a step of the supervisor's that lasts until what is returned is dropped.
    pub fn step(&self, name: &'static str) -> RunningStep {
        RunningStep {
            recorder: self.clone(),
            name,
            begun: now_micros(),
        }
    }

    /// Notes a step of this process's, or of `hull run`, that has just ended.
    pub fn ended(&self, place: Place, name: &'static str, begun: u64) {
        self.lock().take(place, name.into(), begun, now_micros());
    }

    /// Notes how a machine came to run, whose launch began with the step `begun`, and its process.
    pub fn machine(&self, launch: &RunningStep, started: &Started, vmm: Option<u32>) {
        let now = now_micros();
        let mut state = self.lock();
        state.vmm = vmm;
        let within = |time: u64, from: u64| time.clamp(from, now);
        let mut from = within(started.begun, launch.begun);
        state.take(
            Place::Supervisor,
            "spawn hull-vmm".into(),
            launch.begun,
            from,
        );
        for step in &started.steps {
            let ended = within(step.ended, from);
            state.take(Place::HullVmm, step.name.clone().into(), from, ended);
            from = ended;
        }
        state.set(Mark::FirstRun, within(started.first_run, from));
    }

    /// Notes that the agent has answered, and what it said of the guest's boot. `booted`: it was this machine that booted,
    /// and not its template.
    pub fn guest(&self, clock: &GuestClock, booted: bool) {
        let mut state = self.lock();
        let answered = clock.answered.min(now_micros());
        state.set(Mark::Answer, answered);
        let first_run = state.marks[Mark::FirstRun as usize];
        if !booted {
            if let Some(first) = first_run {
                let name = "from the template to its answer".into();
                state.take(Place::Guest, name, first, answered);
            }
            return;
        }
        let boot = first_run.and_then(|first| Some((first, clock.boot(first)?)));
        if let Some((first, boot)) = boot {
            // Its memory, and its own code.
            state.take(
                Place::Guest,
                "kernel, before its clock".into(),
                first,
                boot.kernel,
            );
            state.set(Mark::Kernel, boot.kernel);
            state.set(Mark::Agent, boot.agent_start);
            state.take(Place::Guest, "kernel".into(), boot.kernel, boot.agent_start);
            let ready = boot.agent_ready;
            state.take(Place::Guest, "agent".into(), boot.agent_start, ready);
        }
    }

    /// Waits until the start is over, or until a container that has started keeps silent, and writes it down.
    pub async fn keep(self, path: impl AsRef<Path> + Send + 'static) {
        self.marked(Mark::Exec).await;
        // What is over then is as good.
        let _ = timeout(SILENCE, self.marked(Mark::Output)).await;
        let written = tokio::task::spawn_blocking(move || {
            self.write(path.as_ref());
            // The process had let go of what it needs for this.
            footprint::shrink();
        });
        // A panic aborts the process.
        let _ = written.await;
    }

    /// Writes it down as far as it has come, if that hasn't been done. A pod goes on without.
    pub fn write(&self, path: &Path) {
        let timeline = {
            let mut state = self.lock();
            if std::mem::replace(&mut state.written, true) {
                return;
            }
            state.timeline()
        };
        let content = match serde_json::to_vec(&timeline) {
            Ok(content) => content,
            Err(error) => return tracing::warn!(%error, "writing the pod's timeline"),
        };
        if let Err(error) = replace_file(path, &content) {
            tracing::warn!(%error, "writing the pod's timeline");
        }
    }

    async fn marked(&self, mark: Mark) {
        let mut marked = self.0.marked.subscribe();
        let is_marked = || self.lock().marks[mark as usize].is_some();
        while !is_marked() && marked.changed().await.is_ok() {}
    }

    fn set(&self, mark: Mark, at: u64) {
        let mut state = self.lock();
        if state.written || !state.set(mark, at) {
            return;
        }
        if mark == Mark::Exec {
            state.cpu = CpuTime {
                supervisor_micros: own_cpu_micros(),
                vmm_micros: state.vmm.and_then(cpu_micros),
            };
        }
        drop(state);
        self.0.marked.send_replace(());
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Whether it is the first time.
    fn set(&mut self, mark: Mark, at: u64) -> bool {
        let place = &mut self.marks[mark as usize];
        let first = place.is_none();
        place.get_or_insert(at);
        first
    }

    fn take(&mut self, place: Place, name: Cow<'static, str>, begun: u64, ended: u64) {
        if self.written || self.steps.len() >= STEPS_MAX {
            return;
        }
        self.steps.push(Taken {
            place,
            name,
            begun,
            ended,
        });
    }

    fn timeline(&mut self) -> Timeline {
        let zero = self.marks[Mark::Request as usize].unwrap_or(0);
        let since = |time: u64| time.saturating_sub(zero);
        let mut marks = self.marks;
        // A program's first byte may be here before the agent's word that it runs.
        if let (Some(exec), Some(output)) =
            (marks[Mark::Exec as usize], marks[Mark::Output as usize])
        {
            marks[Mark::Exec as usize] = Some(exec.min(output));
        }
        let stamps = Mark::ALL.into_iter().zip(marks);
        let mut steps: Vec<Step> = std::mem::take(&mut self.steps)
            .into_iter()
            .map(|taken| Step {
                place: taken.place,
                name: taken.name.into_owned(),
                at_micros: since(taken.begun),
                took_micros: taken.ended.saturating_sub(taken.begun),
            })
            .collect();
        steps.sort_by_key(|step| step.at_micros);
        Timeline {
            requested: self.requested,
            stamps: stamps
                .filter_map(|(stamp, at)| {
                    Some(Stamp {
                        stamp,
                        at_micros: since(at?),
                    })
                })
                .collect(),
            steps,
            cpu: self.cpu,
        }
    }
}

/// A step that has begun.
#[derive(Debug)]
#[must_use = "it ends when it is dropped"]
pub struct RunningStep {
    recorder: Recorder,
    name: &'static str,
    begun: u64,
}

impl Drop for RunningStep {
    fn drop(&mut self) {
        self.recorder
            .ended(Place::Supervisor, self.name, self.begun);
    }
}

fn own_cpu_micros() -> Option<u64> {
    let used = clock_gettime(ClockId::ProcessCPUTime);
    let part = |value: i64| u64::try_from(value).ok();
    Some(part(used.tv_sec)?.saturating_mul(1_000_000) + part(used.tv_nsec)? / 1000)
}

fn cpu_micros(pid: u32) -> Option<u64> {
    u64::try_from(cpu_time(pid).ok()?.as_micros()).ok()
}
