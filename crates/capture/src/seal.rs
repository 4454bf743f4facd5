//! One cut: the pause, and what it seals.

use crate::pages::{Page, PageArena, SealedPages};
use std::time::{Duration, Instant};
use steadfast_machine::machine::Machine;
use steadfast_machine::memory::Ram;
use steadfast_machine::quiesce::{QuiesceError, Quiesced};
use steadfast_machine::state::StateError;
use steadfast_types::Gfn;

/// A cut that did not come about; the machine runs on and no dirty page is lost.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The machine did not stop.
    #[error(transparent)]
    Quiesce(#[from] QuiesceError),
    /// KVM did not tell what is dirty.
    #[error(transparent)]
    Harvest(#[from] steadfast_machine::kvm::KvmError),
    /// State could not be taken.
    #[error(transparent)]
    State(#[from] StateError),
    /// A dirty page is not readable.
    #[error("dirty page {0} cannot be read")]
    Page(u64),
    /// State could not be encoded.
    #[error("device state cannot be encoded: {0}")]
    Encode(String),
}

/// Where the pause went.
#[derive(Clone, Copy, Debug, Default)]
pub struct CutTimes {
    /// From the first kick until vCPUs and devices stood still.
    pub stop: Duration,
    /// How much of that was for the vCPUs.
    pub vcpus: Duration,
    /// Finding the dirty pages.
    pub harvest: Duration,
    /// Copying them.
    pub copy: Duration,
    /// State of vCPUs and devices.
    pub state: Duration,
    /// All of it, until the guest ran on.
    pub pause: Duration,
}

impl std::fmt::Display for CutTimes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ms = |d: Duration| d.as_millis();
        let (vcpus, devices) = (ms(self.vcpus), ms(self.stop.saturating_sub(self.vcpus)));
        let (harvest, copy, state) = (ms(self.harvest), ms(self.copy), ms(self.state));
        write!(
            f,
            "{} ms: vCPUs {vcpus}, devices {devices}, harvest {harvest}, copy {copy}, state {state}",
            ms(self.pause)
        )
    }
}

/// What a cut takes beside what the dirty log knows.
#[derive(Default)]
pub struct Beside {
    /// Pages, rising, that somebody lacks.
    pub extra: Vec<Gfn>,
    /// What is sealed already, of a machine that has not run since; gone once a cut has succeeded.
    pub anew: Option<SealedPages>,
}

/// What a cut sealed.
pub struct Sealed {
    /// Changed pages.
    pub pages: SealedPages,
    /// Machine state, encoded.
    pub state: Vec<u8>,
    /// Where the pause went.
    pub times: CutTimes,
}

/// Makes cuts of one machine.
pub struct Capture {
    arena: PageArena,
    dirty: Vec<Gfn>,
}

impl Capture {
    /// With an arena for cuts of about `pages` pages.
    #[must_use]
    pub fn new(arena: PageArena) -> Self {
        Self {
            arena,
            dirty: Vec::new(),
        }
    }

    /// Stops the machine, seals what changed since the last cut and what is `beside`, calls `at_cut` with the sealed pages while all
    /// stands still, and lets the machine run on, unless `freeze`.
    ///
    /// # Errors
    /// [`CaptureError`]; the dirty pages are dirty again.
    pub fn cut(
        &mut self,
        machine: &Machine,
        beside: &mut Beside,
        freeze: bool,
        at_cut: impl FnOnce(&mut Quiesced<'_>, &SealedPages),
    ) -> Result<Sealed, CaptureError> {
        let start = Instant::now();
        let mut times = CutTimes::default();
        let mut still = machine.quiesce()?;
        times.stop = start.elapsed();
        times.vcpus = still.times.vcpus;
        let mut dirty = std::mem::take(&mut self.dirty);
        let sealed = self.seal(machine, &mut still, &mut dirty, beside, &mut times, start);
        match &sealed {
            Ok((pages, _)) => at_cut(&mut still, pages),
            Err(_) => still.merge_back(&dirty),
        }
        self.dirty = dirty;
        if freeze && sealed.is_ok() {
            still.keep_stopped();
        } else {
            drop(still);
        }
        let (pages, state) = sealed?;
        times.pause = start.elapsed();
        Ok(Sealed { pages, state, times })
    }

    fn seal(
        &self,
        machine: &Machine,
        still: &mut Quiesced<'_>,
        dirty: &mut Vec<Gfn>,
        beside: &mut Beside,
        times: &mut CutTimes,
        start: Instant,
    ) -> Result<(SealedPages, Vec<u8>), CaptureError> {
        let mark = |from: Duration| start.elapsed().saturating_sub(from);
        still.harvest(dirty)?;
        times.harvest = mark(times.stop);
        if !beside.extra.is_empty() {
            dirty.extend_from_slice(&beside.extra);
            dirty.sort_unstable();
            dirty.dedup();
        }
        let pages = match beside.anew.take_if(|anew| dirty.iter().all(|g| anew.has(*g))) {
            Some(anew) => {
                *dirty = anew.gfns().to_vec();
                anew
            }
            None => {
                if let Some(anew) = &beside.anew {
                    dirty.extend_from_slice(anew.gfns());
                    dirty.sort_unstable();
                    dirty.dedup();
                }
                self.copy_live(machine, dirty)?
            }
        };
        times.copy = mark(times.stop + times.harvest);
        let state = still.save()?;
        let mut bytes = Vec::with_capacity(16 << 10);
        bytes = postcard_into(&state, bytes)?;
        times.state = mark(times.stop + times.harvest + times.copy);
        beside.anew = None;
        Ok((pages, bytes))
    }

    /// Finds what changed since the last cut without sealing anything: the pages go to `pages` and are no longer
    /// dirty. For the rounds of a full copy, while no epoch is under way.
    ///
    /// # Errors
    /// [`CaptureError`].
    pub fn harvest_only(&mut self, machine: &Machine, pages: &mut Vec<Gfn>) -> Result<(), CaptureError> {
        let mut still = machine.quiesce()?;
        Ok(still.harvest(pages)?)
    }

    /// Bytes of the arena's buffers.
    #[must_use]
    pub fn arena_bytes(&self) -> u64 {
        self.arena.bytes()
    }

    /// Copies pages of a running machine, as they are now.
    ///
    /// # Errors
    /// [`CaptureError::Page`].
    pub fn copy_live(&self, machine: &Machine, gfns: &[Gfn]) -> Result<SealedPages, CaptureError> {
        let ram = machine.ram();
        self.arena.seal(gfns, |part, into| copy(ram, part, into))
    }

    /// Where sealed pages are kept.
    #[must_use]
    pub fn arena(&self) -> &PageArena {
        &self.arena
    }
}

fn postcard_into(
    state: &steadfast_machine::state::MachineState,
    into: Vec<u8>,
) -> Result<Vec<u8>, CaptureError> {
    postcard::to_extend(state, into).map_err(|e| CaptureError::Encode(e.to_string()))
}

/// Copies pages out of RAM, all or none.
pub(crate) fn copy(ram: &Ram, part: &[Gfn], into: &mut [Page]) -> Result<(), CaptureError> {
    let done = ram.copy_pages(part, into.as_flattened_mut());
    match part.get(done) {
        None => Ok(()),
        Some(missing) => Err(CaptureError::Page(missing.0)),
    }
}
