//! The supervisor's side of a machine: starts `hull-vmm`, talks to it, sees it end.
