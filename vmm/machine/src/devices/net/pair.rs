//! A queue pair's thread: waits for the driver, the tap, and what it is told; moves packets.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use super::commands::Commands;
use super::features;
use super::link::{Backend, Link};
use super::receive::{self, Receive};
use super::transmit::{self, Transmit};
use super::vhost::Running;
use crate::devices::worker::{Events, Handler, Readiness, borrow};
use crate::memory::GuestRam;
use crate::virtio::device::QueuePosition;

const RECEIVE: u64 = 0;
const TRANSMIT: u64 = 1;
const TAP: u64 = 2;
pub const BELL: u64 = 3;
const TIMER: u64 = 4;
const COMMANDS: u64 = 5;
/// Relayed interrupts of the kernel's, one for each queue.
const RELAYS: [u64; 2] = [6, 7];

/// From one look at a tap that the kernel serves to the next.
const GLANCE: Duration = Duration::from_secs(5);

/// Who moves packets.
#[derive(Debug)]
enum Served {
    /// Nobody: there is no tap, or the driver does not use the pair.
    Nobody,
    Here(Arc<Backend>),
    Kernel(Running),
}

/// A queue pair, on its thread.
#[derive(Debug)]
pub struct Pair {
    number: usize,
    memory: GuestRam,
    negotiated: u64,
    receive: Receive,
    transmit: Transmit,
    link: Arc<Link>,
    /// The first pair's thread answers commands, too.
    commands: Option<Commands>,
    served: Served,
    receive_pause: receive::Pause,
    transmit_pause: transmit::Pause,
    /// Ends pauses that limits make, and between looks at a tap that the kernel serves.
    timer: Option<OwnedFd>,
}

impl Pair {
    pub fn new(
        number: usize,
        memory: GuestRam,
        negotiated: u64,
        (receive, transmit): (Receive, Transmit),
        link: Arc<Link>,
        commands: Option<Commands>,
    ) -> Self {
        Self {
            number,
            memory,
            negotiated,
            receive,
            transmit,
            link,
            commands,
            served: Served::Nobody,
            receive_pause: receive::Pause::Tap,
            transmit_pause: transmit::Pause::Driver,
            timer: None,
        }
    }

    fn is_limited(&self) -> bool {
        !(self.receive.limiter.is_unlimited() && self.transmit.limiter.is_unlimited())
    }

    /// The backend that serves the pair.
    fn current(&self) -> Option<&Arc<Backend>> {
        match &self.served {
            Served::Nobody => None,
            Served::Here(backend) => Some(backend),
            Served::Kernel(running) => Some(running.backend()),
        }
    }

    /// Has the pair served by whoever should serve it now.
    fn follow(&mut self, events: &Events) -> io::Result<()> {
        let (wanted, change) = self.link.backend(self.number);
        let same = match (&wanted, self.current()) {
            (Some(wanted), Some(current)) => Arc::ptr_eq(wanted, current),
            (None, None) => true,
            _ => false,
        };
        if !same {
            self.leave(events)?;
            match wanted {
                Some(backend) => self.enter(events, backend)?,
                None => self.move_packets(events)?,
            }
        }
        self.link.follow(self.number, change)
    }

    fn leave(&mut self, events: &Events) -> io::Result<()> {
        self.receive_pause = receive::Pause::Tap;
        self.transmit_pause = transmit::Pause::Driver;
        match std::mem::replace(&mut self.served, Served::Nobody) {
            Served::Nobody => Ok(()),
            Served::Here(backend) => events.remove(backend.tap.as_fd()),
            Served::Kernel(running) => {
                for relay in running.relays.iter().flatten() {
                    events.remove(borrow(relay))?;
                }
                running.stop([&mut self.receive.ring, &mut self.transmit.ring])?;
                self.watch_kicks(events)
            }
        }
    }

    fn enter(&mut self, events: &Events, backend: Arc<Backend>) -> io::Result<()> {
        let offload = features::tun_offload(self.negotiated);
        if let Err(error) = backend.tap.set_offload(offload) {
            log::error!("a tap can't do what was negotiated: {error}");
            self.link.lost(&backend);
            return Ok(());
        }
        if !self.is_limited() {
            let rings = [&self.receive.ring, &self.transmit.ring];
            match Running::start(&backend, &self.memory, self.negotiated, rings) {
                Ok(Some(running)) => return self.watch_relays(events, running),
                Ok(None) => {}
                Err(error) => {
                    log::warn!("vhost-net is of no use, packets are moved in hull-vmm: {error}");
                }
            }
        }
        events.add(backend.tap.as_fd(), TAP, Readiness::empty())?;
        self.served = Served::Here(backend);
        self.move_packets(events)
    }

    fn watch_kicks(&self, events: &Events) -> io::Result<()> {
        events.add(borrow(&self.receive.ring.kick), RECEIVE, Readiness::IN)?;
        events.add(borrow(&self.transmit.ring.kick), TRANSMIT, Readiness::IN)
    }

    fn watch_relays(&mut self, events: &Events, running: Running) -> io::Result<()> {
        // The kernel waits for these.
        events.remove(borrow(&self.receive.ring.kick))?;
        events.remove(borrow(&self.transmit.ring.kick))?;
        for (token, relay) in RELAYS.into_iter().zip(&running.relays) {
            if let Some(relay) = relay {
                events.add(borrow(relay), token, Readiness::IN)?;
            }
        }
        // Whatever the driver has announced before is the kernel's to look for.
        self.receive.ring.kick.write(1)?;
        self.transmit.ring.kick.write(1)?;
        self.served = Served::Kernel(running);
        self.set_timer(Instant::now() + GLANCE)
    }

    /// Moves packets both ways.
    fn move_packets(&mut self, events: &Events) -> io::Result<()> {
        self.run_transmit()?;
        self.run_receive()?;
        self.wait(events)
    }

    fn run_receive(&mut self) -> io::Result<()> {
        if let Served::Here(backend) = &self.served {
            self.receive_pause = self.receive.run(&self.memory, backend.tap.as_fd())?;
        }
        Ok(())
    }

    fn run_transmit(&mut self) -> io::Result<()> {
        let tap = match &self.served {
            Served::Nobody => None,
            Served::Here(backend) => Some(backend.tap.as_fd()),
            Served::Kernel(_) => return Ok(()),
        };
        self.transmit_pause = self.transmit.run(&self.memory, tap)?;
        Ok(())
    }

    /// Waits for what both ways have to wait for.
    fn wait(&mut self, events: &Events) -> io::Result<()> {
        if self.receive_pause == receive::Pause::Broken {
            self.receive_pause = receive::Pause::Tap;
            self.tap_failed(events)?;
        }
        let Served::Here(backend) = &self.served else {
            return Ok(());
        };
        let mut readiness = Readiness::empty();
        readiness.set(Readiness::IN, self.receive_pause == receive::Pause::Tap);
        readiness.set(Readiness::OUT, self.transmit_pause == transmit::Pause::Tap);
        events.modify(backend.tap.as_fd(), TAP, readiness)?;
        let receive = match self.receive_pause {
            receive::Pause::Until(due) => Some(due),
            _ => None,
        };
        let transmit = match self.transmit_pause {
            transmit::Pause::Until(due) => Some(due),
            _ => None,
        };
        match receive.into_iter().chain(transmit).min() {
            Some(due) => self.set_timer(due),
            None => Ok(()),
        }
    }

    fn set_timer(&self, due: Instant) -> io::Result<()> {
        let Some(timer) = &self.timer else {
            return Ok(());
        };
        // No time at all would stop the timer.
        let pause = due
            .saturating_duration_since(Instant::now())
            .max(Duration::from_nanos(1));
        let time = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec::try_from(pause).map_err(io::Error::other)?,
        };
        timerfd_settime(timer, TimerfdTimerFlags::empty(), &time)?;
        Ok(())
    }

    /// The tap may be gone; or this queue of it was out of use a moment ago.
    fn tap_failed(&mut self, events: &Events) -> io::Result<()> {
        self.follow(events)?;
        if let Some(backend) = self.current().cloned()
            && is_gone(backend.tap.as_fd())?
        {
            self.link.lost(&backend);
            return self.follow(events);
        }
        Ok(())
    }

    /// Looks whether the tap is still there, which the kernel tells nobody while it serves it.
    fn glance(&mut self, events: &Events) -> io::Result<()> {
        self.tap_failed(events)?;
        if matches!(self.served, Served::Kernel(_)) {
            self.set_timer(Instant::now() + GLANCE)?;
        }
        Ok(())
    }

    /// Interrupts the guest for the kernel.
    fn relay(&self, token: u64) -> io::Result<()> {
        let Served::Kernel(running) = &self.served else {
            return Ok(());
        };
        let interrupts = [&self.receive.ring.interrupt, &self.transmit.ring.interrupt];
        for ((number, relay), interrupt) in RELAYS.into_iter().zip(&running.relays).zip(interrupts)
        {
            if number == token
                && let Some(relay) = relay
            {
                drop(relay.read());
                interrupt.signal()?;
            }
        }
        Ok(())
    }
}

/// Whether a tap is of no use now.
fn is_gone(tap: BorrowedFd<'_>) -> io::Result<bool> {
    let mut source = [PollFd::from_borrowed_fd(tap, PollFlags::empty())];
    match poll(&mut source, Some(&Timespec::default())) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(!source[0].revents().is_empty()),
        Err(error) => Err(error.into()),
    }
}

impl Handler for Pair {
    fn start(&mut self, events: &Events) -> io::Result<()> {
        self.watch_kicks(events)?;
        let bell = self
            .link
            .bell(self.number)
            .ok_or(io::ErrorKind::InvalidInput)?;
        events.add(borrow(bell), BELL, Readiness::IN)?;
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        events.add(&timer, TIMER, Readiness::IN)?;
        self.timer = Some(timer);
        if let Some(commands) = &self.commands {
            events.add(borrow(&commands.queue.kick), COMMANDS, Readiness::IN)?;
        }
        if self.number == 0 {
            self.link.arrange();
        }
        self.follow(events)
    }

    fn ready(&mut self, events: &Events, token: u64, readiness: Readiness) -> io::Result<()> {
        match token {
            // Taken from the epoll before the kernel served the queues, which waits for the kick now.
            RECEIVE | TRANSMIT if matches!(self.served, Served::Kernel(_)) => return Ok(()),
            RECEIVE => {
                drop(self.receive.ring.kick.read());
                if self.receive_pause == receive::Pause::Buffers {
                    self.run_receive()?;
                }
            }
            TRANSMIT => {
                drop(self.transmit.ring.kick.read());
                if matches!(self.served, Served::Nobody) {
                    // The driver may have heard of a tap before this thread.
                    self.follow(events)?;
                }
                if self.transmit_pause == transmit::Pause::Driver {
                    self.run_transmit()?;
                }
            }
            TAP if readiness.intersects(Readiness::ERR | Readiness::HUP) => {
                return self.tap_failed(events);
            }
            TAP => {
                if readiness.contains(Readiness::OUT) {
                    self.run_transmit()?;
                }
                if readiness.contains(Readiness::IN) {
                    self.run_receive()?;
                }
            }
            BELL => {
                if let Some(bell) = self.link.bell(self.number) {
                    drop(bell.read());
                }
                if self.number == 0 {
                    self.link.arrange();
                }
                return self.follow(events);
            }
            TIMER => {
                if let Some(timer) = &self.timer {
                    // How often it has expired says nothing; nor does it if it has not yet.
                    let _ = rustix::io::read(timer, &mut [0; 8]);
                }
                if matches!(self.served, Served::Kernel(_)) {
                    return self.glance(events);
                }
                return self.move_packets(events);
            }
            COMMANDS => {
                if let Some(commands) = &mut self.commands {
                    return commands.run(&self.memory);
                }
            }
            token => return self.relay(token),
        }
        self.wait(events)
    }

    fn rest(&mut self, events: &Events) -> Vec<QueuePosition> {
        if let Err(error) = self.leave(events) {
            log::error!("a queue pair is where it was, as far as can be told: {error}");
        }
        let mut positions = vec![self.receive.ring.position(), self.transmit.ring.position()];
        let commands = self.commands.as_ref();
        positions.extend(commands.map(|commands| commands.queue.position()));
        positions
    }
}
