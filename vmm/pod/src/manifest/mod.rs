//! Pod manifests: read, checked, and every fault named by file, field and value.
