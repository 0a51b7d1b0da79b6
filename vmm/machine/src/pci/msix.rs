//! MSI-X of one function: the table, its masks and pending bits, and the lines behind them.
//!
//! A vector is connected to its processor exactly while MSI-X is enabled, the function
//! is not masked and the vector is not masked. Else its signals are kept by the line:
//! these are the pending bits (PCI Local Bus 3.0, section 6.8.3).

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::platform::{MsiLine, MsiMessage};

/// Message control: enables MSI-X.
pub const CONTROL_ENABLE: u16 = 1 << 15;
/// Message control: masks all vectors.
pub const CONTROL_MASK_ALL: u16 = 1 << 14;
/// Vector control: masks the vector.
const VECTOR_MASKED: u32 = 1;
/// Bytes of a table entry.
pub const ENTRY_SIZE: u64 = 16;
/// The most vectors that a function of this machine has.
pub const MAX_VECTORS: usize = 256;

#[derive(Debug)]
struct Vector {
    address_low: u32,
    address_high: u32,
    data: u32,
    masked: bool,
    /// What the line delivers now, if it is connected.
    connected: Option<MsiMessage>,
    line: Arc<dyn MsiLine>,
}

/// A vector as it is put aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VectorState {
    pub address: u64,
    pub data: u32,
    pub masked: bool,
    pub pending: bool,
}

/// The MSI-X state of a function.
#[derive(Debug)]
pub struct Msix {
    vectors: Vec<Vector>,
    enabled: bool,
    mask_all: bool,
}

impl Msix {
    /// All vectors masked, and MSI-X disabled, as after a reset.
    pub fn new(lines: Vec<Arc<dyn MsiLine>>) -> Self {
        let vectors = lines
            .into_iter()
            .map(|line| Vector {
                address_low: 0,
                address_high: 0,
                data: 0,
                masked: true,
                connected: None,
                line,
            })
            .collect();
        Self {
            vectors,
            enabled: false,
            mask_all: false,
        }
    }

    /// All vectors.
    pub fn state(&self) -> Vec<VectorState> {
        let state = |vector: &Vector| VectorState {
            address: u64::from(vector.address_high) << 32 | u64::from(vector.address_low),
            data: vector.data,
            masked: vector.masked,
            pending: vector.connected.is_none() && vector.line.is_pending(),
        };
        self.vectors.iter().map(state).collect()
    }

    /// Puts all vectors back, as many as there are, and then the message control register.
    pub fn restore(&mut self, state: &[VectorState], control: u16) {
        for (vector, state) in self.vectors.iter_mut().zip(state) {
            let [low, high] = [state.address, state.address >> 32]
                .map(|half| u32::try_from(half & 0xffff_ffff).unwrap_or_default());
            vector.set_register(0, low);
            vector.set_register(1, high);
            vector.data = state.data;
            vector.masked = state.masked;
        }
        self.set_control(control);
        for (vector, state) in self.vectors.iter().zip(state) {
            if state.pending
                && let Err(error) = vector.line.signal()
            {
                log::warn!("an interrupt that a clone should get: {error}");
            }
        }
    }

    /// The message control register has been written.
    pub fn set_control(&mut self, control: u16) {
        let enabled = control & CONTROL_ENABLE != 0;
        let mask_all = control & CONTROL_MASK_ALL != 0;
        if enabled && !self.enabled {
            // What was signalled without MSI-X went nowhere: there is no INTx.
            for vector in &self.vectors {
                vector.line.clear();
            }
        }
        self.enabled = enabled;
        self.mask_all = mask_all;
        let open = self.open();
        for (number, vector) in self.vectors.iter_mut().enumerate() {
            vector.update(number, open);
        }
    }

    /// A guest's read of the table, `offset` bytes into it. Only aligned 4 and 8 byte accesses are defined.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Some((vector, register)) = locate(offset, data.len())
            .and_then(|(number, register)| Some((self.vectors.get(number)?, register)))
        else {
            return;
        };
        for (index, part) in data.chunks_exact_mut(4).enumerate() {
            part.copy_from_slice(&vector.register(register + index).to_le_bytes());
        }
    }

    /// A guest's write to the table.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        let open = self.open();
        let Some((number, register)) = locate(offset, data.len()) else {
            return;
        };
        let Some(vector) = self.vectors.get_mut(number) else {
            return;
        };
        for (index, part) in data.as_chunks::<4>().0.iter().enumerate() {
            vector.set_register(register + index, u32::from_le_bytes(*part));
        }
        vector.update(number, open);
    }

    /// A guest's read of the pending bits. They can't be written.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return;
        }
        let Ok(first) = usize::try_from(offset) else {
            return;
        };
        for (index, byte) in data.iter_mut().enumerate() {
            let Some(base) = first.checked_add(index).and_then(|at| at.checked_mul(8)) else {
                return;
            };
            for bit in 0..8 {
                let pending = self
                    .vectors
                    .get(base + bit)
                    .is_some_and(|vector| vector.connected.is_none() && vector.line.is_pending());
                *byte |= u8::from(pending) << bit;
            }
        }
    }

    fn open(&self) -> bool {
        self.enabled && !self.mask_all
    }
}

impl Vector {
    fn register(&self, register: usize) -> u32 {
        match register {
            0 => self.address_low,
            1 => self.address_high,
            2 => self.data,
            _ => u32::from(self.masked),
        }
    }

    fn set_register(&mut self, register: usize, value: u32) {
        match register {
            // The low two bits are always zero (section 6.8.2.4).
            0 => self.address_low = value & !3,
            1 => self.address_high = value,
            2 => self.data = value,
            _ => self.masked = value & VECTOR_MASKED != 0,
        }
    }

    /// Connects or disconnects the line, if what it should do has changed.
    fn update(&mut self, number: usize, open: bool) {
        let wanted = (open && !self.masked).then(|| MsiMessage {
            address: u64::from(self.address_high) << 32 | u64::from(self.address_low),
            data: self.data,
        });
        if wanted == self.connected {
            return;
        }
        let result = match wanted {
            Some(message) => self.line.connect(message),
            None => self.line.disconnect(),
        };
        match result {
            Ok(()) => self.connected = wanted,
            Err(error) => {
                // The guest's own doing (a message that no processor takes), and its own loss.
                log::debug!("MSI-X vector {number}: {error}");
                self.connected = None;
            }
        }
    }
}

/// The vector and the first of its four registers that an access reaches.
fn locate(offset: u64, len: usize) -> Option<(usize, usize)> {
    if !matches!(len, 4 | 8) || !offset.is_multiple_of(len as u64) {
        return None;
    }
    let number = usize::try_from(offset / ENTRY_SIZE).ok()?;
    let register = usize::try_from(offset % ENTRY_SIZE / 4).ok()?;
    Some((number, register))
}
