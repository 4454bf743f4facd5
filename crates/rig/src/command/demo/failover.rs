//! The main demo: two servers die, one after the other, and nobody notices more than a short wait.

use super::story::Story;
use steadfast_rig::Result;
use steadfast_rig::failover::{self, Options, Report, ms};

/// What it shows.
pub const TITLE: &str = "Steadfast: a Linux with redis goes on when the server under it dies";

/// Plays it, and prints what was measured.
///
/// # Errors
/// Whatever did not hold.
pub fn play(story: &mut Story, options: &Options) -> Result<()> {
    let report = failover::play(options, story)?;
    print(&report);
    Ok(())
}

fn print(report: &Report) {
    println!("\n  What the clients saw");
    println!(
        "    redis writes {:>7}   lost 0, repeated 0\n    web pages    {:>7}   failed 0\n    \
         session steps{:>7}   over one connection; connections reset 0",
        report.audited.writes, report.audited.pages, report.audited.steps
    );
    println!("\n  Failovers (software emulation, one thread a server)");
    println!(
        "    {:<10} {:>9} {:>9} {:>9} {:>9} {:>9} {:>11} {:>13}",
        "", "detect", "grant", "resume", "packet", "total", "wire silent", "longest wait"
    );
    for f in &report.failovers {
        println!(
            "    {:<10} {:>9} {:>9} {:>9} {:>9} {:>9} {:>11} {:>13}",
            format!("{} to {}", f.killed, f.to),
            ms(f.detect),
            ms(f.grant),
            ms(f.resume),
            ms(f.first_packet),
            ms(f.total()),
            ms(f.silence),
            ms(f.seen.longest())
        );
    }
    println!("\n  Protection");
    println!(
        "    {:<10} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>12}",
        "standby", "warm-up", "copied", "epochs/s", "pages", "pause", "lag", "redis write"
    );
    for p in &report.protections {
        let copied = format!("{} MiB", p.copied_bytes >> 20);
        let seconds = format!("{:.1} s", p.warm_up.as_secs_f64());
        match &p.stream {
            Some(s) => println!(
                "    {:<10} {seconds:>9} {copied:>9} {:>9.0} {:>9.0} {:>9} {:>9} {:>12}",
                p.standby,
                s.epochs_per_s,
                s.pages_per_epoch,
                format!("{:.1} ms", s.pause.as_secs_f64() * 1e3),
                ms(s.lag),
                ms(s.seen.writes.median)
            ),
            None => println!("    {:<10} {seconds:>9} {copied:>9}", p.standby),
        }
    }
}
