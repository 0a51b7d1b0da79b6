//! One connection as a state machine: no sockets, no queues, no clock of its own.
//!
//! ```text
//! Requested ──response──▶ Established ──both directions ended──▶ Closing
//!     │                        │                                  │
//!     └─ reset, deadline ──────┴─ reset, both halves ─────────────┴─ reset, deadline ──▶ Over
//!                                 shut by the guest
//! ```
//!
//! Each direction of a connection ends on its own. `guest_sends` and `guest_receives` are what the guest has not
//! shut; `host_sends` and `host_receives` what the host's socket has not. What one side shuts is told to the other,
//! and data goes on in the other direction.

use std::time::{Duration, Instant};

use super::credit::{FromGuest, ToGuest};
use super::packet::{Header, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// How long a guest may take to answer a request. Its kernel answers, not a program, so this is for a guest
/// that hangs, and generous for one that is emulated.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a guest may take to confirm the end of a connection (Linux gives as long, `VSOCK_CLOSE_TIMEOUT`).
const CLOSE_TIMEOUT: Duration = Duration::from_secs(8);

/// A connection of a guest's port and a host's.
#[derive(Debug)]
pub(super) struct Connection {
    state: State,
    to_guest: ToGuest,
    from_guest: FromGuest,
    guest_sends: bool,
    guest_receives: bool,
    host_sends: bool,
    host_receives: bool,
    /// To be said to the guest: what the connection is waiting for, or that it is accepted.
    opening: Option<Op>,
    /// Shutdown flags that the guest has been told.
    told_shutdown: u32,
    /// The guest asked for credit.
    credit_asked: bool,
}

/// Where a connection is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// The host asked for it; the guest has until then to answer.
    Requested(Instant),
    Established,
    /// Nothing more can go either way; the guest has until then to confirm.
    Closing(Instant),
    Over(End),
}

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// The guest reset it; it wants no answer.
    Reset,
    /// The guest shut both halves, and wants a reset in answer (section 5.10.6.6).
    Shut,
    /// The guest was silent for too long.
    Deadline,
    /// The guest broke the protocol.
    Violation,
}

impl End {
    /// Whether the guest is to get a reset.
    pub(super) fn wants_reset(self) -> bool {
        self != Self::Reset
    }
}

/// A packet without data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Control {
    pub op: Op,
    pub flags: u32,
}

impl Connection {
    /// One that the host asks for.
    pub(super) fn requested(buffer: u32, now: Instant) -> Self {
        Self::new(State::Requested(now + REQUEST_TIMEOUT), Op::Request, buffer)
    }

    /// One that the guest asked for, and gets.
    pub(super) fn accepted(buffer: u32, request: &Header) -> Self {
        let mut connection = Self::new(State::Established, Op::Response, buffer);
        connection.to_guest.told(request.buf_alloc, request.fwd_cnt);
        connection
    }

    fn new(state: State, opening: Op, buffer: u32) -> Self {
        Self {
            state,
            to_guest: ToGuest::default(),
            from_guest: FromGuest::new(buffer),
            guest_sends: true,
            guest_receives: true,
            host_sends: true,
            host_receives: true,
            opening: Some(opening),
            told_shutdown: 0,
            credit_asked: false,
        }
    }

    pub(super) fn state(&self) -> State {
        self.state
    }

    /// When [`Connection::on_deadline`] is due.
    pub(super) fn deadline(&self) -> Option<Instant> {
        match self.state {
            State::Requested(deadline) | State::Closing(deadline) => Some(deadline),
            State::Established | State::Over(_) => None,
        }
    }

    /// The guest has not shut its sending half.
    pub(super) fn guest_sends(&self) -> bool {
        self.guest_sends
    }

    /// The guest has not shut its receiving half.
    pub(super) fn guest_receives(&self) -> bool {
        self.guest_receives
    }

    /// Takes a packet of the guest. Returns whether its data is for the host's socket.
    pub(super) fn on_packet(&mut self, header: &Header, op: Op, now: Instant) -> bool {
        self.to_guest.told(header.buf_alloc, header.fwd_cnt);
        match (self.state, op) {
            (State::Over(_), _) => {}
            (_, Op::Reset) => self.end(End::Reset),
            (State::Requested(_), Op::Response) => {
                self.state = State::Established;
                self.close_if_finished(now);
            }
            (State::Established | State::Closing(_), Op::Data) => return self.on_data(header.len),
            (State::Established | State::Closing(_), Op::Shutdown) => {
                self.on_shutdown(header.flags, now);
            }
            (State::Established | State::Closing(_), Op::CreditUpdate) => {}
            (State::Established | State::Closing(_), Op::CreditRequest) => self.credit_asked = true,
            // A second request, a response to nothing, data before the response.
            _ => self.end(End::Violation),
        }
        false
    }

    fn on_data(&mut self, length: u32) -> bool {
        if !self.guest_sends || !self.from_guest.receive(length) {
            self.end(End::Violation);
            return false;
        }
        if !self.host_receives {
            self.from_guest.forward(length);
        }
        self.host_receives
    }

    fn on_shutdown(&mut self, flags: u32, now: Instant) {
        self.guest_sends &= flags & SHUTDOWN_SEND == 0;
        self.guest_receives &= flags & SHUTDOWN_RECEIVE == 0;
        if !self.guest_sends && !self.guest_receives {
            self.end(End::Shut);
        }
        self.close_if_finished(now);
    }

    /// `count` bytes of the guest have been written to the host's socket.
    pub(super) fn on_forwarded(&mut self, count: u32) {
        self.from_guest.forward(count);
    }

    /// `count` bytes, no more than [`Connection::room`], are going to the guest.
    pub(super) fn on_sent(&mut self, count: u32) {
        self.to_guest.sent(count);
    }

    /// The host's socket has no more to read, ever.
    pub(super) fn on_host_sent_all(&mut self, now: Instant) {
        self.host_sends = false;
        self.close_if_finished(now);
    }

    /// The host's socket can't be written to any more. What was not yet written is lost.
    pub(super) fn on_host_stops_receiving(&mut self, now: Instant) {
        self.host_receives = false;
        self.from_guest.forward(self.from_guest.held());
        self.close_if_finished(now);
    }

    /// With both directions at their end, whoever ended them, all that is left is to take leave.
    fn close_if_finished(&mut self, now: Instant) {
        let to_guest = self.host_sends && self.guest_receives;
        let from_guest = self.guest_sends && self.host_receives;
        if self.state == State::Established && !to_guest && !from_guest {
            self.state = State::Closing(now + CLOSE_TIMEOUT);
        }
    }

    /// The time is up.
    pub(super) fn on_deadline(&mut self, now: Instant) {
        if self.deadline().is_some_and(|deadline| deadline <= now) {
            self.end(End::Deadline);
        }
    }

    /// The guest sent something that is no packet of a connection.
    pub(super) fn on_violation(&mut self) {
        self.end(End::Violation);
    }

    /// What it is over by first counts.
    fn end(&mut self, end: End) {
        if !matches!(self.state, State::Over(_)) {
            self.state = State::Over(end);
        }
    }

    /// Bytes of data that may go to the guest now.
    pub(super) fn room(&self) -> u32 {
        // A response, and a shutdown that is due, go before data.
        if self.state == State::Established
            && self.opening.is_none()
            && self.guest_receives
            && self.host_sends
        {
            self.to_guest.room()
        } else {
            0
        }
    }

    /// Whether [`Connection::next_control`] has something.
    pub(super) fn has_control(&self) -> bool {
        !matches!(self.state, State::Over(_))
            && (self.opening.is_some()
                || self.untold_shutdown() != 0
                || self.credit_asked
                || self.owes_credit())
    }

    /// What is to be said to the guest next, apart from data. It counts as said.
    pub(super) fn next_control(&mut self) -> Option<Control> {
        if !self.has_control() {
            return None;
        }
        if let Some(op) = self.opening.take() {
            return Some(Control { op, flags: 0 });
        }
        let shutdown = self.untold_shutdown();
        if shutdown != 0 {
            self.told_shutdown |= shutdown;
            return Some(Control {
                op: Op::Shutdown,
                flags: self.told_shutdown,
            });
        }
        self.credit_asked = false;
        Some(Control {
            op: Op::CreditUpdate,
            flags: 0,
        })
    }

    /// Halves that the host has shut and the guest hasn't heard of. Before a response nothing is said: the guest
    /// may still refuse.
    fn untold_shutdown(&self) -> u32 {
        let (sends, receives) = match self.state {
            State::Established => (self.host_sends, self.host_receives),
            State::Closing(_) => (false, false),
            State::Requested(_) | State::Over(_) => (true, true),
        };
        let mut flags = 0;
        if !sends {
            flags |= SHUTDOWN_SEND;
        }
        if !receives {
            flags |= SHUTDOWN_RECEIVE;
        }
        flags & !self.told_shutdown
    }

    fn owes_credit(&self) -> bool {
        self.state == State::Established
            && self.guest_sends
            && self.host_receives
            && self.from_guest.is_stale()
    }

    /// Buffer size and count for the header of a packet that goes to the guest now.
    pub(super) fn tell_credit(&mut self) -> (u32, u32) {
        self.from_guest.tell()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BUFFER: u32 = 1000;

    fn packet(len: u32, flags: u32) -> Header {
        Header {
            len,
            flags,
            buf_alloc: 500,
            ..Header::default()
        }
    }

    fn established(now: Instant) -> Connection {
        let mut connection = Connection::requested(BUFFER, now);
        assert_eq!(
            connection.next_control().map(|control| control.op),
            Some(Op::Request)
        );
        assert!(!connection.on_packet(&packet(0, 0), Op::Response, now));
        connection
    }

    #[test]
    fn a_request_that_is_not_answered_ends_at_its_deadline() {
        let now = Instant::now();
        let mut connection = Connection::requested(BUFFER, now);

        connection.on_deadline(now + REQUEST_TIMEOUT - Duration::from_millis(1));
        assert_eq!(connection.state(), State::Requested(now + REQUEST_TIMEOUT));
        connection.on_deadline(now + REQUEST_TIMEOUT);

        assert_eq!(connection.state(), State::Over(End::Deadline));
        assert!(End::Deadline.wants_reset());
    }

    #[test]
    fn an_established_connection_has_no_deadline() {
        let now = Instant::now();
        let mut connection = established(now);

        connection.on_deadline(now + REQUEST_TIMEOUT * 1000);

        assert_eq!(connection.state(), State::Established);
        assert_eq!(connection.deadline(), None);
    }

    #[test]
    fn a_guest_that_does_not_confirm_the_end_is_cut_off() {
        let now = Instant::now();
        let mut connection = established(now);

        connection.on_host_sent_all(now);
        connection.on_host_stops_receiving(now);
        let leave = connection.next_control();
        connection.on_deadline(now + CLOSE_TIMEOUT);

        let flags = SHUTDOWN_SEND | SHUTDOWN_RECEIVE;
        assert_eq!(
            leave,
            Some(Control {
                op: Op::Shutdown,
                flags
            })
        );
        assert_eq!(connection.state(), State::Over(End::Deadline));
    }

    #[test]
    fn a_host_that_goes_before_the_answer_is_told_after_it() {
        let now = Instant::now();
        let mut connection = Connection::requested(BUFFER, now);
        connection.next_control();

        connection.on_host_sent_all(now);
        connection.on_host_stops_receiving(now);
        let before = connection.next_control();
        connection.on_packet(&packet(0, 0), Op::Response, now);

        assert_eq!(before, None);
        assert_eq!(
            connection.next_control().map(|control| control.op),
            Some(Op::Shutdown)
        );
        assert_eq!(connection.state(), State::Closing(now + CLOSE_TIMEOUT));
    }

    #[test]
    fn data_for_a_host_that_is_gone_is_dropped_and_does_not_fill_the_buffer() {
        let now = Instant::now();
        let mut connection = established(now);
        connection.on_host_stops_receiving(now);

        let wanted = (0..10).any(|_| connection.on_packet(&packet(BUFFER, 0), Op::Data, now));

        assert!(!wanted);
        assert_eq!(connection.state(), State::Established);
    }

    #[test]
    fn credit_that_is_asked_for_is_told_once() {
        let now = Instant::now();
        let mut connection = established(now);

        connection.on_packet(&packet(0, 0), Op::CreditRequest, now);

        let update = Control {
            op: Op::CreditUpdate,
            flags: 0,
        };
        assert_eq!(connection.next_control(), Some(update));
        assert_eq!(connection.next_control(), None);
    }

    /// What can happen to a connection.
    #[derive(Debug, Clone)]
    enum Happening {
        Packet(u16, u32, u32),
        Control,
        Send(u32),
        Forward,
        HostSentAll,
        HostGone,
        Wait(u8),
    }

    fn happening() -> impl Strategy<Value = Happening> {
        prop_oneof![
            4 => (1_u16..8, 0_u32..BUFFER, 0_u32..4).prop_map(|(op, len, flags)| Happening::Packet(op, len, flags)),
            4 => Just(Happening::Control),
            2 => (0_u32..600).prop_map(Happening::Send),
            2 => Just(Happening::Forward),
            1 => Just(Happening::HostSentAll),
            1 => Just(Happening::HostGone),
            1 => (0_u8..15).prop_map(Happening::Wait),
        ]
    }

    proptest! {
        /// Whatever happens in whatever order: what is over stays over and is silent, the first packet is the
        /// request, nothing is sent past a shutdown, no half that was shut is ever open again, and there is a deadline
        /// whenever the guest owes something.
        #[test]
        fn keeps_to_the_protocol(happenings in prop::collection::vec(happening(), 0..60)) {
            let mut now = Instant::now();
            let mut connection = Connection::requested(BUFFER, now);
            let (mut said, mut told) = (0, 0);
            for happening in happenings {
                let before = connection.state();
                match happening {
                    Happening::Packet(op, len, flags) => {
                        let op = Op::from_number(op).unwrap();
                        let wanted = connection.on_packet(&packet(len, flags), op, now);
                        prop_assert!(!wanted || (op == Op::Data && connection.host_receives));
                    }
                    Happening::Control => {
                        let control = connection.next_control();
                        said += usize::from(control.is_some());
                        prop_assert!(said != 1 || control.is_none() || control.unwrap().op == Op::Request);
                        if let Some(Control { op: Op::Shutdown, flags }) = control {
                            prop_assert!(flags != told && flags & told == told);
                            told = flags;
                        }
                    }
                    Happening::Send(count) => {
                        let count = count.min(connection.room());
                        prop_assert!(count == 0 || (told & SHUTDOWN_SEND == 0 && said > 0));
                        connection.on_sent(count);
                    }
                    Happening::Forward => connection.on_forwarded(connection.from_guest.held()),
                    Happening::HostSentAll => connection.on_host_sent_all(now),
                    Happening::HostGone => connection.on_host_stops_receiving(now),
                    Happening::Wait(seconds) => {
                        now += Duration::from_secs(seconds.into());
                        connection.on_deadline(now);
                    }
                }
                let over = |state| matches!(state, State::Over(_));
                prop_assert!(!over(before) || connection.state() == before);
                prop_assert!(!over(connection.state()) || (!connection.has_control() && connection.room() == 0));
                let owed = matches!(connection.state(), State::Requested(_) | State::Closing(_));
                prop_assert_eq!(connection.deadline().is_some(), owed);
            }
        }
    }
}
