//! What stands in guest memory before the first instruction: kernel, initramfs, tables.

pub mod acpi;
pub mod kernel;
pub mod pvh;
pub mod reset;
