//! Bringing a replica back, or a new one up, while the VM runs.
//!
//! ```text
//!  source (primary)                                   target (standby)
//!  map     which regions differ since `have`     <--  have = its last committed epoch
//!  copy    next_chunk ... (guest writes mark          begin_copy: superblock says Copying
//!          regions again)                        -->  store_chunk ...
//!  switch  at a cut: seal epoch E, residue(E)    -->  store_chunk ..., finish_copy(E): image synced, then the
//!                                                     superblock says Verifying, applied = E
//!  verify                                             scrub against the peer, resumable from its cursor
//! ```
//!
//! The map is kept per standby and never cleared by a copy: only by the standby's word that it holds an epoch
//! durably ([`DirtyMap::peer_durable`]). So a copy that was cut short in any phase starts again from the same map,
//! and sends at most what it sent before. The file of the map is lazy and errs on the safe side: what the file does
//! not say yet is still in the journal, and a page of it that is torn or rotten counts as "all changed".

mod map;
mod rate;
mod source;
mod target;

pub use map::{DirtyMap, MapChanges, REGION};
pub use rate::RateLimit;
pub use source::{Chunk, Plan, Residue};

pub(crate) use crate::volume::PEERS as PEER_FILES;
