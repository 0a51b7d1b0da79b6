//! The messages between a pod's supervisor and the agent in its guest.
//!
//! Calls are ttrpc over vsock port [`AGENT_PORT`]. Each stdio stream is a vsock
//! connection of its own to [`STREAM_PORT`], whose first bytes are a
//! [`STREAM_MAGIC`] and the stream's number (8 bytes, little endian); what
//! follows is the stream, and its half-close is the stream's end. When the agent is
//! ready it connects to [`READY_PORT`] of the host; that connection carries
//! nothing and stays open as long as the agent lives. When it is reset, the guest was
//! cloned or its machine restored: the agent then makes it anew, and the supervisor says
//! Hello on a new connection for calls.

/// The agent's ttrpc port in the guest.
pub const AGENT_PORT: u32 = 1024;
/// The agent's port for stdio streams in the guest.
pub const STREAM_PORT: u32 = 1025;
/// The supervisor's port to which the agent connects when it is ready.
pub const READY_PORT: u32 = 1026;
/// First bytes of a stream connection.
pub const STREAM_MAGIC: [u8; 4] = *b"HULS";

/// Messages, generated from `proto/agent.proto`.
#[allow(clippy::all, clippy::pedantic, clippy::restriction)]
#[allow(missing_debug_implementations, non_snake_case, non_upper_case_globals, unused)]
#[rustfmt::skip]
pub mod agent {
    include!(concat!(env!("OUT_DIR"), "/agent.rs"));
}

/// The service's client and server, generated from `proto/agent.proto`.
#[allow(clippy::all, clippy::pedantic, clippy::restriction)]
#[allow(missing_debug_implementations, non_snake_case, non_upper_case_globals, unused)]
#[rustfmt::skip]
pub mod agent_ttrpc {
    include!(concat!(env!("OUT_DIR"), "/agent_ttrpc.rs"));
}
