//! Answers of the daemon as text.

use std::fmt::Write;
use steadfast_node::api::apps::AppStatus;
use steadfast_node::api::types::{Availability, Done, HostStatus, PoolStatus, VmStatus};
use steadfast_node::journal::Told;
use steadfast_node::records::StoredTask;

/// Rows with columns as wide as they must be.
fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let all = || rows.iter();
    let width = |i: usize| {
        let cells = all().map(|r| r[i].chars().count());
        cells.chain([head[i].len()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let line = |cells: Vec<&str>| {
        let padded = cells.iter().zip(&widths).map(|(c, w)| format!("{c:<w$}"));
        format!("{}\n", padded.collect::<Vec<_>>().join("  ").trim_end())
    };
    let mut text = line(head.to_vec());
    for row in rows {
        text += &line(row.iter().map(String::as_str).collect());
    }
    text
}

fn gib(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / f64::from(1 << 30))
}

pub fn hosts(hosts: &[HostStatus]) -> String {
    let rows: Vec<_> = hosts
        .iter()
        .map(|h| {
            vec![
                h.host.to_string(),
                h.health.clone(),
                if h.witness {
                    "witness".into()
                } else {
                    h.admin.clone()
                },
                format!("{:.1} of {}", h.cpu_milli.0 as f64 / 1000.0, h.cpu_milli.1 / 1000),
                format!("{} of {} GiB", gib(h.memory_bytes.0), gib(h.memory_bytes.1)),
                h.running.to_string(),
                h.standbys.to_string(),
                h.api.clone(),
                h.version.clone(),
                match h.storages.is_empty() {
                    true => "-".into(),
                    false => h.storages.iter().cloned().collect::<Vec<_>>().join(","),
                },
            ]
        })
        .collect();
    table(
        &[
            "HOST", "HEALTH", "USE", "CPU", "MEMORY", "VMS", "STANDBYS", "API", "VERSION", "STORAGES",
        ],
        &rows,
    )
}

pub fn vms(vms: &[VmStatus]) -> String {
    let names = |list: &[steadfast_types::HostId]| {
        let all: Vec<_> = list.iter().map(ToString::to_string).collect();
        if all.is_empty() { "-".into() } else { all.join(",") }
    };
    let rows: Vec<_> = vms
        .iter()
        .map(|v| {
            vec![
                v.vm.to_string(),
                v.class.clone(),
                v.state.clone(),
                v.host.as_ref().map_or("-".into(), ToString::to_string),
                names(&v.in_sync),
                names(&v.filling),
                v.lag_epochs.to_string(),
                v.protection.clone(),
            ]
        })
        .collect();
    table(
        &[
            "VM",
            "CLASS",
            "STATE",
            "HOST",
            "IN SYNC",
            "FILLING",
            "LAG",
            "PROTECTION",
        ],
        &rows,
    )
}

pub fn applications(apps: &[AppStatus]) -> String {
    let mut text = String::new();
    for a in apps {
        let stages = a
            .start_order
            .iter()
            .map(|s| s.iter().map(ToString::to_string).collect::<Vec<_>>().join(","));
        let order: Vec<String> = stages.collect();
        let order = if order.is_empty() {
            String::new()
        } else {
            format!(", starts {}", order.join(" then "))
        };
        let _ = writeln!(
            text,
            "application {}: {}, {}; kept {}{order}",
            a.application, a.state, a.protection, a.keep
        );
        text += &vms(&a.vms);
        text.push('\n');
    }
    text
}

pub fn status(s: &PoolStatus) -> String {
    let mut text = String::new();
    let leader = s.leader.as_ref().map_or("nobody".into(), ToString::to_string);
    let led = s.store_led_by.as_ref();
    let mut led = led.map_or(String::new(), |h| format!(", led by {h}"));
    let votes: Vec<&str> = s
        .hosts
        .iter()
        .filter(|h| h.store_vote)
        .map(|h| h.host.as_str())
        .collect();
    if !votes.is_empty() {
        let _ = write!(led, ", votes of {}", votes.join(" "));
    }
    let health = if s.healthy { "healthy" } else { "NEEDS ATTENTION" };
    let _ = writeln!(
        text,
        "pool {}: {health}   store: {}{led}   decided by: {leader}\n",
        s.pool, s.store
    );
    text += &hosts(&s.hosts);
    if !s.vms.is_empty() {
        text.push('\n');
        text += &vms(&s.vms);
    }
    if !s.tasks.is_empty() {
        text.push('\n');
        text += &tasks(&s.tasks);
    }
    for problem in &s.problems {
        let _ = write!(text, "\n! {problem}");
    }
    if !s.problems.is_empty() {
        text.push('\n');
    }
    text
}

pub fn tasks(tasks: &[StoredTask]) -> String {
    let rows: Vec<_> = tasks
        .iter()
        .map(|t| {
            vec![
                t.id.clone(),
                format!("{:?}", t.state).to_lowercase(),
                t.text.clone(),
            ]
        })
        .collect();
    table(&["TASK", "STATE", "STEP"], &rows)
}

pub fn done(d: &Done) -> String {
    let mut text = String::new();
    if d.dry_run {
        text += "would do:\n";
    }
    for line in &d.plan {
        let _ = writeln!(text, "{line}");
    }
    if let Some(task) = &d.task {
        let _ = writeln!(text, "task {task}; see `steadfast pool tasks`");
    }
    text
}

pub fn event(told: &Told) -> String {
    // Seconds of the day, UTC: dates are in --json.
    let (ms, by, event) = (told.event.at_ms, &told.by, &told.event);
    let s = ms / 1000 % 86_400;
    let (h, m, s, ms) = (s / 3600, s / 60 % 60, s % 60, ms % 1000);
    format!("{h:02}:{m:02}:{s:02}.{ms:03} [{by}] {event}")
}

/// Milliseconds for people.
fn span(ms: u64) -> String {
    match ms {
        0..10_000 => format!("{ms} ms"),
        10_000..600_000 => format!("{:.1} s", ms as f64 / 1000.0),
        600_000..36_000_000 => format!("{:.1} min", ms as f64 / 60_000.0),
        _ => format!("{:.1} h", ms as f64 / 3_600_000.0),
    }
}

pub fn availability(a: &Availability) -> String {
    let r = &a.report;
    let mut text = format!("{} over {}\n", a.vm, span(a.to_ms.saturating_sub(a.from_ms)));
    let lines = [
        ("up", r.up_ms),
        ("degraded", r.degraded_ms),
        ("down", r.down_ms),
        ("off", r.off_ms),
        ("unknown", r.unknown_ms),
    ];
    for (name, ms) in lines {
        let _ = writeln!(text, "  {name:<10}{}", span(ms));
    }
    let _ = writeln!(
        text,
        "  {} times down, {} the longest",
        r.gaps,
        span(r.longest_gap_ms)
    );
    let _ = match (r.availability, r.nines) {
        (Some(share), Some(nines)) => {
            writeln!(
                text,
                "  available {:.5} % of the time wanted: {nines:.1} nines",
                share * 100.0
            )
        }
        _ => writeln!(text, "  no time in which it was wanted is known"),
    };
    text
}
