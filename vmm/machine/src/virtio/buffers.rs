//! The memory that a descriptor chain names, resolved once and checked.
//!
//! Every buffer is in RAM, in one piece, and device-readable ones stand before
//! device-writable ones. The descriptors are not looked at again afterwards, so a
//! driver that changes them meanwhile changes nothing.

use std::collections::VecDeque;
use std::ops::Deref;

use virtio_queue::DescriptorChain;
use vm_memory::{GuestAddress, GuestMemory, VolatileSlice};

use crate::memory::GuestRam;

/// What is wrong with a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    #[error("the chain has no descriptors, or a loop, or a bad indirect table")]
    Broken,
    #[error("the chain has more than {0} descriptors")]
    TooLong(usize),
    #[error("a device-readable descriptor follows a device-writable one")]
    Order,
    #[error("the {len} bytes at {address:#x} are not in RAM")]
    Outside { address: u64, len: u32 },
}

/// The buffers of a request.
#[derive(Debug)]
pub struct Buffers<'m> {
    /// What the driver says.
    pub readable: Span<'m>,
    /// Where the device answers.
    pub writable: Span<'m>,
}

impl<'m> Buffers<'m> {
    /// Resolves a chain of at most `most` descriptors.
    ///
    /// # Errors
    /// When the chain is malformed; nothing of it should be used then.
    pub fn resolve<M>(
        memory: &'m GuestRam,
        mut chain: DescriptorChain<M>,
        most: usize,
    ) -> Result<Self, ChainError>
    where
        M: Deref,
        M::Target: GuestMemory,
    {
        let mut readable = VecDeque::new();
        let mut writable = VecDeque::new();
        // The iterator ends silently where it can't go on; the last descriptor tells.
        let mut complete = false;
        for (count, descriptor) in chain.by_ref().enumerate() {
            if count >= most {
                return Err(ChainError::TooLong(most));
            }
            complete = !descriptor.has_next();
            let list = if descriptor.is_write_only() {
                &mut writable
            } else if writable.is_empty() {
                &mut readable
            } else {
                return Err(ChainError::Order);
            };
            let (address, len) = (descriptor.addr(), descriptor.len());
            // Nothing at an address needs no check, and is no reason to refuse the rest.
            if len > 0 {
                list.push_back(slice(memory, address, len)?);
            }
        }
        if complete {
            Ok(Self {
                readable: Span(readable),
                writable: Span(writable),
            })
        } else {
            Err(ChainError::Broken)
        }
    }
}

fn slice(
    memory: &GuestRam,
    address: GuestAddress,
    len: u32,
) -> Result<VolatileSlice<'_>, ChainError> {
    let outside = ChainError::Outside {
        address: address.0,
        len,
    };
    let length = usize::try_from(len).map_err(|_| outside)?;
    memory.get_slice(address, length).map_err(|_| outside)
}

/// Pieces of guest memory, as one run of bytes.
#[derive(Debug, Default)]
pub struct Span<'m>(VecDeque<VolatileSlice<'m>>);

impl<'m> Span<'m> {
    /// Bytes in all; a chain has less than 2^32.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.iter().map(VolatileSlice::len).sum()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The pieces, none of them empty.
    pub fn pieces(&self) -> impl Iterator<Item = &VolatileSlice<'m>> {
        self.0.iter()
    }

    /// Takes the first `count` bytes off, or nothing and `None` if there are less.
    pub fn take_front(&mut self, count: usize) -> Option<Span<'m>> {
        if self.len() < count {
            return None;
        }
        let mut taken = VecDeque::new();
        let mut wanted = count;
        while wanted > 0 {
            let piece = self.0.pop_front()?;
            if piece.len() <= wanted {
                wanted -= piece.len();
                taken.push_back(piece);
            } else {
                let (head, tail) = piece.split_at(wanted).ok()?;
                taken.push_back(head);
                self.0.push_front(tail);
                wanted = 0;
            }
        }
        Some(Span(taken))
    }

    /// Takes the last `count` bytes off, or nothing and `None` if there are less.
    pub fn take_back(&mut self, count: usize) -> Option<Span<'m>> {
        let front = self.take_front(self.len().checked_sub(count)?)?;
        Some(std::mem::replace(self, front))
    }

    /// Copies to `data` what fits, and returns how much that was.
    pub fn copy_to(&self, data: &mut [u8]) -> usize {
        let mut done = 0;
        for piece in &self.0 {
            done += piece.copy_to(&mut data[done..]);
        }
        done
    }

    /// Copies from `data` what fits, and returns how much that was.
    pub fn copy_from(&self, data: &[u8]) -> usize {
        let mut done = 0;
        for piece in &self.0 {
            let part = &data[done..data.len().min(done + piece.len())];
            piece.copy_from(part);
            done += part.len();
        }
        done
    }

    /// An array of the first bytes, taken off; `None` if there are less.
    pub fn take_array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        self.take_front(N)?.copy_to(&mut bytes);
        Some(bytes)
    }
}

#[cfg(test)]
mod tests {
    use virtio_queue::desc::{RawDescriptor, split::Descriptor};
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::Bytes;

    use super::*;

    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const INDIRECT: u16 = 4;

    /// Two megabytes, a hole of one, another megabyte.
    fn memory() -> GuestRam {
        crate::memory::from_ranges(&[
            (GuestAddress(0), 0x20_0000),
            (GuestAddress(0x30_0000), 0x10_0000),
        ])
        .unwrap()
    }

    fn descriptor(address: u64, len: u32, flags: u16, next: u16) -> RawDescriptor {
        RawDescriptor::from(Descriptor::new(address, len, flags, next))
    }

    /// Readable and writable bytes of a chain, or what is wrong with it.
    fn resolve(descriptors: &[RawDescriptor]) -> Result<(usize, usize), ChainError> {
        let memory = memory();
        let mock = MockSplitQueue::new(&memory, 16);
        let chain = mock.build_desc_chain(descriptors).unwrap();
        Buffers::resolve(&memory, chain, 8)
            .map(|buffers| (buffers.readable.len(), buffers.writable.len()))
    }

    /// The same, without the mock's own linking of the descriptors.
    fn resolve_raw(descriptors: &[RawDescriptor]) -> Result<(usize, usize), ChainError> {
        let memory = memory();
        let mock = MockSplitQueue::new(&memory, 16);
        for (index, descriptor) in (0..).zip(descriptors) {
            mock.desc_table().store(index, *descriptor).unwrap();
        }
        mock.avail().ring().ref_at(0).unwrap().store(0u16.to_le());
        mock.avail().idx().store(1u16.to_le());
        let mut queue: virtio_queue::Queue = mock.create_queue().unwrap();
        let chain = virtio_queue::QueueOwnedT::iter(&mut queue, &memory)
            .unwrap()
            .next()
            .unwrap();
        Buffers::resolve(&memory, chain, 8)
            .map(|buffers| (buffers.readable.len(), buffers.writable.len()))
    }

    #[test]
    fn a_good_chain_is_split_by_direction() {
        let result = resolve(&[
            descriptor(0x10_0000, 16, 0, 0),
            descriptor(0x10_1000, 512, WRITE, 0),
            descriptor(0x10_2000, 1, WRITE, 0),
        ]);

        assert_eq!(result, Ok((16, 513)));
    }

    #[test]
    fn zero_length_descriptors_are_nothing() {
        let result = resolve(&[
            descriptor(0x25_0000, 0, 0, 0),
            descriptor(0x10_0000, 0, WRITE, 0),
        ]);

        assert_eq!(result, Ok((0, 0)));
    }

    #[test]
    fn a_readable_descriptor_after_a_writable_one_is_refused() {
        let result = resolve(&[
            descriptor(0x10_0000, 16, WRITE, 0),
            descriptor(0x10_1000, 16, 0, 0),
        ]);

        assert_eq!(result, Err(ChainError::Order));
    }

    #[test]
    fn more_descriptors_than_allowed_are_refused() {
        let nine = [descriptor(0x10_0000, 1, 0, 0); 9];

        assert_eq!(resolve(&nine), Err(ChainError::TooLong(8)));
    }

    #[test]
    fn a_loop_is_refused() {
        let result = resolve_raw(&[descriptor(0x10_0000, 0, NEXT, 0)]);

        assert_eq!(result, Err(ChainError::TooLong(8)));
    }

    #[test]
    fn an_indirect_table_that_is_no_multiple_of_a_descriptor_is_refused() {
        let result = resolve_raw(&[descriptor(0x10_0000, 17, INDIRECT, 0)]);

        assert_eq!(result, Err(ChainError::Broken));
    }

    #[test]
    fn a_next_index_outside_the_table_is_refused() {
        let result = resolve_raw(&[descriptor(0x10_0000, 8, NEXT, 400)]);

        assert_eq!(result, Err(ChainError::Broken));
    }

    /// threats.md, DMA re-entrancy and CVE-2019-18960: RAM only, at every edge of it.
    #[test]
    fn cve_2019_18960_buffers_outside_ram_are_refused_at_every_edge() {
        let outside = [
            (0x1f_ffff, 2),
            (0x20_0000, 1),
            (0x2f_ffff, 1),
            (0x2f_ffff, 2),
            (0x1f_0000, 0x11_0000),
            (0x3f_ffff, 2),
            (0x40_0000, 1),
            (crate::layout::PCI_MMIO32_START, 4),
            (crate::layout::PCI_ECAM_START, 4),
            (u64::MAX, 1),
            (u64::MAX - 3, 4),
            (0x10_0000, u32::MAX),
        ];

        let results = outside.map(|(address, len)| resolve(&[descriptor(address, len, 0, 0)]));

        let expected = outside.map(|(address, len)| Err(ChainError::Outside { address, len }));
        assert_eq!(results, expected);
    }

    #[test]
    fn buffers_up_to_the_edges_of_ram_are_taken() {
        let inside = [(0x1f_fffe, 2), (0x30_0000, 1), (0x3f_ffff, 1)];

        let results = inside.map(|(address, len)| resolve(&[descriptor(address, len, 0, 0)]));

        assert_eq!(results, [Ok((2, 0)), Ok((1, 0)), Ok((1, 0))]);
    }

    #[test]
    fn spans_are_cut_across_pieces() {
        let memory = memory();
        memory
            .write_slice(b"abcdefgh", GuestAddress(0x1000))
            .unwrap();
        let piece = |at, len| memory.get_slice(GuestAddress(at), len).unwrap();
        let mut span = Span(VecDeque::from([piece(0x1000, 3), piece(0x1003, 5)]));

        let front: Option<[u8; 4]> = span.take_array();
        let back = span.take_back(1).unwrap();
        let mut rest = [0; 8];
        let count = span.copy_to(&mut rest);

        assert_eq!(front, Some(*b"abcd"));
        assert_eq!(back.len(), 1);
        assert_eq!(&rest[..count], b"efg");
        assert!(span.take_front(4).is_none());
        assert_eq!(span.len(), 3);
    }

    #[test]
    fn copying_into_a_span_stops_at_its_end() {
        let memory = memory();
        let piece = |at, len| memory.get_slice(GuestAddress(at), len).unwrap();
        let span = Span(VecDeque::from([piece(0x1000, 2), piece(0x2000, 2)]));

        let count = span.copy_from(b"abcdef");

        let mut second = [0; 3];
        memory
            .read_slice(&mut second, GuestAddress(0x2000))
            .unwrap();
        assert_eq!(count, 4);
        assert_eq!(&second, b"cd\0");
    }
}
