//! Benchmarks: `cargo xtask bench NAME [--json] [--quick]`.
//!
//! A benchmark is a function that returns [`Row`]s and may leave pictures; it is listed in [`all`]. A full run keeps
//! its table in `docs/benchmarks.md` with the command and the machine; `--quick` only shows that it works.

mod ft;
pub mod host;
mod machine_peers;
mod machine_state;
mod markdown;
mod pool;
mod pool_scale;
pub mod row;
pub mod svg;

use anyhow::{Context, Result, bail};
use row::Row;
use std::path::Path;
use std::process::Command;

/// Arguments of `bench`.
#[derive(clap::Args)]
pub struct Args {
    /// Which benchmark.
    name: Option<String>,
    /// One line of JSON per row, instead of a table.
    #[arg(long)]
    json: bool,
    /// Fewer cases and rounds; nothing is kept.
    #[arg(long)]
    quick: bool,
    /// Only cases whose name contains this; nothing is kept.
    #[arg(long, default_value = "")]
    case: String,
}

/// How much of a benchmark is wanted.
pub struct Extent<'a> {
    /// Fewer cases and rounds.
    pub quick: bool,
    /// Only cases whose name contains this.
    pub case: &'a str,
}

/// What a benchmark found.
pub struct Report {
    /// The numbers.
    pub rows: Vec<Row>,
    /// Pictures: file name in `docs/img`, and SVG text.
    pub pictures: Vec<(String, String)>,
    /// What a reader must know to read the table.
    pub notes: String,
}

/// A benchmark.
pub struct Bench {
    /// Name on the command line.
    pub name: &'static str,
    /// One line for the list and the heading.
    pub what: &'static str,
    /// Measures.
    pub run: fn(&Extent) -> Result<Report>,
}

/// All benchmarks.
fn all() -> Vec<Bench> {
    vec![
        ft::bench(),
        machine_peers::bench(),
        machine_state::bench(),
        pool::bench(),
        pool_scale::bench(),
    ]
}

/// Runs a benchmark. False when a goal was missed.
pub fn run(root: &Path, args: &Args) -> Result<bool> {
    let benches = all();
    let Some(name) = &args.name else {
        for b in &benches {
            println!("{:16} {}", b.name, b.what);
        }
        return Ok(true);
    };
    let Some(bench) = benches.iter().find(|b| b.name == name) else {
        bail!("no benchmark {name}; `cargo xtask bench` lists them");
    };
    let report = (bench.run)(&Extent {
        quick: args.quick,
        case: &args.case,
    })?;
    let table = markdown::tables(&report.rows);
    if args.json {
        for row in &report.rows {
            println!("{}", serde_json::to_string(row)?);
        }
    } else {
        println!("{table}");
    }
    if !args.quick && args.case.is_empty() {
        keep(root, bench, &report, &table)?;
    }
    let missed: Vec<&Row> = report.rows.iter().filter(|r| r.met == Some(false)).collect();
    for r in &missed {
        eprintln!(
            "goal missed: {} {} {}: {} {}, goal {}",
            r.bench,
            r.metric,
            r.case,
            r.value,
            r.unit,
            r.goal.as_deref().unwrap_or("")
        );
    }
    Ok(missed.is_empty())
}

/// The programs that the rig puts into servers.
fn build_programs() -> Result<()> {
    let status = Command::new("cargo")
        // As ./test builds: other targets have other features, and all would be built twice.
        .args(["build", "--release", "--workspace", "--bins", "--tests"])
        .status()
        .context("run cargo")?;
    if !status.success() {
        bail!("steadfast and steadfast-rig do not build");
    }
    Ok(())
}

fn keep(root: &Path, bench: &Bench, report: &Report, table: &str) -> Result<()> {
    let docs = root.join("docs");
    std::fs::create_dir_all(docs.join("img"))?;
    let mut body = format!(
        "## {}: {}\n\n`cargo xtask bench {}`, {}\n\n{}\n\n{table}",
        bench.name,
        bench.what,
        bench.name,
        host::describe(),
        report.notes.trim()
    );
    for (name, svg) in &report.pictures {
        std::fs::write(docs.join("img").join(name), svg)?;
        body.push_str(&format!("\n![{}](img/{name})\n", bench.what));
    }
    let path = docs.join("benchmarks.md");
    let old = std::fs::read_to_string(&path).unwrap_or_else(|_| INTRODUCTION.to_owned());
    let new = markdown::replace_section(&old, bench.name, &body);
    std::fs::write(&path, new).with_context(|| format!("write {}", path.display()))
}

const INTRODUCTION: &str = "# Benchmarks\n\n\
Each section is the last full run of one benchmark, written by the command it names. Numbers of different sections may \
come from different machines; within a section everything was measured in one run, so ratios count more than numbers.\n";
