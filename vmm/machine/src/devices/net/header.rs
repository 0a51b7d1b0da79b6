//! The header before each packet (`struct virtio_net_hdr_v1`; Virtio 1.2, section 5.1.6).
//!
//! The kernel's tap has the same one, so it is handed on, once what it says is known to be true of the packet.

/// Bytes of a header.
pub(super) const HEADER_SIZE: usize = 12;
/// Bytes of the longest packet with its header: 64 KiB of IP packet, and Ethernet's header (section 5.1.6.3.1).
pub(super) const MOST_BYTES: usize = 65_562;
/// Bytes of Ethernet's header, and so of the shortest packet that a tap takes.
pub(super) const LEAST_FRAME: usize = 14;

/// Feature bits (section 5.1.3).
pub(super) const F_CSUM: u64 = 1;
pub(super) const F_GUEST_CSUM: u64 = 1 << 1;
pub(super) const F_GUEST_TSO4: u64 = 1 << 7;
pub(super) const F_GUEST_TSO6: u64 = 1 << 8;
pub(super) const F_HOST_TSO4: u64 = 1 << 11;
pub(super) const F_HOST_TSO6: u64 = 1 << 12;
pub(super) const F_MRG_RXBUF: u64 = 1 << 15;

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM` and `VIRTIO_NET_HDR_F_DATA_VALID`.
const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;
/// `VIRTIO_NET_HDR_GSO_NONE`, `_TCPV4`, `_TCPV6`.
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
/// The shortest segments that Linux's TCP makes; ever shorter ones would multiply one packet by thousands.
const LEAST_SEGMENT: u16 = 8;

/// A header, field by field.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Header {
    pub flags: u8,
    pub gso_type: u8,
    /// Bytes of the packet's headers: a hint.
    pub hdr_len: u16,
    /// Bytes of a segment's data.
    pub gso_size: u16,
    /// Where the part that the checksum covers starts.
    pub csum_start: u16,
    /// Where the checksum goes, from there.
    pub csum_offset: u16,
    /// Over how many buffers a received packet is spread.
    pub num_buffers: u16,
}

impl Header {
    pub(super) fn from_bytes(bytes: [u8; HEADER_SIZE]) -> Self {
        let [flags, gso_type, words @ ..] = bytes;
        let word = |place: usize| u16::from_le_bytes([words[2 * place], words[2 * place + 1]]);
        Self {
            flags,
            gso_type,
            hdr_len: word(0),
            gso_size: word(1),
            csum_start: word(2),
            csum_offset: word(3),
            num_buffers: word(4),
        }
    }

    pub(super) fn to_bytes(self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        bytes[0] = self.flags;
        bytes[1] = self.gso_type;
        let words = [
            self.hdr_len,
            self.gso_size,
            self.csum_start,
            self.csum_offset,
            self.num_buffers,
        ];
        for (to, word) in bytes[2..].chunks_exact_mut(2).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// The header to give to the tap for a packet of the driver's of `frame` bytes, if it is a good one
    /// (section 5.1.6.2).
    pub(super) fn sent(self, frame: usize, features: u64) -> Option<Self> {
        if frame < LEAST_FRAME || usize::from(self.hdr_len) > frame {
            return None;
        }
        let mut header = Self {
            hdr_len: self.hdr_len,
            ..Self::default()
        };
        // Flags that a driver has no business to set are not looked at.
        if self.flags & NEEDS_CSUM != 0 {
            let end = usize::from(self.csum_start) + usize::from(self.csum_offset) + 2;
            if features & F_CSUM == 0 || end > frame {
                return None;
            }
            header.flags = NEEDS_CSUM;
            header.csum_start = self.csum_start;
            header.csum_offset = self.csum_offset;
        }
        if self.gso_type != GSO_NONE {
            let feature = match self.gso_type {
                GSO_TCPV4 => F_HOST_TSO4,
                GSO_TCPV6 => F_HOST_TSO6,
                _ => return None,
            };
            let checksummed = header.flags & NEEDS_CSUM != 0;
            if features & feature == 0 || !checksummed || self.gso_size < LEAST_SEGMENT {
                return None;
            }
            header.gso_type = self.gso_type;
            header.gso_size = self.gso_size;
        }
        Some(header)
    }

    /// The header to give to the driver for a packet from the tap over so many buffers, if the driver can have it
    /// (section 5.1.6.4.1). One that it can't is from before the tap was told what the driver takes.
    pub(super) fn received(self, num_buffers: u16, features: u64) -> Option<Self> {
        let needed = match self.gso_type {
            GSO_NONE => 0,
            GSO_TCPV4 => F_GUEST_TSO4,
            GSO_TCPV6 => F_GUEST_TSO6,
            _ => return None,
        };
        let checksums = features & F_GUEST_CSUM != 0;
        if features & needed != needed || (self.flags & NEEDS_CSUM != 0 && !checksums) {
            return None;
        }
        let known = if checksums {
            NEEDS_CSUM | DATA_VALID
        } else {
            0
        };
        Some(Self {
            flags: self.flags & known,
            num_buffers,
            ..self
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALL: u64 = u64::MAX;

    /// A segmented packet as Linux sends it.
    fn segmented() -> Header {
        Header {
            flags: NEEDS_CSUM,
            gso_type: GSO_TCPV4,
            hdr_len: 54,
            gso_size: 1448,
            csum_start: 34,
            csum_offset: 16,
            num_buffers: 0,
        }
    }

    #[test]
    fn bytes_are_those_of_the_specification() {
        let bytes = [1, 4, 0x36, 0, 0xa8, 5, 0x22, 0, 0x10, 0, 2, 1];

        let header = Header::from_bytes(bytes);

        assert_eq!(
            header,
            Header {
                gso_type: GSO_TCPV6,
                num_buffers: 0x102,
                ..segmented()
            }
        );
        assert_eq!(header.to_bytes(), bytes);
    }

    #[test]
    fn a_good_packet_goes_on_as_it_is() {
        assert_eq!(segmented().sent(4000, ALL), Some(segmented()));
    }

    #[test]
    fn what_the_driver_has_no_say_in_is_cleared() {
        let odd = Header {
            flags: 0xfe,
            gso_size: 7,
            csum_start: 9,
            csum_offset: 9,
            num_buffers: 9,
            ..Header::default()
        };

        assert_eq!(odd.sent(60, ALL), Some(Header::default()));
    }

    #[test]
    fn segmentation_must_be_known_negotiated_and_checksummed() {
        let bad = [
            Header {
                gso_type: 3,
                ..segmented()
            },
            Header {
                gso_type: 0x81,
                ..segmented()
            },
            Header {
                gso_size: 0,
                ..segmented()
            },
            Header {
                flags: 0,
                ..segmented()
            },
        ];

        assert_eq!(bad.map(|header| header.sent(4000, ALL)), [None; 4]);
        assert_eq!(segmented().sent(4000, F_CSUM | F_HOST_TSO6), None);
        assert_eq!(segmented().sent(4000, F_HOST_TSO4), None);
    }

    /// DPDK's CVE-2024-11614: the place of a checksum was taken from the guest unchecked.
    #[test]
    fn cve_2024_11614_a_checksum_outside_the_packet_is_refused() {
        let at = |csum_start, csum_offset| Header {
            flags: NEEDS_CSUM,
            csum_start,
            csum_offset,
            ..Header::default()
        };

        assert!(at(34, 16).sent(52, ALL).is_some());
        for (start, offset) in [(34, 17), (35, 16), (51, 0), (u16::MAX, u16::MAX), (0, 51)] {
            assert_eq!(at(start, offset).sent(52, ALL), None, "{start} {offset}");
        }
    }

    #[test]
    fn headers_longer_than_the_packet_are_refused() {
        assert_eq!(segmented().sent(53, ALL), None);
        assert_eq!(Header::default().sent(LEAST_FRAME - 1, ALL), None);
    }

    #[test]
    fn a_driver_gets_only_what_it_takes() {
        let valid = Header {
            flags: DATA_VALID,
            ..Header::default()
        };

        assert_eq!(segmented().received(1, F_GUEST_CSUM | F_GUEST_TSO6), None);
        assert_eq!(segmented().received(1, F_GUEST_TSO4), None);
        assert_eq!(valid.received(1, 0).map(|header| header.flags), Some(0));
        assert_eq!(
            segmented().received(3, F_GUEST_CSUM | F_GUEST_TSO4),
            Some(Header {
                num_buffers: 3,
                ..segmented()
            })
        );
    }

    proptest! {
        #[test]
        fn what_reaches_the_tap_is_true_of_the_packet(
            bytes: [u8; HEADER_SIZE], frame in 0..MOST_BYTES, features: u64,
        ) {
            let header = Header::from_bytes(bytes);

            if let Some(sent) = header.sent(frame, features) {
                let checksum = usize::from(sent.csum_start) + usize::from(sent.csum_offset) + 2;
                prop_assert!(sent.flags <= NEEDS_CSUM);
                prop_assert!(checksum <= frame.max(2));
                prop_assert!(usize::from(sent.hdr_len) <= frame);
                prop_assert!(sent.gso_type == GSO_NONE || sent.gso_size >= LEAST_SEGMENT);
            }
        }
    }
}
