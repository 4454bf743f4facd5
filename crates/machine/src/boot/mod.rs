//! From a kernel, a flat guest or nothing to the first instruction.
