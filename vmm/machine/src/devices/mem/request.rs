//! What the driver asks for, and how it is answered (Virtio 1.3, section 5.15.6).

use crate::virtio::buffers::{Buffers, Span};

/// A run of blocks, as the driver names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Of the first block: a guest physical address.
    pub address: u64,
    pub blocks: u16,
}

/// A request (section 5.15.6.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    Plug(Run),
    Unplug(Run),
    UnplugAll,
    State(Run),
}

/// What the device says to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    Ack,
    /// It can't be done now.
    Nack,
    /// It can never be done.
    Error,
    /// To [`Request::State`].
    State(Plugged),
}

/// How much of a run is plugged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plugged {
    All = 0,
    None = 1,
    Some = 2,
}

/// `struct virtio_mem_resp`: type, padding, and a state, which is 0 where it has no meaning.
pub const RESPONSE_SIZE: usize = 10;

impl Request {
    /// Reads one. None: it isn't one.
    pub fn parse(message: &mut Span<'_>) -> Option<Self> {
        let [low, high, ..]: [u8; 8] = message.take_array()?;
        match u16::from_le_bytes([low, high]) {
            0 => run(message).map(Self::Plug),
            1 => run(message).map(Self::Unplug),
            2 => Some(Self::UnplugAll),
            3 => run(message).map(Self::State),
            _ => None,
        }
    }
}

fn run(message: &mut Span<'_>) -> Option<Run> {
    let address = u64::from_le_bytes(message.take_array()?);
    let [low, high, ..]: [u8; 8] = message.take_array()?;
    Some(Run {
        address,
        blocks: u16::from_le_bytes([low, high]),
    })
}

impl Answer {
    fn bytes(self) -> [u8; RESPONSE_SIZE] {
        let (kind, state) = match self {
            Self::Ack => (0, 0),
            Self::State(plugged) => (0, plugged as u8),
            Self::Nack => (1, 0),
            Self::Error => (3, 0),
        };
        let mut bytes = [0; RESPONSE_SIZE];
        bytes[0] = kind;
        bytes[8] = state;
        bytes
    }
}

/// Has `answer` answer a request. One for whose answer there is no place is none. Returns how many bytes were written.
pub fn serve(mut buffers: Buffers<'_>, answer: impl FnOnce(Request) -> Answer) -> u32 {
    if buffers.writable.len() < RESPONSE_SIZE {
        return 0;
    }
    let answer = Request::parse(&mut buffers.readable).map_or(Answer::Error, answer);
    let written = buffers.writable.copy_from(&answer.bytes());
    u32::try_from(written).unwrap_or(u32::MAX)
}
