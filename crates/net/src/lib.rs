//! TAP devices, output hold and release, announce.
