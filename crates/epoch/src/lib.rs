//! The epoch protocol as pure state machines.
