//! The pause and the progress of the loop guest, protected, beside QEMU COLO with the same guest and interval.

use super::lab::{Guest, Home, Lab, Setup, Vm, rate, wait};
use super::loop_guest;
use super::qemu::{self, Qemu};
use super::{NAME, Section};
use crate::bench::row::{Goal, Row, median};
use crate::bench::svg::Bar;
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, Instant};

/// The interval of both, in milliseconds.
const INTERVAL_MS: u64 = 20;
/// Our pause over COLO's best at 1,000 pages.
const PAUSE_RATIO: f64 = 0.1;
/// Progress at 1,000 pages over that without protection.
const PROGRESS: f64 = 0.9;

/// What was found for one side and number of pages.
struct Found {
    /// Median pause in microseconds.
    pause_us: f64,
    /// Loops per second over those without protection.
    progress: f64,
    /// Loops per second without protection.
    alone: f64,
    /// As `progress`, per second of the vCPU's CPU time: what protection costs where others do not take turns. Not known of
    /// a peer.
    per_cpu: f64,
}

/// Loops per second, and per second that the vCPU had a CPU.
fn loops(vm: &Vm, watch: Duration) -> Result<[f64; 2]> {
    let cpu = vm.cpu().vcpus;
    let (before, began) = (vm.progress(), Instant::now());
    std::thread::sleep(watch);
    let done = (vm.progress() - before) as f64;
    let cpu = vm.cpu().vcpus - cpu;
    Ok([done / began.elapsed().as_secs_f64(), done / cpu.max(1e-6)])
}

/// All rows.
pub fn run(lab: &Lab, out: &mut Section) -> Result<()> {
    let peer = qemu::there();
    let pages: &[u32] = if lab.quick { &[1000] } else { &[10, 1000, 5000] };
    for &pages in pages {
        let (ours, parts) = ours(lab, pages)?;
        out.bars.push(Bar {
            label: format!("steadfast, {pages} pages"),
            parts: [&parts[..], &[0.0]].concat(),
        });
        let case = format!("loop guest, pages={pages}, every {INTERVAL_MS} ms");
        if !peer {
            out.rows
                .push(Row::new(NAME, "pause p50", &case, ours.pause_us, "us"));
            out.rows
                .push(Row::new(NAME, "progress", &case, ours.progress, "of unprotected"));
            continue;
        }
        let mut best = f64::MAX;
        let mut found = Vec::new();
        for over in ["unix socket", "TCP"] {
            let colo = colo(lab, pages, over).with_context(|| format!("COLO over {over}, {pages} pages"))?;
            best = best.min(colo.pause_us);
            out.bars.push(Bar {
                label: format!("COLO, {over}, {pages} pages"),
                parts: vec![0.0, 0.0, 0.0, 0.0, colo.pause_us],
            });
            found.push((over, colo));
        }
        for (over, colo) in found {
            let case = format!("{case}, COLO over {over}");
            let peer = format!("COLO {over}");
            let pause = Row::new(NAME, "pause p50", &case, ours.pause_us, "us").beside(&peer, colo.pause_us);
            let progress = Row::new(NAME, "progress", &case, ours.progress, "of unprotected")
                .beside(&peer, colo.progress);
            let held = pages == 1000;
            let best_here = held && colo.pause_us <= best;
            out.rows.push(if best_here {
                pause.goal(Goal::RatioAtMost(PAUSE_RATIO))
            } else {
                pause
            });
            out.rows.push(if held {
                progress.goal(Goal::AtLeast(PROGRESS))
            } else {
                progress
            });
            out.rows.push(Row::new(
                NAME,
                "progress per CPU time",
                &case,
                ours.per_cpu,
                "of unprotected",
            ));
            out.rows
                .push(Row::new(NAME, "unprotected", &case, ours.alone, "loops/s").beside("QEMU", colo.alone));
        }
    }
    Ok(())
}

/// Ours: unprotected and protected take turns, so that a machine that becomes slower meets both.
fn ours(lab: &Lab, pages: u32) -> Result<(Found, [f64; 4])> {
    let setup = Setup::new(Guest::Loop(pages)).every(INTERVAL_MS * 1000);
    let watch = lab.watch() / 2;
    let (mut alone, mut protected, mut pause) = ([vec![], vec![]], [vec![], vec![]], Vec::new());
    let push = |to: &mut [Vec<f64>; 2], from: [f64; 2]| to.iter_mut().zip(from).for_each(|(t, f)| t.push(f));
    let mut parts = [const { Vec::new() }; 4];
    for _ in 0..if lab.quick { 1 } else { 3 } {
        let home = Home::new(lab, setup.clone())?;
        let vm = home.start("u", true)?;
        wait("the loop begins", || vm.progress() > 10).with_context(|| vm.said())?;
        push(&mut alone, loops(&vm, watch)?);
        drop(vm);
        let (vm, _standby) = home.pair()?;
        // The base epoch of the copy is none of the epochs that are measured.
        std::thread::sleep(Duration::from_millis(300));
        push(&mut protected, loops(&vm, watch)?);
        let status = vm.status()?;
        pause.push(Vm::number(&status, "pause_p50_us"));
        for (part, of) in parts.iter_mut().zip(["stop", "harvest", "copy", "state"]) {
            part.push(Vm::number(&status, &format!("last_{of}_us")));
        }
    }
    let [alone, alone_cpu] = alone.map(|mut v| median(&mut v));
    let [protected, protected_cpu] = protected.map(|mut v| median(&mut v));
    Ok((
        Found {
            pause_us: median(&mut pause),
            progress: protected / alone,
            alone,
            per_cpu: protected_cpu / alone_cpu,
        },
        parts.map(|mut p| median(&mut p)),
    ))
}

fn colo(lab: &Lab, pages: u32, over: &str) -> Result<Found> {
    let dir = lab.folder()?;
    let disk = dir.join("boot.img");
    std::fs::write(&disk, loop_guest::boot_sector(pages))?;
    let e9 = |name: &str| dir.join(format!("{name}.e9"));
    let start = |name: &str, more: &[&str]| {
        let mut args: Vec<String> = ["-M", "pc", "-m", "128", "-trace", "colo_vm_state_change"]
            .map(String::from)
            .to_vec();
        args.extend([
            "-drive".into(),
            format!("if=none,id=d,file={},format=raw,readonly=on", disk.display()),
            "-device".into(),
            "virtio-blk-pci,drive=d,bootindex=0".into(),
            "-chardev".into(),
            format!("file,id=e,path={}", e9(name).display()),
            "-device".into(),
            "isa-debugcon,iobase=0xe9,chardev=e".into(),
        ]);
        args.extend(more.iter().map(ToString::to_string));
        Qemu::start(&dir, name, &args)
    };
    let size = |path: &Path| std::fs::metadata(path).map_or(0, |m| m.len());
    let mut primary = start("primary", &[])?;
    let loops = || Ok(size(&e9("primary")) as f64);
    wait("the boot sector's loop begins", || size(&e9("primary")) > 10)?;
    let alone = rate(lab.watch(), loops)?;
    let mut secondary = start("secondary", &["-incoming", "defer"])?;
    let uri = if over == "TCP" {
        // Loopback; the secondary is asked where it listens.
        "tcp:127.0.0.1:0".to_string()
    } else {
        format!("unix:{}", dir.join("colo.sock").display())
    };
    let able = json!({"capabilities": [{"capability": "x-colo", "state": true}]});
    for qemu in [&mut primary, &mut secondary] {
        qemu.ask("migrate-set-capabilities", &able)?;
    }
    primary.ask(
        "migrate-set-parameters",
        &json!({"x-checkpoint-delay": INTERVAL_MS}),
    )?;
    secondary.ask("migrate-incoming", &json!({"uri": uri}))?;
    let uri = if over == "TCP" {
        let answer = secondary.ask("query-migrate", &json!({}))?;
        let port = &answer["socket-address"][0]["port"];
        format!("tcp:127.0.0.1:{}", port.as_str().context("no port")?)
    } else {
        uri
    };
    primary.ask("migrate", &json!({"uri": uri}))?;
    let mut state = Value::Null;
    wait("COLO begins", || {
        state = primary
            .ask("query-migrate", &json!({}))
            .map_or(Value::Null, |mut a| a["status"].take());
        state == "colo" || state == "failed" || state == "completed" || state.is_null()
    })?;
    if state != "colo" {
        bail!("the migration came to {state}: {}", primary.log());
    }
    // The first checkpoints carry all of the memory.
    std::thread::sleep(Duration::from_millis(1500));
    let before = primary.log().lines().count();
    let protected = rate(lab.watch(), loops)?;
    let log = primary.log();
    let mut pauses = pauses(log.lines().skip(before));
    if pauses.len() < 5 {
        bail!("only {} checkpoints were made: {log}", pauses.len());
    }
    Ok(Found {
        pause_us: median(&mut pauses),
        progress: protected / alone,
        alone,
        per_cpu: f64::NAN,
    })
}

/// Pauses in microseconds from lines like `1070@1795645355.071288:colo_vm_state_change Change 'run' => 'stop'`.
fn pauses<'a>(lines: impl Iterator<Item = &'a str>) -> Vec<f64> {
    let (mut stopped, mut all) = (None, Vec::new());
    for line in lines {
        let Some((head, change)) = line.split_once(":colo_vm_state_change ") else {
            continue;
        };
        let Some(at) = head.split('@').nth(1).and_then(|t| t.parse::<f64>().ok()) else {
            continue;
        };
        if change.ends_with("'stop'") {
            stopped = Some(at);
        } else if let Some(from) = stopped.take() {
            all.push((at - from) * 1e6);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    #[test]
    fn pauses_are_read_from_a_trace() {
        let trace = "7@10.000100:colo_vm_state_change Change 'stop' => 'run'\nnoise\n\
                     7@10.020000:colo_vm_state_change Change 'run' => 'stop'\n\
                     7@10.026000:colo_vm_state_change Change 'stop' => 'run'\n";
        let found = super::pauses(trace.lines());
        assert!(found.len() == 1 && (found[0] - 6000.0).abs() < 2.0, "{found:?}");
    }
}
