//! From a kernel file to a processor that is about to run it.
