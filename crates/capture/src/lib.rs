//! Capture: from a running machine to one sealed epoch that owns what it holds.
//!
//! ```text
//! quiesce -> harvest dirty pages -> copy them into the arena -> save vCPUs and devices -> cut hooks -> run on
//! ```
//! The pause ends when the guest runs on; encoding and sending happen afterwards, from the sealed epoch, which owns
//! its pages until it is acknowledged and dropped. A cut that fails half-way gives the dirty pages back: no page is
//! ever forgotten (I3).
//!
//! What a machine that was built anew changes is sealed before it runs, by whoever builds it ([`seal_anew`]): no pause is as long as that.

mod anew;
mod pages;
mod seal;

pub use anew::seal_anew;
pub use pages::{PageArena, SealedPages};
pub use seal::{Beside, Capture, CaptureError, CutTimes, Sealed};
