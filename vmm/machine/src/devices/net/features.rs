//! Feature bits (Virtio 1.2, section 5.1.3), and what they ask of a tap.

use virtio_bindings::virtio_net as bits;

pub const CSUM: u64 = 1 << bits::VIRTIO_NET_F_CSUM;
pub const GUEST_CSUM: u64 = 1 << bits::VIRTIO_NET_F_GUEST_CSUM;
pub const MTU: u64 = 1 << bits::VIRTIO_NET_F_MTU;
pub const MAC: u64 = 1 << bits::VIRTIO_NET_F_MAC;
pub const GUEST_TSO4: u64 = 1 << bits::VIRTIO_NET_F_GUEST_TSO4;
pub const GUEST_TSO6: u64 = 1 << bits::VIRTIO_NET_F_GUEST_TSO6;
pub const HOST_TSO4: u64 = 1 << bits::VIRTIO_NET_F_HOST_TSO4;
pub const HOST_TSO6: u64 = 1 << bits::VIRTIO_NET_F_HOST_TSO6;
pub const MRG_RXBUF: u64 = 1 << bits::VIRTIO_NET_F_MRG_RXBUF;
pub const STATUS: u64 = 1 << bits::VIRTIO_NET_F_STATUS;
pub const CTRL_VQ: u64 = 1 << bits::VIRTIO_NET_F_CTRL_VQ;
pub const MQ: u64 = 1 << bits::VIRTIO_NET_F_MQ;
pub const CTRL_MAC_ADDR: u64 = 1 << bits::VIRTIO_NET_F_CTRL_MAC_ADDR;
pub const GUEST_USO4: u64 = 1 << bits::VIRTIO_NET_F_GUEST_USO4;
pub const GUEST_USO6: u64 = 1 << bits::VIRTIO_NET_F_GUEST_USO6;
pub const HOST_USO: u64 = 1 << bits::VIRTIO_NET_F_HOST_USO;

/// What every tap can do.
pub const ALWAYS: u64 = CSUM
    | GUEST_CSUM
    | MTU
    | MAC
    | GUEST_TSO4
    | GUEST_TSO6
    | HOST_TSO4
    | HOST_TSO6
    | MRG_RXBUF
    | STATUS
    | CTRL_VQ
    | CTRL_MAC_ADDR;
/// What taps can do since Linux 6.2.
pub const UDP_SEGMENTATION: u64 = GUEST_USO4 | GUEST_USO6 | HOST_USO;

/// `TUN_F_*` of linux/if_tun.h.
pub const TUN_CSUM: u32 = 0x01;
const TUN_TSO4: u32 = 0x02;
const TUN_TSO6: u32 = 0x04;
pub const TUN_USO: u32 = 0x20 | 0x40;

/// What the tap may leave to the driver, by what that has negotiated.
pub fn tun_offload(negotiated: u64) -> u32 {
    let has = |feature| negotiated & feature == feature;
    // Without checksums a tap takes none of the others (section 5.1.3.1 has them depend, too).
    if !has(GUEST_CSUM) {
        return 0;
    }
    [
        (GUEST_TSO4, TUN_TSO4),
        (GUEST_TSO6, TUN_TSO6),
        // Only both together.
        (GUEST_USO4 | GUEST_USO6, TUN_USO),
    ]
    .into_iter()
    .filter(|(feature, _)| has(*feature))
    .fold(TUN_CSUM, |flags, (_, flag)| flags | flag)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tap_is_asked_for_what_was_negotiated() {
        assert_eq!(tun_offload(ALWAYS | UDP_SEGMENTATION), 0x67);
        assert_eq!(tun_offload(ALWAYS), 0x07);
        assert_eq!(tun_offload(GUEST_CSUM | GUEST_USO4), 0x01);
        assert_eq!(tun_offload(GUEST_TSO4 | GUEST_TSO6 | UDP_SEGMENTATION), 0);
    }
}
