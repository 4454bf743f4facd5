//! Answers of the daemon as text.

use std::fmt::Write;
use steadfast_node::api::types::{Done, HostStatus, PoolStatus, VmStatus};
use steadfast_node::records::{Event, StoredTask};

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
            ]
        })
        .collect();
    table(
        &["HOST", "HEALTH", "USE", "CPU", "MEMORY", "VMS", "STANDBYS", "API"],
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

pub fn status(s: &PoolStatus) -> String {
    let mut text = String::new();
    let leader = s.leader.as_ref().map_or("nobody".into(), ToString::to_string);
    let health = if s.healthy { "healthy" } else { "NEEDS ATTENTION" };
    let _ = writeln!(
        text,
        "pool {}: {health}   store: {}   decided by: {leader}\n",
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

pub fn event(e: &Event) -> String {
    // Seconds of the day, UTC: dates are in --json.
    let s = e.at_ms / 1000 % 86_400;
    let took = e.took_ms.map_or(String::new(), |ms| format!(" ({ms} ms)"));
    format!(
        "{:02}:{:02}:{:02}.{:03} {} {} {}: {}{took}",
        s / 3600,
        s / 60 % 60,
        s % 60,
        e.at_ms % 1000,
        e.host,
        e.kind,
        e.subject,
        e.text
    )
}
