//! The command line, as a person uses it; and that nothing is left when the supervisor is killed.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};
use steadfast_rig::tools;

struct Rig {
    folder: tempfile::TempDir,
}

impl Rig {
    fn call(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_steadfast-rig"));
        command
            .args(arguments)
            .env("STEADFAST_RUN", self.folder.path())
            .output()
            .unwrap()
    }

    fn text(&self, arguments: &[&str]) -> String {
        let output = self.call(arguments);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "{arguments:?}: {said}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        said
    }

    fn refused(&self, arguments: &[&str], because: &str) {
        let output = self.call(arguments);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success() && said.contains(because),
            "{arguments:?} said: {said}"
        );
    }

    fn status(&self) -> serde_json::Value {
        serde_json::from_slice(&self.call(&["status", "--json"]).stdout).unwrap()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // Also when the test failed; a rig that is down already refuses.
        let _ = self.call(&["down"]);
    }
}

fn wait_gone(pid: i64) {
    let start = Instant::now();
    let alive = || {
        // A zombie that nobody reaped yet has no memory, no files, no CPU: it is gone. But not while it has other threads: the first
        // one is a zombie as soon as it has ended, and those that follow still hold the files, a listening socket too.
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
        Path::new(&format!("/proc/{pid}")).exists() && !(stat.contains(") Z ") && threads <= 1)
    };
    while alive() {
        assert!(
            start.elapsed() < Duration::from_secs(10),
            "process {pid} is still there"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn command_line() {
    if !tools::qemu_present() {
        println!("SKIPPED: command_line: qemu-system-x86_64 is not installed; run `steadfast-rig setup`");
        return;
    }
    let rig = Rig {
        folder: tempfile::tempdir().unwrap(),
    };
    rig.refused(&["status"], "steadfast-rig up");
    let up = ["up", "--servers", "1", "--mem", "512"];
    rig.text(&up);
    rig.refused(&up, "running already");
    assert_eq!(rig.text(&["shell", "s1", "hostname"]).trim(), "s1");
    assert_eq!(rig.call(&["shell", "s1", "exit 7"]).status.code(), Some(7));
    rig.refused(&["shell", "s7", "true"], "there are: s1");
    rig.refused(&["switch", "repl9", "down"], "repl0, repl1, client0");

    let local = rig.folder.path().join("file");
    std::fs::write(&local, vec![42; 300_000]).unwrap();
    rig.text(&["put", "s1", local.to_str().unwrap(), "/data/file"]);
    let back = rig.folder.path().join("back");
    rig.text(&["get", "s1", "/data/file", back.to_str().unwrap()]);
    assert_eq!(std::fs::read(&back).unwrap(), vec![42; 300_000]);

    rig.text(&["switch", "client0", "loss", "25", "s1"]);
    assert!(rig.text(&["status"]).contains("loss 25 %"));
    rig.text(&["heal"]);
    assert!(!rig.text(&["status"]).contains("loss"));
    assert!(rig.text(&["client", "cat", "/proc/net/dev"]).contains("client0"));

    rig.text(&["kill", "s1"]);
    assert_eq!(rig.call(&["status"]).status.code(), Some(3));
    rig.refused(&["shell", "s1", "true"], "is off");
    rig.text(&["start", "s1"]);
    assert_eq!(
        rig.text(&["shell", "s1", "stat -c %s /data/file"]).trim(),
        "300000"
    );

    // The supervisor dies without a chance to clean up: its servers die with it, and the next rig sweeps.
    let status = rig.status();
    let (supervisor, qemu) = (
        status["supervisor"].as_i64().unwrap(),
        status["servers"][0]["qemu_pid"].as_i64().unwrap(),
    );
    let files = status["folder"].as_str().unwrap().to_string();
    // SAFETY: a process of this test, by its number.
    assert_eq!(unsafe { libc::kill(supervisor as i32, libc::SIGKILL) }, 0);
    wait_gone(supervisor);
    wait_gone(qemu);
    rig.refused(&["status"], "steadfast-rig up");
    rig.text(&up);
    assert!(
        !Path::new(&files).exists(),
        "the files of the dead rig were not swept"
    );
    let status = rig.status();
    rig.text(&["down"]);
    wait_gone(status["supervisor"].as_i64().unwrap());
    wait_gone(status["servers"][0]["qemu_pid"].as_i64().unwrap());
}
