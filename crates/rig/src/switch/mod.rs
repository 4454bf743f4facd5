//! The rig's network switches.
//!
//! ```text
//! server NIC --stream socket--> port \                       / port --stream socket--> server NIC
//!                                     core (who, when, lost?) -- wait queue (delays) --
//! client TAP ----- frames ----> port /                       \ port ----- frames ----> client TAP
//! ```
//! [`core`] decides and keeps no sockets and no clock, so that it can be tested; [`plane`] is one thread per switch that moves
//! the bytes.

pub mod core;
pub mod plane;
pub mod random;

pub use core::{Counters, Fault, PortId};
pub use plane::Switch;
