//! The header before each packet (Virtio 1.2, section 5.1.6), checked before the host's kernel sees it.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_HDR_F_DATA_VALID, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_NONE,
    VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6, VIRTIO_NET_HDR_GSO_UDP_L4,
};

use super::features;

/// Bytes of the header, for drivers of Virtio 1.0 and later.
pub const SIZE: usize = 12;
/// Bytes of an Ethernet header.
pub const ETHERNET: usize = 14;
/// The longest frame: the largest IP packet, with a VLAN tag.
pub const LONGEST_FRAME: usize = 65_535 + ETHERNET + VLAN_TAG;
pub const VLAN_TAG: usize = 4;
/// Bytes of a checksum.
const CHECKSUM: usize = 2;
/// The shortest segments that Linux's TCP makes; ever shorter ones would multiply one packet by thousands.
const SHORTEST_SEGMENT: u16 = 8;

/// Why a packet of the driver is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    #[error("a frame of {0} bytes")]
    FrameLength(usize),
    #[error("a checksum is asked for, which was not negotiated")]
    ChecksumNotNegotiated,
    #[error("the checksum at {start} + {offset} is not in the frame of {frame} bytes")]
    Checksum {
        start: u16,
        offset: u16,
        frame: usize,
    },
    #[error("segmentation type {0} is not known or was not negotiated")]
    Segmentation(u8),
    #[error("segments of {0} bytes")]
    SegmentSize(u16),
    #[error("segmentation without a checksum")]
    SegmentChecksum,
    #[error("headers of {headers} bytes in a frame of {frame}")]
    HeaderLength { headers: u16, frame: usize },
}

/// The header for the host's kernel, made of one of the driver's: what it asks for, if it may ask for it
/// and it lies in the frame, and nothing else.
pub fn check(driver: [u8; SIZE], frame: usize, negotiated: u64) -> Result<[u8; SIZE], HeaderError> {
    if !(ETHERNET..=LONGEST_FRAME).contains(&frame) {
        return Err(HeaderError::FrameLength(frame));
    }
    let [flags, gso_type, ..] = driver;
    let field = |at: usize| u16::from_le_bytes([driver[at], driver[at + 1]]);
    let (headers, segment, start, offset) = (field(2), field(4), field(6), field(8));

    let mut header = [0; SIZE];
    // Flags that are not known are ignored (section 5.1.6.2.2).
    let checksum = u32::from(flags) & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0;
    if checksum {
        if negotiated & features::CSUM == 0 {
            return Err(HeaderError::ChecksumNotNegotiated);
        }
        if usize::from(start) + usize::from(offset) + CHECKSUM > frame {
            return Err(HeaderError::Checksum {
                start,
                offset,
                frame,
            });
        }
        header[0] = flags & 1;
        header[6..10].copy_from_slice(&driver[6..10]);
    }
    let permission = match u32::from(gso_type) {
        VIRTIO_NET_HDR_GSO_NONE => return Ok(header),
        VIRTIO_NET_HDR_GSO_TCPV4 => features::HOST_TSO4,
        VIRTIO_NET_HDR_GSO_TCPV6 => features::HOST_TSO6,
        VIRTIO_NET_HDR_GSO_UDP_L4 => features::HOST_USO,
        _ => 0,
    };
    if negotiated & permission == 0 {
        return Err(HeaderError::Segmentation(gso_type));
    }
    if !checksum {
        return Err(HeaderError::SegmentChecksum);
    }
    if segment < SHORTEST_SEGMENT {
        return Err(HeaderError::SegmentSize(segment));
    }
    if usize::from(headers) > frame {
        return Err(HeaderError::HeaderLength { headers, frame });
    }
    header[1..6].copy_from_slice(&driver[1..6]);
    Ok(header)
}

/// Makes the header of a packet from the tap one that a driver with these features knows (section 5.1.6.4.1). False
/// if it must not have the packet: one from before the tap was told what the driver takes.
pub fn make_known(header: &mut [u8; SIZE], negotiated: u64) -> bool {
    let [flags, gso_type, ..] = header;
    let needed = match u32::from(*gso_type) {
        VIRTIO_NET_HDR_GSO_NONE => 0,
        VIRTIO_NET_HDR_GSO_TCPV4 => features::GUEST_TSO4,
        VIRTIO_NET_HDR_GSO_TCPV6 => features::GUEST_TSO6,
        VIRTIO_NET_HDR_GSO_UDP_L4 => features::GUEST_USO4 | features::GUEST_USO6,
        _ => return false,
    };
    let checksums = negotiated & features::GUEST_CSUM != 0;
    let unfinished = u32::from(*flags) & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0;
    if negotiated & needed != needed || (unfinished && !checksums) {
        return false;
    }
    let known = VIRTIO_NET_HDR_F_NEEDS_CSUM | VIRTIO_NET_HDR_F_DATA_VALID;
    *flags &= if checksums { known.to_le_bytes()[0] } else { 0 };
    true
}

/// Says over how many buffers a packet for the driver is spread.
pub fn set_buffers(header: &mut [u8; SIZE], buffers: u16) {
    header[10..].copy_from_slice(&buffers.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALL: u64 =
        features::CSUM | features::HOST_TSO4 | features::HOST_TSO6 | features::HOST_USO;

    /// Flags, type, length of the headers, segment size, checksum's start and offset.
    fn header(flags: u8, gso_type: u8, rest: [u16; 4]) -> [u8; SIZE] {
        let mut header = [0xff; SIZE];
        header[0] = flags;
        header[1] = gso_type;
        header[2..10].copy_from_slice(rest.map(u16::to_le_bytes).as_flattened());
        header
    }

    #[test]
    fn what_is_asked_for_rightly_is_passed_on() {
        let driver = header(1, 1, [54, 1448, 34, 16]);

        let passed = check(driver, 4000, ALL).unwrap();

        assert_eq!(passed[..10], driver[..10]);
        assert_eq!(passed[10..], [0, 0]);
    }

    #[test]
    fn nothing_is_passed_on_that_is_not_asked_for() {
        // All flags but that for a checksum.
        let driver = header(0xfe, 0, [0xffff; 4]);

        assert_eq!(check(driver, 60, ALL), Ok([0; SIZE]));
    }

    /// threats.md, DPDK CVE-2024-11614: the checksum's place lay outside of the packet.
    #[test]
    fn cve_2024_11614_a_checksum_outside_the_frame_is_refused() {
        let outside = [
            (34, 25),
            (59, 0),
            (60, 0),
            (0, 59),
            (0xffff, 0xffff),
            (0, 0xffff),
        ];

        let results =
            outside.map(|(start, offset)| check(header(1, 0, [0, 0, start, offset]), 60, ALL));

        let expected = outside.map(|(start, offset)| {
            Err(HeaderError::Checksum {
                start,
                offset,
                frame: 60,
            })
        });
        assert_eq!(results, expected);
        assert!(check(header(1, 0, [0, 0, 34, 24]), 60, ALL).is_ok());
    }

    #[test]
    fn segmentation_is_refused_where_it_makes_no_sense() {
        let sizes = [54, 1448, 34, 16];

        assert_eq!(
            check(header(1, 3, sizes), 4000, ALL),
            Err(HeaderError::Segmentation(3))
        );
        assert_eq!(
            check(header(1, 0x81, sizes), 4000, ALL),
            Err(HeaderError::Segmentation(0x81))
        );
        assert_eq!(
            check(header(0, 1, sizes), 4000, ALL),
            Err(HeaderError::SegmentChecksum)
        );
        assert_eq!(
            check(header(1, 4, [54, 7, 34, 16]), 4000, ALL),
            Err(HeaderError::SegmentSize(7))
        );
        assert_eq!(
            check(header(1, 5, [4001, 1448, 34, 16]), 4000, ALL),
            Err(HeaderError::HeaderLength {
                headers: 4001,
                frame: 4000
            })
        );
    }

    #[test]
    fn what_was_not_negotiated_is_refused() {
        let driver = header(1, 1, [54, 1448, 34, 16]);

        assert_eq!(
            check(driver, 4000, 0),
            Err(HeaderError::ChecksumNotNegotiated)
        );
        assert_eq!(
            check(driver, 4000, features::CSUM | features::HOST_TSO6),
            Err(HeaderError::Segmentation(1))
        );
    }

    #[test]
    fn frames_of_impossible_lengths_are_refused() {
        let lengths = [0, 13, LONGEST_FRAME + 1, usize::MAX];

        let results = lengths.map(|length| check([0; SIZE], length, ALL));

        assert_eq!(
            results,
            lengths.map(|length| Err(HeaderError::FrameLength(length)))
        );
    }

    #[test]
    fn a_driver_gets_only_what_it_takes() {
        let sizes = [54, 1448, 34, 16];
        let known = |flags, gso_type, negotiated| {
            let mut header = header(flags, gso_type, sizes);
            make_known(&mut header, negotiated).then_some(header[0])
        };
        let checksums = features::GUEST_CSUM;

        assert_eq!(known(1, 1, checksums | features::GUEST_TSO4), Some(1));
        assert_eq!(known(1, 1, checksums | features::GUEST_TSO6), None);
        assert_eq!(known(1, 1, features::GUEST_TSO4), None);
        assert_eq!(known(1, 5, checksums | features::GUEST_USO4), None);
        assert_eq!(known(1, 5, checksums | features::UDP_SEGMENTATION), Some(1));
        assert_eq!(known(1, 0x81, u64::MAX), None);
        assert_eq!(known(0xfe, 0, checksums), Some(2));
        assert_eq!(known(2, 0, 0), Some(0));
    }

    proptest! {
        /// threats.md, DPDK CVE-2024-11614, for any header: what passes lies in the frame.
        #[test]
        fn cve_2024_11614_no_header_passes_that_reaches_outside_its_frame(
            driver in any::<[u8; SIZE]>(),
            asked in prop::sample::select(vec![0_u8, 1, 4, 5]),
            frame in prop_oneof![0..200_usize, 0..70_000_usize],
        ) {
            let mut driver = driver;
            driver[1] = asked;

            if let Ok(passed) = check(driver, frame, ALL) {
                let field = |at: usize| usize::from(u16::from_le_bytes([passed[at], passed[at + 1]]));
                prop_assert!(passed[0] <= 1);
                prop_assert!(field(6) + field(8) <= frame);
                prop_assert!(field(2) <= frame);
                prop_assert!(passed[1] == 0 || (passed[0] == 1 && field(4) >= 8));
            }
        }
    }
}
