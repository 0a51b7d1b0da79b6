//! Builds a machine and runs it to its end.
