//! Committed epochs on their way into a standby's memory: whole and in order (I3), and a piece at a time.
//!
//! ```text
//! Apply{through} -> record after record, PIECE by PIECE between the engine's other work -> Applied{through}
//! ```
//! An epoch as large as the guest's memory takes long to apply. All the while the standby receives, stages and acknowledges
//! what follows, and is heard of (I7). Memory is of no epoch while a record is half applied; who needs it whole has the rest done
//! at once: a takeover goes on from it, a copy is made of it.

use crate::engine::Engine;
use crate::outgoing::PIECE;
use crate::standby::RamSink;
use std::time::Instant;
use steadfast_epoch::io::Event;
use steadfast_types::Epoch;
use steadfast_wire::StagedRecord;
use steadfast_wire::record::ApplyAt;

/// The clock is looked at after so many pages.
const STRIDE: usize = 64;

/// What is being applied.
#[derive(Default)]
pub(crate) struct Applying {
    /// Up to which epoch, as the protocol says.
    through: Option<Epoch>,
    record: Option<(Epoch, StagedRecord, ApplyAt)>,
}

impl Applying {
    pub fn is_busy(&self) -> bool {
        self.through.is_some()
    }
}

impl Engine {
    /// The protocol's word to apply.
    pub(crate) fn apply(&mut self, through: Epoch) {
        self.applying.through = self.applying.through.max(Some(through));
        self.apply_piece(Some(Instant::now() + PIECE));
    }

    /// Goes on until then, or to the end, and reports the end.
    pub(crate) fn apply_piece(&mut self, until: Option<Instant>) {
        let Some(through) = self.applying.through else {
            return;
        };
        match self.apply_memory(through, until) {
            Ok(false) => return,
            Ok(true) if self.disks.is_empty() => self.events.push_back(Event::Applied { through }),
            Ok(true) => self.events.extend(self.disks.commit(through, true)),
            Err(error) => {
                self.note(error);
                self.events.push_back(Event::StateLost);
            }
        }
        self.applying = Applying::default();
    }

    /// Memory is of no use any more.
    pub(crate) fn forget_memory(&mut self) {
        self.memory = None;
        self.applying = Applying::default();
    }

    /// I3: each epoch on exactly the one before it, the first on the copy that it completes. True when all is done.
    pub(crate) fn apply_memory(&mut self, through: Epoch, until: Option<Instant>) -> Result<bool, String> {
        loop {
            let (epoch, record, mut at) = match self.applying.record.take() {
                Some(under_way) => under_way,
                None => {
                    let Some(entry) = self.staged.first_entry().filter(|e| *e.key() <= through) else {
                        break;
                    };
                    let (epoch, record) = entry.remove_entry();
                    let follows = match self.memory.take() {
                        Some(at) => epoch == at.next(),
                        None => self.base.0 == Some(epoch),
                    };
                    if !follows {
                        return Err(format!("epoch {epoch} does not follow what memory holds"));
                    }
                    (epoch, record, ApplyAt::default())
                }
            };
            let mut sink = RamSink(self.vm.machine.ram());
            loop {
                let done = record
                    .apply_some(&mut at, STRIDE, &mut sink)
                    .map_err(|error| format!("epoch {epoch} cannot be applied: {error}"))?;
                if done {
                    break;
                }
                if until.is_some_and(|u| Instant::now() >= u) {
                    self.applying.record = Some((epoch, record, at));
                    return Ok(false);
                }
            }
            self.memory = Some(epoch);
            self.compare(epoch, record.term());
            if !record.device().is_empty() {
                self.state.clear();
                self.state.extend_from_slice(record.device());
            }
        }
        match self.memory {
            Some(at) if at == through => Ok(true),
            at => Err(format!(
                "memory stands at epoch {at:?} where {through} was to be applied"
            )),
        }
    }
}
