//! One request to a disk: what it asks for, and the answer (Virtio 1.2, section 5.2.6).

use std::io;

use super::disk::{Disk, SECTOR};
use crate::virtio::buffers::{Buffers, ChainError, Span};

/// Request types.
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

/// Status bytes.
const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// Type, reserved, first sector.
const HEADER_SIZE: usize = 16;
/// First sector, sectors, flags.
const RANGE_SIZE: usize = 16;
/// Flag of a range to be zeroed: it may be given up.
const UNMAP: u32 = 1;

/// What one request can have at most.
#[derive(Debug)]
pub struct Limits {
    pub segments: u32,
    pub segment_bytes: u32,
    /// Ranges of a discard or write-zeroes request.
    pub ranges: u32,
    pub discard_sectors: u32,
    pub zero_sectors: u32,
}

impl Limits {
    /// Descriptors of a chain: the segments, a header and a status.
    pub fn descriptors(&self) -> usize {
        usize::try_from(self.segments).map_or(0, |segments| segments + 2)
    }
}

/// Why a request fails; the driver learns but a byte of it.
#[derive(Debug, thiserror::Error)]
enum RequestError {
    #[error("request type {0} is not known")]
    Type(u32),
    #[error("flags {0:#x} are not known")]
    Flags(u32),
    #[error("its data are no whole number of sectors or ranges, or over a limit")]
    Length,
    #[error("the disk has not all of the {count} sectors from {first} on")]
    Sectors { first: u64, count: u64 },
    #[error("there is no disk")]
    NoDisk,
    #[error("the disk is read-only")]
    ReadOnly,
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl RequestError {
    fn status(&self) -> u8 {
        match self {
            Self::Type(_) | Self::Flags(_) => UNSUPPORTED,
            Self::Io(error) if error.kind() == io::ErrorKind::Unsupported => UNSUPPORTED,
            _ => IO_ERROR,
        }
    }
}

/// Answers requests of one disk.
#[derive(Debug)]
pub struct Answerer<'a> {
    pub disk: Option<&'a Disk>,
    pub id: &'a [u8],
    pub limits: &'a Limits,
    /// Every write is made to last before it is answered.
    pub write_through: bool,
}

impl Answerer<'_> {
    /// Answers a request, and returns how many bytes of it were written. A chain without
    /// room for a status, or without a header, has no answer.
    pub fn answer(&self, request: Result<Buffers<'_>, ChainError>) -> u32 {
        let Ok(Buffers {
            mut readable,
            mut writable,
        }) = request.inspect_err(|error| log::debug!("block: {error}"))
        else {
            return 0;
        };
        let written = u32::try_from(writable.len()).unwrap_or(0);
        let Some(status) = writable.take_back(1) else {
            return 0;
        };
        let Some(header) = readable.take_array::<HEADER_SIZE>() else {
            status.copy_from(&[IO_ERROR]);
            return written;
        };
        let result = self.execute(&header, &readable, &writable);
        let code = match &result {
            Ok(()) => OK,
            Err(error) => {
                log::debug!("block: {error}");
                error.status()
            }
        };
        status.copy_from(&[code]);
        written
    }

    fn execute(
        &self,
        header: &[u8; HEADER_SIZE],
        readable: &Span<'_>,
        writable: &Span<'_>,
    ) -> Result<(), RequestError> {
        let kind = u32_at(header, 0);
        let sector = u64_at(header, 8);
        match kind {
            IN => self.read(sector, writable),
            OUT => self.write(sector, readable),
            FLUSH => Ok(self.disk()?.flush()?),
            GET_ID => {
                writable.copy_from(self.id);
                Ok(())
            }
            DISCARD => self.each_range(readable, self.limits.discard_sectors, false),
            WRITE_ZEROES => self.each_range(readable, self.limits.zero_sectors, true),
            _ => Err(RequestError::Type(kind)),
        }
    }

    fn read(&self, sector: u64, target: &Span<'_>) -> Result<(), RequestError> {
        let range = self.range(sector, self.sectors(target)?)?;
        Ok(self.disk()?.read(range, target)?)
    }

    fn write(&self, sector: u64, source: &Span<'_>) -> Result<(), RequestError> {
        self.check_writable()?;
        let range = self.range(sector, self.sectors(source)?)?;
        self.disk()?.write(range, source)?;
        self.make_last()
    }

    /// Discards or zeroes the ranges that `list` has. All are checked before the first is touched.
    fn each_range(&self, list: &Span<'_>, most: u32, zero: bool) -> Result<(), RequestError> {
        self.check_writable()?;
        let count = list.len() / RANGE_SIZE;
        let too_many = u32::try_from(count).map_or(true, |count| count > self.limits.ranges);
        if too_many || count == 0 || !list.len().is_multiple_of(RANGE_SIZE) {
            return Err(RequestError::Length);
        }
        // Read once: the driver may change it while it is worked on.
        let mut bytes = vec![0; list.len()];
        list.copy_to(&mut bytes);
        let mut ranges = Vec::with_capacity(count);
        for entry in bytes.as_chunks::<RANGE_SIZE>().0 {
            let sectors = u32_at(entry, 8);
            let flags = u32_at(entry, 12);
            if flags & !UNMAP != 0 || (flags != 0 && !zero) {
                return Err(RequestError::Flags(flags));
            }
            if sectors > most {
                return Err(RequestError::Length);
            }
            let range = self.range(u64_at(entry, 0), u64::from(sectors))?;
            if sectors > 0 {
                ranges.push((range, zero && flags & UNMAP == 0));
            }
        }
        for (range, keep) in ranges {
            if keep {
                self.disk()?.zero(range)?;
            } else {
                self.disk()?.discard(range)?;
            }
        }
        self.make_last()
    }

    fn make_last(&self) -> Result<(), RequestError> {
        if self.write_through {
            self.disk()?.flush()?;
        }
        Ok(())
    }

    fn disk(&self) -> Result<&Disk, RequestError> {
        self.disk.ok_or(RequestError::NoDisk)
    }

    fn check_writable(&self) -> Result<(), RequestError> {
        if self.disk()?.read_only() {
            Err(RequestError::ReadOnly)
        } else {
            Ok(())
        }
    }

    /// How many sectors some data are.
    fn sectors(&self, data: &Span<'_>) -> Result<u64, RequestError> {
        let largest = usize::try_from(self.limits.segment_bytes).unwrap_or(usize::MAX);
        let sector = u64::from(SECTOR);
        let len = u64::try_from(data.len()).map_err(|_| RequestError::Length)?;
        if len % sector != 0 || data.pieces().any(|piece| piece.len() > largest) {
            return Err(RequestError::Length);
        }
        Ok(len / sector)
    }

    fn range(&self, first: u64, count: u64) -> Result<super::disk::Range, RequestError> {
        self.disk()?
            .range(first, count)
            .ok_or(RequestError::Sectors { first, count })
    }
}

/// Little-endian fields; the offsets are constants, within the array.
fn u32_at(bytes: &[u8; 16], offset: usize) -> u32 {
    let mut field = [0; 4];
    field.copy_from_slice(&bytes[offset..offset + 4]);
    u32::from_le_bytes(field)
}

fn u64_at(bytes: &[u8; 16], offset: usize) -> u64 {
    let mut field = [0; 8];
    field.copy_from_slice(&bytes[offset..offset + 8]);
    u64::from_le_bytes(field)
}
