//! `steadfast-rig setup`: what the rig needs on this machine, by apt. Says nothing and changes nothing when all is there.

use std::process::{Command, Stdio};
use steadfast_rig::artifacts::packages;
use steadfast_rig::error::IoContext;
use steadfast_rig::{Result, RigError, tools};

fn apt(arguments: &[&str]) -> Result<()> {
    let mut command = Command::new(tools::find("apt-get")?);
    command
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null());
    let status = command.status().what(|| "start apt-get".to_string())?;
    if status.success() {
        return Ok(());
    }
    Err(RigError::Program {
        program: format!("apt-get {}", arguments.join(" ")),
        status: status.to_string(),
        detail: "see above; without root, ask somebody who has it".to_string(),
    })
}

/// Installs the packages of the tools that are missing.
pub fn run() -> Result<()> {
    let missing = |tool: &&(&'static str, &'static str)| tools::find(tool.0).is_err();
    let mut wanted: Vec<&str> = tools::TOOLS
        .iter()
        .filter(missing)
        .map(|(_, package)| *package)
        .collect();
    wanted.sort_unstable();
    wanted.dedup();
    if wanted.is_empty() {
        println!("all of the rig's tools are installed");
        return Ok(());
    }
    println!("installing {}", wanted.join(" "));
    apt(&["update", "-q"])?;
    let install = ["install", "-y", "-q", "--no-install-recommends"];
    let plain = apt(&[&install[..], &wanted].concat());
    if plain.is_err() && wanted.iter().any(|package| package.starts_with("qemu")) {
        // A qemu-utils newer than this release's QEMU is in the way: take all of QEMU from the release.
        let suite = packages::suite();
        let family = [
            "qemu-system-x86",
            "qemu-system-common",
            "qemu-system-data",
            "qemu-utils",
        ];
        let pinned: Vec<String> = family
            .iter()
            .map(|package| format!("{package}/{suite}"))
            .collect();
        let others = wanted
            .iter()
            .filter(|package| !package.starts_with("qemu"))
            .map(|package| (*package).to_string());
        let all: Vec<String> = pinned.into_iter().chain(others).collect();
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        println!("trying again with QEMU of {suite}");
        apt(&[&install[..], &["--allow-downgrades"], &all].concat())?;
    } else {
        plain?;
    }
    match tools::TOOLS.iter().find(missing) {
        None => Ok(()),
        Some((tool, package)) => Err(RigError::ToolMissing { tool, package }),
    }
}
