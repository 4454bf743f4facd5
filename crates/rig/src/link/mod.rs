//! The link between the rig and the agent inside a server (over a virtio-serial port), and between the command line and
//! the supervisor (over a unix socket): frames, and channels with credit over them.

pub mod frame;
pub mod messages;
pub mod mux;
