//! How much each side may send (Virtio 1.2, section 5.10.6.3).
//!
//! Both sides count, modulo 2³², the bytes that they received and have passed on, and tell it with the size of
//! their buffer in every packet. What was sent and not yet passed on must fit into the receiver's buffer.

/// What the host may send to the guest.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct ToGuest {
    sent: u32,
    /// The guest's buffer, and what it has passed on, as it said last.
    guest_buffer: u32,
    guest_forwarded: u32,
}

impl ToGuest {
    /// The guest says how it stands, as it does in every packet.
    pub(super) fn told(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.guest_buffer = buf_alloc;
        self.guest_forwarded = fwd_cnt;
    }

    /// Bytes that may be sent now. None if the guest claims to have passed on what it never got, or
    /// has shrunk its buffer below what is on its way.
    pub(super) fn room(&self) -> u32 {
        let on_its_way = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_buffer.saturating_sub(on_its_way)
    }

    /// `count` bytes, no more than there was room for, have been sent.
    pub(super) fn sent(&mut self, count: u32) {
        self.sent = self.sent.wrapping_add(count);
    }
}

/// What the guest may send to the host.
#[derive(Debug, Clone, Copy)]
pub(super) struct FromGuest {
    buffer: u32,
    received: u32,
    forwarded: u32,
    /// What the guest knows of `forwarded`.
    told: u32,
}

impl FromGuest {
    /// With a buffer of so many bytes, below 2³¹.
    pub(super) fn new(buffer: u32) -> Self {
        Self {
            buffer,
            received: 0,
            forwarded: 0,
            told: 0,
        }
    }

    /// Bytes that are in the buffer.
    pub(super) fn held(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }

    /// Takes in `count` bytes. Returns whether the guest was allowed to send them; if not, nothing changes.
    #[must_use]
    pub(super) fn receive(&mut self, count: u32) -> bool {
        let allowed = count <= self.buffer - self.held();
        if allowed {
            self.received = self.received.wrapping_add(count);
        }
        allowed
    }

    /// `count` of the bytes held have been passed on.
    pub(super) fn forward(&mut self, count: u32) {
        debug_assert!(count <= self.held(), "more passed on than was received");
        self.forwarded = self.forwarded.wrapping_add(count.min(self.held()));
    }

    /// Buffer size and count for the next packet to the guest, which knows them from then on.
    pub(super) fn tell(&mut self) -> (u32, u32) {
        self.told = self.forwarded;
        (self.buffer, self.forwarded)
    }

    /// The guest thinks that half of the buffer or more is full, and it is not: time to say so.
    pub(super) fn is_stale(&self) -> bool {
        self.forwarded.wrapping_sub(self.told) >= self.buffer / 2
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever the counters, what is on its way never exceeds the guest's buffer by our sending.
        #[test]
        fn never_sends_more_than_the_guest_has_room_for(
            start: u32,
            buffer: u32,
            steps in prop::collection::vec((any::<u32>(), any::<u32>()), 0..50),
        ) {
            let mut credit = ToGuest { sent: start, guest_buffer: buffer, guest_forwarded: start };
            let mut on_its_way = 0_u64;
            for (send, forward) in steps {
                let send = send.min(credit.room());
                credit.sent(send);
                on_its_way += u64::from(send);
                prop_assert!(on_its_way <= u64::from(buffer));
                let forward = u64::from(forward).min(on_its_way);
                on_its_way -= forward;
                let forwarded = credit.guest_forwarded.wrapping_add(u32::try_from(forward).unwrap());
                credit.told(buffer, forwarded);
                prop_assert_eq!(u64::from(credit.room()), u64::from(buffer) - on_its_way);
            }
        }

        /// A guest that says it passed on more than it was sent gains nothing.
        #[test]
        fn a_lie_about_forwarding_gives_no_room_beyond_the_buffer(
            sent: u32, buffer: u32, forwarded: u32,
        ) {
            let mut credit = ToGuest { sent, ..ToGuest::default() };

            credit.told(buffer, forwarded);

            prop_assert!(credit.room() <= buffer);
        }

        /// What is held never exceeds the buffer, over any number of wrap-arounds, and what a guest that keeps
        /// to what it was told sends is always accepted.
        #[test]
        fn holds_at_most_its_buffer(
            start: u32,
            buffer in 1_u32..(1 << 31),
            steps in prop::collection::vec((any::<u32>(), any::<u32>(), any::<bool>()), 0..50),
        ) {
            let mut credit = FromGuest { buffer, received: start, forwarded: start, told: start };
            let (mut sent, mut knows) = (start, start);
            for (send, forward, tell) in steps {
                let allowed = buffer - sent.wrapping_sub(knows);
                let send = send.min(allowed);
                prop_assert!(credit.receive(send));
                sent = sent.wrapping_add(send);
                prop_assert!(credit.held() <= buffer);
                credit.forward(forward.min(credit.held()));
                if tell {
                    knows = credit.tell().1;
                    prop_assert!(!credit.is_stale());
                }
            }
        }

        /// One byte more than there is room for is refused, and changes nothing.
        #[test]
        fn refuses_more_than_its_buffer(start: u32, buffer in 1_u32..(1 << 31), held: u32) {
            let held = held % (buffer + 1);
            let mut credit = FromGuest { buffer, received: start.wrapping_add(held), forwarded: start, told: start };

            prop_assert!(!credit.receive(buffer - held + 1));
            prop_assert_eq!(credit.held(), held);
            prop_assert!(credit.receive(buffer - held));
        }
    }

    #[test]
    fn half_a_buffer_passed_on_is_worth_telling() {
        let mut credit = FromGuest::new(100);
        assert!(credit.receive(100));

        credit.forward(49);
        assert!(!credit.is_stale());
        credit.forward(1);

        assert!(credit.is_stale());
        assert_eq!(credit.tell(), (100, 50));
        assert!(!credit.is_stale());
    }
}
