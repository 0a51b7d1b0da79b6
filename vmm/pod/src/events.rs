//! What happened to a pod, one JSON object a line.
