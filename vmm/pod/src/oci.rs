//! The OCI runtime specification of a container, from its manifest and image.
