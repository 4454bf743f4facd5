//! The process that runs inputs.
//!
//! A panic is caught, an input that takes longer than its limit is noticed by a watchdog thread; both leave the input
//! in the folder of findings and end the process with [`EXIT_FINDING`]. What nothing can catch (abort, a stack that
//! overflows, memory beyond the limit) kills the process: so every input is first written to the file `current`, which
//! the supervisor keeps then.

use crate::mutate::{Corpus, Random};
use crate::targets::Target;
use anyhow::{Context, Result};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Exit code after a finding that the worker itself has saved.
pub const EXIT_FINDING: i32 = 77;
/// Address space of a worker: beyond this an allocation fails, as a hostile size must not eat the host.
const ADDRESS_SPACE_BYTES_MAX: u64 = 16 << 30;

/// What a worker is asked to do.
#[derive(Clone, Debug)]
pub struct Job {
    /// How long.
    pub time: Duration,
    /// Seed of all randomness.
    pub seed: u64,
    /// Longest time of one input.
    pub input_limit: Duration,
    /// Where findings go, and the file `current`.
    pub findings: PathBuf,
    /// A folder with more seeds.
    pub corpus: Option<PathBuf>,
}

struct Running {
    since: Instant,
    input: Vec<u8>,
}

/// Runs `target` for the job's time; returns the number of inputs. Ends the process on a finding.
///
/// # Errors
/// Files that cannot be read or written.
pub fn run(target: &Target, job: &Job) -> Result<u64> {
    limit_memory()?;
    std::fs::create_dir_all(&job.findings)?;
    let current = File::create(current_file(&job.findings, target.name))?;
    let mut seeds = (target.seeds)();
    if let Some(folder) = &job.corpus {
        seeds.extend(read_folder(folder)?);
    }
    let mut corpus = Corpus::new(seeds, target.dictionary);
    let mut random = Random::new(job.seed);
    let message = quiet_panics();
    let running: Arc<Mutex<Option<Running>>> = Arc::default();
    watchdog(target.name, job, &running);

    let end = Instant::now() + job.time;
    let mut done = 0;
    let first: Vec<Vec<u8>> = corpus.seeds().to_vec();
    let mut first = first.into_iter();
    while Instant::now() < end {
        let input = first.next().unwrap_or_else(|| corpus.next(&mut random));
        remember(&current, &input)?;
        *lock(&running) = Some(Running {
            since: Instant::now(),
            input: input.clone(),
        });
        let result = catch_unwind(AssertUnwindSafe(|| (target.run)(&input)));
        let took = lock(&running)
            .take()
            .map_or(Duration::ZERO, |r| r.since.elapsed());
        if result.is_err() {
            let why = lock(&message).clone();
            let at = save(&job.findings, target.name, "panic", &input)?;
            println!(
                "FINDING {}: panic: {why}; input {} (seed {})",
                target.name,
                at.display(),
                job.seed
            );
            std::process::exit(EXIT_FINDING);
        }
        if took > job.input_limit {
            hang(target.name, job, &input);
        }
        done += 1;
    }
    Ok(done)
}

/// Runs one input once, to look at a finding; panics are printed as usual.
pub fn replay(target: &Target, input: &Path) -> Result<()> {
    let bytes = std::fs::read(input).with_context(|| format!("read {}", input.display()))?;
    let start = Instant::now();
    (target.run)(&bytes);
    println!(
        "{}: {} bytes, {:?}, no finding",
        target.name,
        bytes.len(),
        start.elapsed()
    );
    Ok(())
}

/// The file that holds the input at work: length, then bytes.
#[must_use]
pub fn current_file(findings: &Path, target: &str) -> PathBuf {
    findings.join(format!(".current-{target}"))
}

/// Reads what [`current_file`] holds.
#[must_use]
pub fn read_current(findings: &Path, target: &str) -> Option<Vec<u8>> {
    let bytes = std::fs::read(current_file(findings, target)).ok()?;
    let len: [u8; 8] = bytes.get(..8)?.try_into().ok()?;
    let len = usize::try_from(u64::from_le_bytes(len)).ok()?;
    bytes.get(8..8 + len).map(<[u8]>::to_vec)
}

/// Saves an input under a name made of its content, so that the same finding is saved once.
///
/// # Errors
/// The file cannot be written.
pub fn save(findings: &Path, target: &str, kind: &str, input: &[u8]) -> Result<PathBuf> {
    // FNV-1a, 64 bits.
    let hash = input.iter().fold(0xcbf2_9ce4_8422_2325_u64, |h, &b| {
        (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
    });
    let at = findings.join(format!("{target}-{kind}-{hash:016x}"));
    std::fs::write(&at, input).with_context(|| format!("write {}", at.display()))?;
    Ok(at)
}

fn remember(current: &File, input: &[u8]) -> std::io::Result<()> {
    let mut bytes = (input.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(input);
    current.write_all_at(&bytes, 0)
}

fn watchdog(target: &'static str, job: &Job, running: &Arc<Mutex<Option<Running>>>) {
    let job = job.clone();
    let running = Arc::clone(running);
    // Ends with the process.
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(Duration::from_millis(100));
            let late = lock(&running)
                .as_ref()
                .filter(|r| r.since.elapsed() > job.input_limit * 2)
                .map(|r| r.input.clone());
            if let Some(input) = late {
                hang(target, &job, &input);
            }
        }
    });
}

fn hang(target: &str, job: &Job, input: &[u8]) -> ! {
    match save(&job.findings, target, "slow", input) {
        Ok(at) => println!(
            "FINDING {target}: an input took longer than {:?}; input {} (seed {})",
            job.input_limit,
            at.display(),
            job.seed
        ),
        Err(e) => println!("FINDING {target}: hang, and the input was not saved: {e:#}"),
    }
    std::process::exit(EXIT_FINDING);
}

/// Panics are kept as text instead of printed: targets that fence third-party code cause many.
fn quiet_panics() -> Arc<Mutex<String>> {
    let last: Arc<Mutex<String>> = Arc::default();
    let kept = Arc::clone(&last);
    std::panic::set_hook(Box::new(move |info| {
        *lock(&kept) = info.to_string().replace('\n', " ");
    }));
    last
}

fn lock<T>(m: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

fn limit_memory() -> Result<()> {
    use rustix::process::{Resource, Rlimit, setrlimit};
    let limit = Rlimit {
        current: Some(ADDRESS_SPACE_BYTES_MAX),
        maximum: Some(ADDRESS_SPACE_BYTES_MAX),
    };
    setrlimit(Resource::As, limit).context("limit the address space")?;
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    setrlimit(Resource::Core, none).context("forbid core dumps")
}

fn read_folder(folder: &Path) -> Result<Vec<Vec<u8>>> {
    let mut out = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))? {
        let path = entry?.path();
        if path.is_file() {
            out.push(std::fs::read(&path)?);
        }
    }
    out.sort();
    Ok(out)
}
