//! `steadfast-fuzz`: runs fuzz targets with the stable compiler.

use anyhow::{Result, bail};
use clap::Parser;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use steadfast_fuzz::supervisor::{self, Outcome};
use steadfast_fuzz::targets::{self, Target};
use steadfast_fuzz::worker::{self, Job};

/// Feeds the monitor what a hostile guest, image or peer could. Exit code 1: a finding.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Target, or `all`; without one the list is printed.
    target: Option<String>,
    /// How long, per target.
    #[arg(long, default_value_t = 20)]
    seconds: u64,
    /// Seed of all randomness; printed, so that a run can be repeated.
    #[arg(long)]
    seed: Option<u64>,
    /// Folder with more seed inputs.
    #[arg(long)]
    corpus: Option<PathBuf>,
    /// Where inputs that crash or hang are kept.
    #[arg(long, default_value = "target/fuzz-findings")]
    findings: PathBuf,
    /// Longest time of one input in milliseconds.
    #[arg(long, default_value_t = 5000)]
    limit_ms: u64,
    /// Run this one input and nothing else.
    #[arg(long)]
    input: Option<PathBuf>,
    /// Targets at a time, for `all`.
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    #[arg(long, hide = true)]
    worker: bool,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("steadfast-fuzz: {e:#}");
            ExitCode::from(2)
        }
    }
}

fn run(args: &Args) -> Result<bool> {
    let Some(name) = &args.target else {
        for t in targets::all() {
            println!("{:16} {}", t.name, t.what);
        }
        return Ok(true);
    };
    let all = targets::all();
    let chosen: Vec<&Target> = all.iter().filter(|t| name == "all" || t.name == name).collect();
    let [first, ..] = chosen.as_slice() else {
        bail!("no target {name}; `steadfast-fuzz` lists them");
    };
    if let Some(input) = &args.input {
        worker::replay(first, input)?;
        return Ok(true);
    }
    let seed = args.seed.unwrap_or_else(|| {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(1, |d| d.as_nanos() as u64)
    });
    if args.worker {
        return work(first, args, seed);
    }
    let queue = Mutex::new(chosen.iter());
    let findings = Mutex::new(0usize);
    let broken = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..args.jobs.clamp(1, chosen.len()) {
            scope.spawn(|| {
                loop {
                    let Some(target) = queue.lock().ok().and_then(|mut q| q.next()) else {
                        return;
                    };
                    match one(target, args, seed) {
                        Ok(Outcome::Clean) => {}
                        Ok(Outcome::Finding) => *findings.lock().unwrap_or_else(|e| e.into_inner()) += 1,
                        Err(e) => broken.lock().unwrap_or_else(|e| e.into_inner()).push(e),
                    }
                }
            });
        }
    });
    if let Some(e) = broken.into_inner().unwrap_or_else(|e| e.into_inner()).pop() {
        return Err(e);
    }
    Ok(findings.into_inner().unwrap_or_else(|e| e.into_inner()) == 0)
}

fn one(target: &Target, args: &Args, seed: u64) -> Result<Outcome> {
    if let Some(why) = (target.cannot_run)() {
        println!("SKIPPED: fuzz {}: {why}", target.name);
        return Ok(Outcome::Clean);
    }
    let mut arguments: Vec<String> = vec![
        target.name.into(),
        format!("--seconds={}", args.seconds),
        format!("--seed={seed}"),
        format!("--limit-ms={}", args.limit_ms),
        format!("--findings={}", args.findings.display()),
    ];
    if let Some(corpus) = &args.corpus {
        arguments.push(format!("--corpus={}", corpus.display()));
    }
    supervisor::run(
        target,
        &arguments,
        Duration::from_secs(args.seconds),
        &args.findings,
    )
}

fn work(target: &Target, args: &Args, seed: u64) -> Result<bool> {
    let job = Job {
        time: Duration::from_secs(args.seconds),
        seed,
        input_limit: Duration::from_millis(args.limit_ms),
        findings: args.findings.clone(),
        corpus: args.corpus.clone(),
    };
    let start = Instant::now();
    let done = worker::run(target, &job)?;
    let rate = done as f64 / start.elapsed().as_secs_f64();
    println!("fuzz {:16} {done:9} inputs {rate:9.0}/s seed {seed}", target.name);
    if done == 0 {
        bail!("not one input of {} was run", target.name);
    }
    Ok(true)
}
