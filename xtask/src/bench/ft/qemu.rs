//! QEMU as a process, and its monitor protocol (QMP).

use super::lab::{BOUND, measured, wait};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Whether the peer can be measured here; says loudly why not.
pub fn there() -> bool {
    let found = Command::new("qemu-system-x86_64").arg("--version").output();
    let version = found
        .map(|o| String::from_utf8_lossy(&o.stdout).into_owned())
        .unwrap_or_default();
    if !version.contains("version 7.2") {
        let line = version.lines().next().unwrap_or("none");
        eprintln!(
            "SKIPPED: rows beside QEMU need its version 7.2 (COLO is broken in later ones); here is: {line}"
        );
        return false;
    }
    true
}

/// A process of QEMU, or of its storage daemon, that ends with this.
pub struct Qemu {
    child: Child,
    log: PathBuf,
    qmp: Option<BufReader<UnixStream>>,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Qemu {
    /// Starts `qemu-system-x86_64` with KVM, nothing by default, and these arguments; `name` names its files in `dir`.
    pub fn start(dir: &Path, name: &str, args: &[String]) -> Result<Self> {
        let socket = dir.join(format!("{name}.qmp"));
        let mut all: Vec<String> = [
            "-accel",
            "kvm",
            "-display",
            "none",
            "-nodefaults",
            "-no-user-config",
            "-msg",
            "timestamp=on",
        ]
        .map(String::from)
        .to_vec();
        all.extend([
            "-qmp".into(),
            format!("unix:{},server=on,wait=off", socket.display()),
        ]);
        all.extend(args.iter().cloned());
        let mut it = Self::spawn(dir, name, "qemu-system-x86_64", &all)?;
        let mut stream = None;
        wait("QEMU's monitor", || {
            stream = UnixStream::connect(&socket).ok();
            stream.is_some() || !it.runs()
        })?;
        let stream = stream.with_context(|| format!("QEMU ended: {}", it.log()))?;
        stream.set_read_timeout(Some(BOUND))?;
        let mut qmp = BufReader::new(stream);
        qmp.read_line(&mut String::new())?;
        it.qmp = Some(qmp);
        it.ask("qmp_capabilities", &json!({}))?;
        Ok(it)
    }

    /// Starts a program of QEMU's without a monitor.
    pub fn spawn(dir: &Path, name: &str, program: &str, args: &[String]) -> Result<Self> {
        let log = dir.join(format!("{name}.log"));
        let file = File::create(&log)?;
        let child = measured()
            .arg(program)
            .args(args)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("start {program}"))?;
        Ok(Self {
            child,
            log,
            qmp: None,
        })
    }

    /// Whether it has not ended.
    pub fn runs(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// What it said, traces too.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// A QMP command; events on the way are passed over.
    pub fn ask(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let qmp = self.qmp.as_mut().context("no monitor")?;
        let text = json!({"execute": command, "arguments": arguments}).to_string();
        qmp.get_mut().write_all(text.as_bytes())?;
        loop {
            let mut line = String::new();
            if qmp.read_line(&mut line)? == 0 {
                bail!("QEMU ended at {command}: {}", self.log());
            }
            let mut answer: Value = serde_json::from_str(&line)?;
            if !answer["error"].is_null() {
                bail!("QEMU refuses {command}: {}", answer["error"]);
            }
            if answer.get("return").is_some() {
                return Ok(answer["return"].take());
            }
        }
    }
}
