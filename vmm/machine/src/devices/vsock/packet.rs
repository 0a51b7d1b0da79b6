//! Packets of virtio-vsock (Virtio 1.2, section 5.10.6) as they lie in the guest's buffers.
//!
//! Drivers put header and data into one descriptor or into many, so a packet is a list of slices. (The parser of
//! the `virtio-vsock` crate takes two at most, which Linux exceeds since 6.7 when a program sends without copying.)

use vm_memory::{ByteValued, GuestMemory, Le16, Le32, Le64, VolatileSlice};

use crate::memory::GuestRam;

use virtio_queue::DescriptorChain;

/// Context id of the host (section 5.10.4).
pub(super) const HOST_CID: u64 = 2;
/// Stream sockets, the only type here (section 5.10.6).
pub(super) const TYPE_STREAM: u16 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`: the sender receives no more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_F_SEND`: the sender sends no more.
pub(super) const SHUTDOWN_SEND: u32 = 2;

/// Most slices of one packet. Linux needs 1 + `MAX_SKB_FRAGS` (up to 46); the kernel takes 1024 in one call.
const MAX_SLICES: usize = 128;

/// What a packet is for (section 5.10.6, `VIRTIO_VSOCK_OP_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Op {
    Request = 1,
    Response = 2,
    Reset = 3,
    Shutdown = 4,
    Data = 5,
    CreditUpdate = 6,
    CreditRequest = 7,
}

impl Op {
    pub(super) fn from_number(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// `struct virtio_vsock_hdr`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C, packed)]
struct RawHeader {
    src_cid: Le64,
    dst_cid: Le64,
    src_port: Le32,
    dst_port: Le32,
    len: Le32,
    kind: Le16,
    op: Le16,
    flags: Le32,
    buf_alloc: Le32,
    fwd_cnt: Le32,
}

// SAFETY: plain integers without padding, any bytes are a value.
unsafe impl ByteValued for RawHeader {}

/// Size of a header in memory.
pub(super) const HEADER_SIZE: usize = size_of::<RawHeader>();

/// A header, in the host's byte order.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

impl Header {
    pub(super) fn from_bytes(bytes: &[u8; HEADER_SIZE]) -> Self {
        let mut raw = RawHeader::default();
        raw.as_mut_slice().copy_from_slice(bytes);
        Self {
            src_cid: raw.src_cid.into(),
            dst_cid: raw.dst_cid.into(),
            src_port: raw.src_port.into(),
            dst_port: raw.dst_port.into(),
            len: raw.len.into(),
            kind: raw.kind.into(),
            op: raw.op.into(),
            flags: raw.flags.into(),
            buf_alloc: raw.buf_alloc.into(),
            fwd_cnt: raw.fwd_cnt.into(),
        }
    }

    pub(super) fn to_bytes(self) -> [u8; HEADER_SIZE] {
        let raw = RawHeader {
            src_cid: self.src_cid.into(),
            dst_cid: self.dst_cid.into(),
            src_port: self.src_port.into(),
            dst_port: self.dst_port.into(),
            len: self.len.into(),
            kind: self.kind.into(),
            op: self.op.into(),
            flags: self.flags.into(),
            buf_alloc: self.buf_alloc.into(),
            fwd_cnt: self.fwd_cnt.into(),
        };
        let mut bytes = [0; HEADER_SIZE];
        bytes.copy_from_slice(raw.as_slice());
        bytes
    }
}

/// The memory of one packet: all of a descriptor chain.
#[derive(Debug)]
pub(super) struct Buffer<'a> {
    slices: Vec<VolatileSlice<'a>>,
}

impl<'a> Buffer<'a> {
    /// Resolves a chain whose descriptors are all for reading, or all for writing. `None` if it is not one in RAM
    /// with room for a header.
    pub(super) fn new(
        memory: &'a GuestRam,
        chain: DescriptorChain<&'a GuestRam>,
        writable: bool,
    ) -> Option<Self> {
        let mut slices = Vec::with_capacity(2);
        let mut length = 0_usize;
        for descriptor in chain {
            if descriptor.is_write_only() != writable || slices.len() == MAX_SLICES {
                return None;
            }
            let size = usize::try_from(descriptor.len()).ok()?;
            length = length.checked_add(size)?;
            if size > 0 {
                slices.push(memory.get_slice(descriptor.addr(), size).ok()?);
            }
        }
        (length >= HEADER_SIZE).then_some(Self { slices })
    }

    /// Reads the header, once, and leaves the data.
    pub(super) fn take_header(self) -> Option<(Header, Vec<VolatileSlice<'a>>)> {
        let (head, data) = self.split()?;
        let mut bytes = [0; HEADER_SIZE];
        let mut rest = bytes.as_mut_slice();
        for slice in head {
            let (part, tail) = rest.split_at_mut(slice.len());
            slice.copy_to(part);
            rest = tail;
        }
        Some((Header::from_bytes(&bytes), data))
    }

    /// The places for a header, and for data.
    pub(super) fn split(self) -> Option<(Vec<VolatileSlice<'a>>, Vec<VolatileSlice<'a>>)> {
        let (mut head, mut data) = (Vec::with_capacity(1), Vec::with_capacity(self.slices.len()));
        let mut missing = HEADER_SIZE;
        for slice in self.slices {
            let cut = missing.min(slice.len());
            if cut > 0 {
                head.push(slice.subslice(0, cut).ok()?);
            }
            if cut < slice.len() {
                data.push(slice.offset(cut).ok()?);
            }
            missing -= cut;
        }
        Some((head, data))
    }
}

/// Writes a header to its place.
pub(super) fn write_header(place: &[VolatileSlice<'_>], header: Header) {
    let bytes = header.to_bytes();
    let mut rest = bytes.as_slice();
    for slice in place {
        let (part, tail) = rest.split_at(slice.len().min(rest.len()));
        slice.copy_from(part);
        rest = tail;
    }
}

/// Bytes in some slices.
pub(super) fn total(slices: &[VolatileSlice<'_>]) -> usize {
    slices.iter().map(VolatileSlice::len).sum()
}

/// Cuts slices to `length` bytes, at most what they have.
pub(super) fn truncate(slices: &mut Vec<VolatileSlice<'_>>, length: usize) {
    let mut left = length;
    slices.retain_mut(|slice| {
        let keep = left.min(slice.len());
        left -= keep;
        match slice.subslice(0, keep) {
            Ok(cut) if keep > 0 => {
                *slice = cut;
                true
            }
            _ => false,
        }
    });
}
