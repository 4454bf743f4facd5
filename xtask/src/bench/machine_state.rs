//! The pause of a cut on this machine's KVM with the flat guest `pulse`: stop, state save, dirty harvest, page copy.
//!
//! Each round lets the guest dirty all pages of its set, then does what a cut does: stops the machine, takes the state
//! of every part, takes the dirty pages, copies them into memory that was touched before, and lets the machine go on.
//! The pages lie in an even spread over all RAM up to 3 GiB, the worst case for bitmaps and caches.

use super::row::{Goal, Row, median, percentile};
use super::svg::{Bar, Chart};
use super::{Bench, Extent, Report};
use anyhow::{Context, Result, bail};
use pulse::shared::{LANE_BYTES, LANES_OFFSET, SHARED_GPA};
use pulse::{Config, Content, DiskMode};
use std::sync::Arc;
use std::time::{Duration, Instant};
use steadfast_machine::boot;
use steadfast_machine::cpuid::{self, KvmCaps, Template};
use steadfast_machine::devices::virtio::common::RateHandle;
use steadfast_machine::devices::virtio::console::{self, Console};
use steadfast_machine::devices::virtio::rng::Rng;
use steadfast_machine::kvm::{DirtyMethod, Hypervisor};
use steadfast_machine::machine::{Builder, Machine, ThreadHooks};
use steadfast_machine::memory::{Ram, RamBacking};
use steadfast_machine::vcpu::{VcpuEvent, VcpuEvents};
use steadfast_types::Gfn;
use vm_memory::{Bytes, GuestAddress};

const NAME: &str = "machine-state";
const MIB: u64 = 1 << 20;
/// Place of `chunk` among the words of [`pulse::shared::Lane`].
const CHUNK_WORD: u64 = 6;
/// The goal for the pause with 1000 pages on one vCPU.
const PAUSE_US: f64 = 500.0;
/// The goal for the pause at 8 GiB over that at 128 MiB.
const RATIO: f64 = 1.3;

/// The benchmark's entry in the list.
pub fn bench() -> Bench {
    Bench {
        name: NAME,
        what: "pause of a cut, by pages changed, size of RAM, vCPUs and dirty method",
        run,
    }
}

#[derive(Clone, Copy)]
struct Case {
    pages: u64,
    ram_mib: u64,
    vcpus: u32,
    method: DirtyMethod,
}

impl Case {
    fn name(&self) -> String {
        let Self {
            pages,
            ram_mib,
            vcpus,
            method,
        } = self;
        format!("pages={pages} ram={ram_mib}MiB vcpus={vcpus} method={method:?}")
    }
}

/// Times of the steps of a round, in microseconds.
#[derive(Default)]
struct Times {
    stop: Vec<f64>,
    save: Vec<f64>,
    harvest: Vec<f64>,
    copy: Vec<f64>,
    resume: Vec<f64>,
    pause: Vec<f64>,
    pages: Vec<f64>,
}

struct NoEvent;
impl VcpuEvents for NoEvent {
    fn vcpu_event(&self, event: VcpuEvent) {
        eprintln!("the guest ended: {event:?}");
    }
}

fn run(extent: &Extent) -> Result<Report> {
    let quick = extent.quick;
    let hypervisor = Hypervisor::open().context("this benchmark needs KVM")?;
    let methods = [DirtyMethod::Log, DirtyMethod::LogManual, DirtyMethod::Ring];
    let rounds = if quick { 5 } else { 31 };
    let base = |method| Case {
        pages: 1000,
        ram_mib: 512,
        vcpus: 1,
        method,
    };
    let mut cases = Vec::new();
    for method in methods {
        let pages: &[u64] = if quick {
            &[10, 1000]
        } else {
            &[10, 100, 1000, 5000, 10_000, 50_000]
        };
        let rams: &[u64] = if quick {
            &[128]
        } else {
            &[128, 1024, 2048, 4096, 8192]
        };
        let vcpus: &[u32] = if quick { &[2] } else { &[2, 4, 8, 16] };
        cases.extend(pages.iter().map(|&pages| Case {
            pages,
            ..base(method)
        }));
        cases.extend(rams.iter().map(|&ram_mib| Case {
            ram_mib,
            ..base(method)
        }));
        cases.extend(vcpus.iter().map(|&vcpus| Case {
            vcpus,
            ..base(method)
        }));
    }
    cases.retain(|c| c.name().contains(extent.case));
    let mut rows = Vec::new();
    let mut bars = Vec::new();
    let mut by_ram = Vec::new();
    for case in cases {
        let mut t = match measure(&hypervisor, case, rounds) {
            Ok(t) => t,
            Err(e) => {
                // The others still tell something; this one fails the run by its goal.
                eprintln!("{}: {e:#}", case.name());
                rows.push(Row::new(NAME, "failed", &case.name(), 1.0, "cases").goal(Goal::AtMost(0.0)));
                continue;
            }
        };
        eprintln!("{}: pause {:.0} us", case.name(), median(&mut t.pause));
        let name = case.name();
        let row = |metric, values: &mut Vec<f64>| Row::new(NAME, metric, &name, median(values), "us");
        let pause = row("pause", &mut t.pause);
        let counts = case.pages == 1000 && case.vcpus == 1 && case.ram_mib == 512;
        rows.push(if counts {
            pause.goal(Goal::AtMost(PAUSE_US))
        } else {
            pause
        });
        rows.push(Row::new(
            NAME,
            "pause p90",
            &name,
            percentile(&mut t.pause, 90),
            "us",
        ));
        let mut parts = Vec::new();
        for (metric, values) in [
            ("stop", &mut t.stop),
            ("save", &mut t.save),
            ("harvest", &mut t.harvest),
            ("copy", &mut t.copy),
            ("resume", &mut t.resume),
        ] {
            let r = row(metric, values);
            parts.push(r.value);
            rows.push(r);
        }
        rows.push(Row::new(NAME, "dirty", &name, median(&mut t.pages), "pages"));
        if counts || case.pages != 1000 && case.pages <= 10_000 {
            bars.push(Bar {
                label: format!("{:?}, {} pages", case.method, case.pages),
                parts,
            });
        }
        if case.pages == 1000 && case.vcpus == 1 {
            by_ram.push((case.method, case.ram_mib, median(&mut t.pause)));
        }
    }
    for method in methods {
        let at = |mib| by_ram.iter().find(|r| r.0 == method && r.1 == mib).map(|r| r.2);
        if let (Some(large), Some(small)) = (at(8192), at(128)) {
            let case = format!("pages=1000 vcpus=1 method={method:?} ram=8192MiB:128MiB");
            rows.push(Row::new(NAME, "pause", &case, large / small, "ratio").goal(Goal::AtMost(RATIO)));
        }
    }
    let chart = Chart {
        title: "Pause of a cut, 512 MiB of RAM, 1 vCPU",
        unit: "us, median",
        parts: &["stop", "save", "harvest", "copy", "resume"],
        bars,
    };
    Ok(Report {
        rows,
        pictures: vec![("machine-state.svg".into(), chart.svg())],
        notes: format!(
            "Guest `pulse`, devices virtio-rng and virtio-console. Medians of {rounds} cuts; pages spread evenly over \
             RAM; the copy goes into memory that was touched before. `pause` is all of it, from the kick to the last \
             vCPU told to run. With more vCPUs than cores, `stop` holds the time until the host has given each vCPU \
             thread a turn."
        ),
    })
}

/// Builds a machine with the guest loaded, its vCPUs at the first instruction.
fn machine(hypervisor: &Hypervisor, case: Case) -> Result<Machine> {
    let ram = Ram::new(case.ram_mib * MIB, &RamBacking::Memfd)?;
    ram.prefault();
    let config = Config::new()
        .dirty(case.pages / u64::from(case.vcpus))
        .content(Content::Unchecked)
        .ram_stride()
        .network(false, false, false)
        .disk(DiskMode::Off)
        .quiet();
    let entry = boot::flat(&ram, pulse::elf(), &config.to_string(), case.vcpus)?;
    let mut b = Builder::new(hypervisor, ram, case.vcpus, case.method, ThreadHooks::default())?;
    b.add_virtio(Box::new(Rng::new("rng", RateHandle::default())?), "io")?;
    b.add_virtio(
        Box::new(Console::new("console", Box::new(console::ring(4096).0))?),
        "io",
    )?;
    let supported = hypervisor.supported_cpuid()?;
    let caps = KvmCaps::default();
    let mut cpuids = Vec::new();
    for v in 0..case.vcpus {
        let leaves = cpuid::build(&supported, &Template::Host, v, case.vcpus, &caps)?;
        cpuids.push(leaves.as_slice().to_vec());
    }
    let m = b.build(Arc::new(NoEvent), |v| {
        cpuids.get(v as usize).cloned().unwrap_or_default()
    })?;
    for v in 0..case.vcpus {
        m.set_registers(v, |base| boot::initial_registers(&entry, v, base))?;
        m.make_runnable(v)?;
    }
    Ok(m)
}

/// `loops << 24 | pages` of each vCPU, as pages touched in all.
fn progress(m: &Machine, case: Case) -> Result<Vec<u64>> {
    let per_vcpu = case.pages / u64::from(case.vcpus);
    (0..u64::from(case.vcpus))
        .map(|v| {
            let word: u64 = m
                .ram()
                .memory()
                .read_obj(GuestAddress(SHARED_GPA + LANES_OFFSET + v * LANE_BYTES))?;
            Ok((word >> 24) * per_vcpu + (word & 0xff_ffff))
        })
        .collect()
}

/// Pages after which a vCPU tells its progress, once the guest has said so.
fn chunk(m: &Machine) -> Result<u64> {
    let bound = Instant::now() + Duration::from_secs(60);
    loop {
        let at = GuestAddress(SHARED_GPA + LANES_OFFSET + CHUNK_WORD * 8);
        match m.ram().memory().read_obj(at)? {
            0u64 if Instant::now() > bound => bail!("the guest does not start"),
            0 => std::thread::sleep(Duration::from_millis(1)),
            chunk => return Ok(chunk),
        }
    }
}

fn measure(hypervisor: &Hypervisor, case: Case, rounds: usize) -> Result<Times> {
    let m = machine(hypervisor, case)?;
    m.start_dirty_tracking()?;
    let per_vcpu = case.pages / u64::from(case.vcpus);
    let mut arena = vec![1u8; (case.pages as usize + 1024) * 4096];
    let mut dirty: Vec<Gfn> = Vec::with_capacity(case.pages as usize + 1024);
    let mut t = Times::default();
    m.resume();
    let chunk = chunk(&m)?;
    // Two rounds to warm up: first touches, and what the boot wrote.
    for round in 0..rounds + 2 {
        let before = progress(&m, case)?;
        let bound = Instant::now() + Duration::from_secs(60);
        // Every page of every vCPU's set once more, wherever the cut found it: the guest tells its progress after
        // each chunk, so it may have been up to a chunk further than it said.
        while !progress(&m, case)?
            .iter()
            .zip(&before)
            .all(|(now, then)| *now >= then + per_vcpu + chunk)
        {
            if Instant::now() > bound {
                bail!("the guest does not make progress");
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        let start = Instant::now();
        let mut q = m.quiesce()?;
        let stopped = Instant::now();
        let state = q.save()?;
        let saved = Instant::now();
        q.harvest(&mut dirty)?;
        let harvested = Instant::now();
        if dirty.len() * 4096 > arena.len() {
            if round >= 2 {
                bail!("{} pages are dirty, {} were touched", dirty.len(), case.pages);
            }
            dirty.truncate(arena.len() / 4096);
        }
        let copied_pages = m.ram().copy_pages(&dirty, &mut arena);
        let copied = Instant::now();
        drop(q);
        let end = Instant::now();
        if copied_pages != dirty.len() {
            bail!("{copied_pages} of {} dirty pages were copied", dirty.len());
        }
        if state.records().len() < 8 {
            bail!("the machine's state has only {} parts", state.records().len());
        }
        if (dirty.len() as u64) < per_vcpu * u64::from(case.vcpus) {
            bail!(
                "only {} of {} touched pages were found dirty",
                dirty.len(),
                case.pages
            );
        }
        if round >= 2 {
            let us = |a: Instant, b: Instant| (b - a).as_secs_f64() * 1e6;
            t.stop.push(us(start, stopped));
            t.save.push(us(stopped, saved));
            t.harvest.push(us(saved, harvested));
            t.copy.push(us(harvested, copied));
            t.resume.push(us(copied, end));
            t.pause.push(us(start, end));
            t.pages.push(dirty.len() as f64);
        }
    }
    Ok(t)
}
