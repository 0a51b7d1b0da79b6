//! Volumes and root file systems: assembled on the host, bound under the pod's share.
