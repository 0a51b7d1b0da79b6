//! Typed messages with descriptors over a `SOCK_SEQPACKET` socket.
