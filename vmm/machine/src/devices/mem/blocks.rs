//! Which blocks are plugged, and which may be.

use std::ops::Range;

use super::request::{Answer, Plugged, Run};
use crate::memory::CHUNK;

/// Bytes of a block: what the host maps and takes back as one huge page.
pub const BLOCK: u64 = 2 << 20;
/// Blocks of a chunk.
pub const CHUNK_BLOCKS: usize = (CHUNK / BLOCK) as usize;

/// What the driver may use is the requested size, this much more, and what is missing to [`UNIT`]: Linux adds
/// memory by units of its own, which are up to 2 GiB, and can't always free what is asked back in the first ones.
const SLACK: u64 = 256 << 20;
const UNIT: u64 = 2 << 30;

/// The blocks of a region.
#[derive(Debug)]
pub struct Blocks {
    start: u64,
    /// A bit for each block.
    words: Vec<u64>,
    count: usize,
    plugged: usize,
    /// As the supervisor wants it, in bytes, whole blocks.
    requested: u64,
    /// It grows only.
    usable: u64,
}

impl Blocks {
    /// None is plugged. `size` is a multiple of [`CHUNK`].
    pub fn new(start: u64, size: u64) -> Self {
        let count = usize::try_from(size / BLOCK).unwrap_or(0);
        Self {
            start,
            words: vec![0; count.div_ceil(64)],
            count,
            plugged: 0,
            requested: 0,
            usable: 0,
        }
    }

    pub fn start(&self) -> u64 {
        self.start
    }

    /// Bytes of the region.
    pub fn size(&self) -> u64 {
        self.count as u64 * BLOCK
    }

    /// Bytes, from the start, in which the driver may plug.
    pub fn usable(&self) -> u64 {
        self.usable
    }

    pub fn requested(&self) -> u64 {
        self.requested
    }

    /// Bytes.
    pub fn plugged(&self) -> u64 {
        self.plugged as u64 * BLOCK
    }

    /// Bounds what may be plugged from here on. What is plugged stays so.
    pub fn request(&mut self, bytes: u64) {
        let bytes = bytes.min(self.size()) / BLOCK * BLOCK;
        self.requested = bytes;
        if bytes > 0 {
            let usable = bytes.saturating_add(SLACK).next_multiple_of(UNIT);
            self.usable = self.usable.max(usable.min(self.size()));
        }
    }

    /// The blocks that are to be plugged, if that may be.
    pub fn pluggable(&self, run: Run) -> Result<Range<usize>, Answer> {
        let range = self.range(run)?;
        if self.count_plugged(&range) > 0 {
            return Err(Answer::Error);
        }
        let after = (self.plugged + range.len()) as u64 * BLOCK;
        if after > self.requested {
            return Err(Answer::Nack);
        }
        Ok(range)
    }

    /// The blocks that are to be unplugged, if they are plugged.
    pub fn unpluggable(&self, run: Run) -> Result<Range<usize>, Answer> {
        let range = self.range(run)?;
        if self.count_plugged(&range) != range.len() {
            return Err(Answer::Error);
        }
        Ok(range)
    }

    pub fn state(&self, run: Run) -> Answer {
        match self.range(run) {
            Err(answer) => answer,
            Ok(range) => Answer::State(match self.count_plugged(&range) {
                0 => Plugged::None,
                count if count == range.len() => Plugged::All,
                _ => Plugged::Some,
            }),
        }
    }

    /// All that are plugged.
    pub fn all_plugged(&self) -> Vec<usize> {
        (0..self.count)
            .filter(|block| self.is_plugged(*block))
            .collect()
    }

    /// Says of a block that it is plugged, or that it isn't.
    pub fn set(&mut self, block: usize, plugged: bool) {
        let was = self.is_plugged(block);
        let Some(word) = self.words.get_mut(block / 64) else {
            return;
        };
        match (was, plugged) {
            (false, true) => {
                *word |= 1 << (block % 64);
                self.plugged += 1;
            }
            (true, false) => {
                *word &= !(1 << (block % 64));
                self.plugged -= 1;
            }
            _ => {}
        }
    }

    fn is_plugged(&self, block: usize) -> bool {
        let word = self.words.get(block / 64).copied().unwrap_or(0);
        word >> (block % 64) & 1 == 1
    }

    fn count_plugged(&self, range: &Range<usize>) -> usize {
        range
            .clone()
            .filter(|block| self.is_plugged(*block))
            .count()
    }

    /// A run's blocks, if it has any, and all are usable.
    fn range(&self, run: Run) -> Result<Range<usize>, Answer> {
        let within = || {
            let offset = run.address.checked_sub(self.start)?;
            let length = u64::from(run.blocks) * BLOCK;
            let end = offset.checked_add(length)?;
            let fine = run.blocks > 0 && offset.is_multiple_of(BLOCK) && end <= self.usable;
            let first = usize::try_from(offset / BLOCK).ok()?;
            fine.then_some(first..first + usize::from(run.blocks))
        };
        within().ok_or(Answer::Error)
    }
}
