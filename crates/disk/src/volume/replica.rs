//! [`Replica`]: the standby's calls, and what peers ask of either side.

use super::op::EpochOp;
use super::read::{ReadFault, read_with};
use super::runtime::{Handle, Notify, Shared};
use super::{Options, Progress, Recovered, Volume, VolumeError};
use crate::scrub::PeerSource;
use crate::storage::{Storage, StorageFile};
use std::sync::Arc;
use std::time::Duration;
use steadfast_types::{Epoch, Term};

/// The standby's side of a volume.
#[derive(Clone)]
pub struct Replica {
    pub(crate) handle: Arc<Handle>,
}

impl Replica {
    /// Opens a replica; the caller looks at what was found and commits or discards staged epochs.
    ///
    /// # Errors
    /// As [`super::open`].
    pub fn open(
        storage: &dyn Storage,
        image: Arc<dyn StorageFile>,
        options: &Options,
        notify: Option<Notify>,
    ) -> Result<(Self, Recovered), VolumeError> {
        let (core, recovered) = super::open(storage, image, options)?;
        Ok((
            Self {
                handle: Handle::start(core, notify)?,
            },
            recovered,
        ))
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.handle.shared
    }

    /// The calls that both sides have ([`Volume::progress`], [`Volume::request_sync`], [`Volume::commit`], ...). Guest
    /// requests are refused until [`Replica::promote`].
    #[must_use]
    pub fn common(&self) -> Volume {
        Volume {
            handle: self.handle.clone(),
        }
    }

    /// Where everything stands.
    #[must_use]
    pub fn progress(&self) -> Progress {
        self.shared().core().progress()
    }

    /// Takes a whole epoch from the primary. With `flush`, a sync is asked for at once: acknowledge when
    /// [`Progress::synced`] has reached the epoch. Waits for room, at most `wait_ms`.
    ///
    /// # Errors
    /// As [`super::Core::stage`]; after an error nothing of the epoch is here.
    pub fn stage(&self, epoch: Epoch, term: Term, flush: bool, ops: &[EpochOp]) -> Result<(), VolumeError> {
        self.shared()
            .with_room(|core| core.stage(epoch, term, flush, ops))
    }

    /// Asks for the journal to be durable up to this epoch.
    pub fn request_sync(&self, through: Epoch) {
        self.common().request_sync(through);
    }

    /// Waits for that.
    ///
    /// # Errors
    /// As [`Volume::wait_synced`].
    pub fn wait_synced(&self, epoch: Epoch, timeout: Duration) -> Result<(), VolumeError> {
        self.common().wait_synced(epoch, timeout)
    }

    /// The primary says that these epochs are committed.
    ///
    /// # Errors
    /// As [`super::Core::commit`].
    pub fn commit(&self, through: Epoch) -> Result<(), VolumeError> {
        self.common().commit(through)
    }

    /// Drops staged epochs that were never committed.
    ///
    /// # Errors
    /// As [`super::Core::discard_after`].
    pub fn discard_after(&self, after: Epoch) -> Result<(), VolumeError> {
        let result = self.shared().core().discard_after(after);
        self.shared().wake();
        result
    }

    /// Becomes the primary's volume, after the last staged epoch: call [`Replica::discard_after`] first if it goes on
    /// from an earlier one. Also for a speculative run, which [`Volume::demote`] undoes.
    ///
    /// # Errors
    /// [`VolumeError::Copying`].
    pub fn promote(self, term: Term) -> Result<Volume, VolumeError> {
        self.shared().core().promote(term)?;
        Ok(Volume { handle: self.handle })
    }

    /// Where good copies of bad blocks come from.
    pub fn set_peer(&self, peer: Option<Arc<dyn PeerSource>>) {
        self.common().set_peer(peer);
    }
}

/// Reads a range as of the epochs up to `through`, which must not be behind the image; `None`: up to the committed
/// one. Returns the epoch.
pub(crate) fn read_view(
    shared: &Shared,
    through: Option<Epoch>,
    offset: u64,
    buf: &mut [u8],
) -> Result<Result<Epoch, ReadFault>, VolumeError> {
    crate::journal::record::check_range(offset, buf.len() as u64, shared.files.capacity)?;
    let _no_trims = shared.hold_trims();
    let _still = shared.files.lock_image();
    let (epoch, ops) = {
        let core = shared.core();
        core.must_be_whole()?;
        let epoch = through.unwrap_or(core.committed);
        if epoch < core.image_holds() {
            return Err(VolumeError::OutOfOrder {
                expected: core.image_holds(),
                got: epoch,
            });
        }
        (epoch, core.pending_ops(epoch, offset, offset + buf.len() as u64))
    };
    Ok(read_with(&shared.files, &ops, offset, buf, true).map(|()| epoch))
}

impl Volume {
    /// Reads a range as of the last committed epoch, which is returned: for a peer's scrub.
    ///
    /// # Errors
    /// [`VolumeError::Damaged`] if this copy is bad too: a peer never gets bytes that do not match their checksum.
    pub fn read_committed(&self, offset: u64, buf: &mut [u8]) -> Result<Epoch, VolumeError> {
        match read_view(&self.handle.shared, None, offset, buf)? {
            Ok(epoch) => Ok(epoch),
            Err(ReadFault::Block(at)) => Err(VolumeError::Damaged {
                what: "image block",
                at,
            }),
            Err(ReadFault::Other(e)) => Err(e),
        }
    }
}
