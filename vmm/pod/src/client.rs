//! Asks a running pod's supervisor over its socket.
