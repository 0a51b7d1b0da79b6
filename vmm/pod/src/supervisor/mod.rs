//! The process that has authority over one pod: from its machine to its last container.
