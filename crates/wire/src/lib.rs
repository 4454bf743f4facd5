//! Framing, checksums, page encodings and links between hosts.
