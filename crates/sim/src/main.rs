//! `steadfast-sim --seeds N [--from S]` runs many seeds on all CPUs; `--seed S` replays one with a trace.

use std::process::ExitCode;
use steadfast_epoch::Sabotage;
use steadfast_sim::{batch, run};

fn number(args: &[String], name: &str) -> Option<u64> {
    let i = args.iter().position(|a| a == name)?;
    args.get(i + 1)?.parse().ok()
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let Some(seed) = number(&args, "--seed") {
        let r = run(seed, Sabotage::None, true);
        println!("{r:#?}");
        return if r.violation.is_some() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
    }
    let Some(seeds) = number(&args, "--seeds") else {
        eprintln!("usage: steadfast-sim --seeds N [--from S] | --seed S");
        return ExitCode::from(2);
    };
    let total = batch::run_seeds(number(&args, "--from").unwrap_or(0), seeds, 20);
    print!("{total}");
    if total.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
