//! The supervisor's side of the agent: calls over the machine's vsock, and stdio streams.
