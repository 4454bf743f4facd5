//! What protection costs a guest that talks or works: round trips, epochs per second, bytes on the wire, CPU time.

use super::lab::{BOUND, Home, Lab, Setup, Vm};
use super::{NAME, Section};
use crate::bench::row::{Goal, Row, percentile};
use anyhow::{Context, Result};
use std::time::Instant;

/// Added to the median round trip, at most, in microseconds.
const ADDED_US: f64 = 1000.0;
/// Epochs per second at 100 pages.
const EPOCHS: f64 = 500.0;

/// Round trips of an echo in microseconds: UDP and TCP.
type Trips = [Vec<f64>; 2];

fn echo(home: &Home<'_>, hosts: &[&str], count: usize, into: &mut Trips) -> Result<()> {
    let mut client = home.client(hosts)?;
    client.resolve(BOUND)?;
    let data = [0x5a; 64];
    for n in 0..count + 20 {
        let began = Instant::now();
        client.echo(&data, BOUND)?;
        // The first ones meet caches and an idle policy.
        if n >= 20 {
            into[0].push(began.elapsed().as_secs_f64() * 1e6);
        }
    }
    let conn = client.connect(pulse::shared::ECHO_PORT, BOUND)?;
    for n in 0..count + 20 {
        let began = Instant::now();
        client.echo_stream(conn, &data, BOUND)?;
        if n >= 20 {
            into[1].push(began.elapsed().as_secs_f64() * 1e6);
        }
    }
    Ok(())
}

/// Added round trip of a UDP and a TCP echo.
pub fn round_trips(lab: &Lab, out: &mut Section) -> Result<()> {
    let setup = Setup::pulse("loop=dirty pages=100 rate=200 ip=10.0.0.2");
    let (rounds, count) = if lab.quick { (1, 100) } else { (4, 400) };
    let (mut alone, mut protected) = (Trips::default(), Trips::default());
    for _ in 0..rounds {
        let home = Home::new(lab, setup.clone())?;
        let vm = home.start("u", true)?;
        echo(&home, &["u"], count, &mut alone).with_context(|| vm.said())?;
        drop(vm);
        let (vm, _standby) = home.pair()?;
        echo(&home, &["a", "b"], count, &mut protected).with_context(|| vm.said())?;
        let s = vm.status()?;
        eprintln!(
            "echo: cuts {} pause p50 {} p99 {} commit p50 {} p99 {}",
            s["cuts"], s["pause_p50_us"], s["pause_p99_us"], s["commit_p50_us"], s["commit_p99_us"]
        );
    }
    for (of, (alone, protected)) in ["UDP", "TCP"].iter().zip(alone.iter_mut().zip(&mut protected)) {
        let case = format!("{of} echo of 64 bytes, 100 pages 200 times a second");
        for p in [50, 99] {
            let (with, without) = (percentile(protected, p), percentile(alone, p));
            out.rows.push(
                Row::new(NAME, &format!("round trip p{p}"), &case, with, "us").beside("unprotected", without),
            );
            let added = Row::new(NAME, &format!("added p{p}"), &case, with - without, "us");
            out.rows.push(if p == 50 {
                added.goal(Goal::AtMost(ADDED_US))
            } else {
                added
            });
        }
    }
    Ok(())
}

/// One run of a busy guest under protection.
struct Load {
    epochs: f64,
    pages: f64,
    wire: f64,
    primary: f64,
    standby: f64,
    pause: f64,
}

fn load(lab: &Lab, cmdline: &str, interval_us: Option<u64>) -> Result<Load> {
    let mut setup = Setup::pulse(format!("{cmdline} ip=10.0.0.2"));
    setup.interval_us = interval_us;
    setup.ram_mib = 256;
    let home = Home::new(lab, setup)?;
    let (vm, standby) = home.pair()?;
    // Once through all pages, so that each has been sent whole.
    std::thread::sleep(lab.watch() / 3);
    let (first, cpu_p, cpu_s, began) = (vm.status()?, vm.cpu(), standby.cpu(), Instant::now());
    std::thread::sleep(lab.watch());
    let last = vm.status().with_context(|| vm.said())?;
    let seconds = began.elapsed().as_secs_f64();
    let (cpu_p, cpu_s) = (vm.cpu() - cpu_p, standby.cpu() - cpu_s);
    let grown = |name: &str| Vm::number(&last, name) - Vm::number(&first, name);
    let (cuts, pages) = (grown("cuts").max(1.0), grown("pages").max(1.0));
    eprintln!(
        "{cmdline}: {:.0} cuts/s, {:.0} committed/s, {:.0} pages each, pause {} us, commit p50 {} us p99 {} us",
        cuts / seconds,
        grown("committed") / seconds,
        pages / cuts,
        last["pause_p50_us"],
        last["commit_p50_us"],
        last["commit_p99_us"]
    );
    Ok(Load {
        epochs: grown("committed") / seconds,
        pages: pages / cuts,
        wire: grown("wire_bytes_out") / (pages * 4096.0),
        primary: cpu_p.others / cuts * 1e6,
        standby: (cpu_s.others + cpu_s.vcpus) / cuts * 1e6,
        pause: Vm::number(&last, "pause_p50_us"),
    })
}

/// Epochs per second, bytes on the wire, CPU time.
pub fn epochs(lab: &Lab, out: &mut Section) -> Result<()> {
    let cases: &[(u64, u64)] = if lab.quick {
        &[(100, 1500)]
    } else {
        // Long enough for the guest to come through all its pages, which takes it about 3 us each where it has a core.
        &[(100, 1500), (1000, 5000), (10_000, 50_000)]
    };
    for &(pages, interval_us) in cases {
        let load = load(
            lab,
            &format!("loop=dirty pages={pages} content=word"),
            Some(interval_us),
        )?;
        let case = format!("all of {pages} pages, a word each, cut every {interval_us} us at most");
        let epochs = Row::new(NAME, "epochs committed", &case, load.epochs, "per s");
        out.rows.push(if pages == 100 {
            epochs.goal(Goal::AtLeast(EPOCHS))
        } else {
            epochs
        });
        push(out, &case, &load);
    }
    Ok(())
}

fn push(out: &mut Section, case: &str, load: &Load) {
    for (metric, value, unit) in [
        ("pages of an epoch", load.pages, "pages"),
        ("pause p50", load.pause, "us"),
        ("wire", load.wire, "bytes per dirty byte"),
        (
            "CPU of the primary beside its vCPUs",
            load.primary,
            "us per epoch",
        ),
        ("CPU of the standby", load.standby, "us per epoch"),
    ] {
        out.rows.push(Row::new(NAME, metric, case, value, unit));
    }
}

/// Bytes on the wire by what the guest writes.
pub fn contents(lab: &Lab, out: &mut Section) -> Result<()> {
    for (content, what) in [
        ("word", "a word of each page"),
        ("text", "text"),
        ("random", "noise"),
    ] {
        // Whole pages take the guest long: a set rate, cut by the policy alone.
        let load = load(
            lab,
            &format!("loop=dirty pages=200 rate=20 content={content}"),
            None,
        )?;
        push(out, &format!("200 pages 20 times a second: {what}"), &load);
    }
    Ok(())
}
