//! However a VM's process ends, its log says why: by a request, by a signal, by a fault, and also when it is killed.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{LONG, Process, World, busy, came, can_run};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

const RUN: &str = "run";

/// Boots a VM, ends it, and gives back how it ended and what it said.
fn ended_by(end: impl FnOnce(&World, &Process), wanted: &str) -> ExitStatus {
    let world = World::new();
    let mut process = world.boot(RUN, &busy(), 2);
    // A host without cgroups is worth a word at the start.
    let before = process.said().len();
    end(&world, &process);
    let status = process.wait();
    // Whichever thread the kernel gave a signal from outside: it prefers the main one, unless that has something pending.
    let said = || {
        let said = process.said()[before..].to_owned();
        match said.split_once(", in thread ") {
            Some((head, rest)) if wanted.contains(" from process ") => {
                let after = rest.find(['\r', '\n']).map_or("", |end| &rest[end..]);
                format!("{head}{after}")
            }
            _ => said,
        }
    };
    // The janitor speaks after the process has ended.
    assert!(
        came(LONG, || said().contains(wanted)),
        "{status}: {wanted:?} is not in {:?}",
        process.said()
    );
    let words = said().lines().count();
    assert_eq!(words, wanted.lines().count(), "{:?}", process.said());
    status
}

fn signal(process: &Process, signal: i32) {
    // SAFETY: plain numbers; the process is our child and not reaped yet, so the number is its.
    assert_eq!(unsafe { libc::kill(process.id() as i32, signal) }, 0);
}

#[test]
fn pulse_last_words_of_an_orderly_end() {
    if !can_run() {
        return;
    }
    let status = ended_by(
        |world, _| drop(world.must(RUN, &["vm", "stop", "pulse"])),
        "steadfast: VM pulse ended: it was stopped by request",
    );
    assert!(status.success());
}

#[test]
fn pulse_last_words_of_signals() {
    if !can_run() {
        return;
    }
    let me = std::process::id();
    let status = ended_by(
        |_, process| signal(process, libc::SIGTERM),
        &format!(
            "steadfast: SIGTERM from process {me}: the VM's process ends\r\n\
             steadfast: VM pulse ended: a signal asked its process to end"
        ),
    );
    assert!(
        status.success(),
        "an end that was asked for is no failure: {status}"
    );
    let status = ended_by(
        |_, process| signal(process, libc::SIGBUS),
        &format!("steadfast: SIGBUS from process {me}: the VM's process ends"),
    );
    assert_eq!(status.signal(), Some(libc::SIGBUS));
}

#[test]
fn pulse_last_words_of_a_killed_process_are_the_janitors() {
    if !can_run() {
        return;
    }
    let status = ended_by(
        |_, process| signal(process, libc::SIGKILL),
        "(somebody sent SIGKILL, or the host ran out of memory: see the kernel's log)",
    );
    assert_eq!(status.signal(), Some(libc::SIGKILL));
}
