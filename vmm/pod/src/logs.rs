//! Container output on disk, in the format of Kubernetes' container logs.
