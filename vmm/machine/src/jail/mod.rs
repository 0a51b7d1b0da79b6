//! What `hull-vmm` gives up before the guest runs.
