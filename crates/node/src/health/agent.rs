//! The agent in a guest, asked over vsock: QEMU's guest agent (`qemu-ga`), which most distributions have as a package.
//!
//! ```text
//! VM's vsock socket: CONNECT 9999 -> OK ; 0xFF guest-sync-delimited -> 0xFF id ; guest-exec -> pid ; guest-exec-status -> exit code
//! ```
//! Its protocol: QEMU's "QEMU Guest Agent Protocol Reference" (qapi/qga). An answer is one line of JSON; what another client left in the
//! agent's or our side of the stream ends with the byte 0xFF. All sizes are bounded: a guest may send anything.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

/// Where the agent listens in the guest: `qemu-ga --method=vsock-listen --path=3:9999`.
pub const AGENT_PORT: u32 = 9999;
/// An answer with the output of a command.
const ANSWER_BYTES_MAX: u64 = 1 << 20;
/// Answers to questions that somebody else did not wait for.
const STALE_MAX: usize = 16;
/// Between two looks whether a command has ended; doubles up to the second.
const LOOK: Duration = Duration::from_millis(20);
const LOOK_MAX: Duration = Duration::from_millis(500);
/// The process of a command whose start was not answered.
const UNKNOWN: i64 = -1;
/// Of what a command said, characters.
const SAID_MAX: usize = 200;

/// The agent of one VM.
#[derive(Debug)]
pub struct Agent {
    path: PathBuf,
    /// Commands that had not ended when their round was over. Each is started again only after it has ended, so that a command that
    /// hangs does not fill the guest with more of its kind.
    left: Mutex<BTreeMap<Vec<String>, i64>>,
}

impl Agent {
    /// Behind the vsock socket at `path`.
    #[must_use]
    pub fn at(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            left: Mutex::default(),
        }
    }

    /// Whether it answers. The caller bounds its time, here and below.
    ///
    /// # Errors
    /// What stands in the way.
    pub async fn ping(&self) -> Result<(), String> {
        let mut talk = Talk::begin(&self.path).await?;
        talk.ask("guest-ping", &Value::Null).await?;
        Ok(())
    }

    /// Runs a command in the guest to its end.
    ///
    /// # Errors
    /// It did not exit with 0, or could not be run.
    pub async fn run(&self, argv: &[String]) -> Result<(), String> {
        let (program, arguments) = argv.split_first().ok_or("the command is empty")?;
        let mut talk = Talk::begin(&self.path).await?;
        let earlier = self.left().get(argv).copied();
        match earlier {
            None => {}
            Some(UNKNOWN) => {
                // It was started, or not, and which process it is was not heard. It has had the time of a round.
                self.left().remove(argv);
                return Err(format!(
                    "its agent did not say in time whether it started `{program}`"
                ));
            }
            Some(pid) => match talk.exit(pid).await {
                Ok(None) => {
                    return Err(format!(
                        "`{program}` runs since an earlier check and does not end"
                    ));
                }
                // The agent was started anew since and does not know it.
                Ok(Some(_)) | Err(Refusal::Agent(_)) => drop(self.left().remove(argv)),
                Err(gone) => return Err(gone.into()),
            },
        }
        let exec = json!({ "path": program, "arg": arguments, "capture-output": true });
        self.left().insert(argv.to_vec(), UNKNOWN);
        let started = match talk.ask("guest-exec", &exec).await {
            Ok(started) => started,
            Err(refused) => {
                if let Refusal::Agent(_) = refused {
                    self.left().remove(argv);
                }
                return Err(refused.into());
            }
        };
        let pid = started["pid"]
            .as_i64()
            .filter(|pid| *pid != UNKNOWN)
            .ok_or_else(|| format!("its agent started `{program}` without saying which process it is"))?;
        self.left().insert(argv.to_vec(), pid);
        let mut pause = LOOK;
        let ended = loop {
            match talk.exit(pid).await? {
                Some(ended) => break ended,
                None => tokio::time::sleep(pause).await,
            }
            pause = (pause * 2).min(LOOK_MAX);
        };
        self.left().remove(argv);
        match ended.how {
            None => Ok(()),
            Some(how) => Err(format!("`{program}` {how}{}", ended.said)),
        }
    }

    fn left(&self) -> std::sync::MutexGuard<'_, BTreeMap<Vec<String>, i64>> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why there is no answer.
enum Refusal {
    /// The agent says so.
    Agent(String),
    /// It said nothing that could be understood.
    Lost(String),
}

impl From<String> for Refusal {
    fn from(why: String) -> Self {
        Self::Lost(why)
    }
}

impl From<Refusal> for String {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Agent(why) | Refusal::Lost(why) => why,
        }
    }
}

/// A command that has ended.
struct Ended {
    /// How, unless with 0.
    how: Option<String>,
    /// The beginning of what it said.
    said: String,
}

/// One connection.
struct Talk {
    stream: BufReader<UnixStream>,
}

impl Talk {
    async fn begin(path: &Path) -> Result<Self, String> {
        let none = |e: std::io::Error| format!("its vsock device does not answer: {}: {e}", path.display());
        let mut stream = BufReader::new(UnixStream::connect(path).await.map_err(none)?);
        let line = format!("CONNECT {AGENT_PORT}\n");
        stream.get_mut().write_all(line.as_bytes()).await.map_err(none)?;
        let mut talk = Self { stream };
        // The device hangs up if nobody listens.
        let greeted = talk.line().await.unwrap_or_default();
        if !greeted.starts_with(b"OK ") {
            return Err(format!(
                "no agent listens at vsock port {AGENT_PORT} of the guest (qemu-ga --method=vsock-listen)"
            ));
        }
        talk.synchronize().await?;
        Ok(talk)
    }

    /// What another client left half said, on either side, is passed over.
    async fn synchronize(&mut self) -> Result<(), String> {
        static NEXT: AtomicI64 = AtomicI64::new(1);
        let id = NEXT.fetch_add(1, Ordering::Relaxed) + (i64::from(std::process::id()) << 20);
        let question = json!({ "execute": "guest-sync-delimited", "arguments": { "id": id } });
        let mut bytes = vec![0xff];
        bytes.extend_from_slice(question.to_string().as_bytes());
        self.send(bytes).await?;
        for _ in 0..STALE_MAX {
            let line = self.line().await?;
            let fresh = line.iter().rposition(|b| *b == 0xff).map_or(0, |at| at + 1);
            let answer: Option<Value> = serde_json::from_slice(&line[fresh..]).ok();
            if answer.is_some_and(|a| a["return"] == id) {
                return Ok(());
            }
        }
        Err("its agent answers something else than it was asked".into())
    }

    async fn send(&mut self, mut bytes: Vec<u8>) -> Result<(), String> {
        bytes.push(b'\n');
        let sent = self.stream.get_mut().write_all(&bytes).await;
        sent.map_err(|e| format!("its agent hung up: {e}"))
    }

    async fn line(&mut self) -> Result<Vec<u8>, String> {
        let mut line = Vec::new();
        let read = (&mut self.stream)
            .take(ANSWER_BYTES_MAX)
            .read_until(b'\n', &mut line)
            .await;
        match read {
            Ok(_) if line.ends_with(b"\n") => Ok(line),
            Ok(n) if n as u64 == ANSWER_BYTES_MAX => Err(format!(
                "its agent's answer is longer than {} KiB: let the command say less",
                ANSWER_BYTES_MAX >> 10
            )),
            Ok(_) => Err("its agent hung up".into()),
            Err(e) => Err(format!("its agent hung up: {e}")),
        }
    }

    async fn ask(&mut self, what: &str, arguments: &Value) -> Result<Value, Refusal> {
        let mut question = json!({ "execute": what });
        if !arguments.is_null() {
            question["arguments"] = arguments.clone();
        }
        self.send(question.to_string().into_bytes()).await?;
        let line = self.line().await?;
        let mut answer: Value =
            serde_json::from_slice(&line).map_err(|e| format!("its agent's answer is no JSON: {e}"))?;
        match answer.get_mut("return") {
            Some(value) => Ok(value.take()),
            None => {
                let why = answer["error"]["desc"].as_str().unwrap_or("it does not say why");
                Err(Refusal::Agent(format!(
                    "its agent refuses {what}: {}",
                    short(why)
                )))
            }
        }
    }

    /// How the command ended, if it has.
    async fn exit(&mut self, pid: i64) -> Result<Option<Ended>, Refusal> {
        let status = self.ask("guest-exec-status", &json!({ "pid": pid })).await?;
        if status["exited"] != true {
            return Ok(None);
        }
        let how = match (status["exitcode"].as_i64(), status["signal"].as_i64()) {
            (Some(0), _) => None,
            (Some(code), _) => Some(format!("exits with {code}")),
            (None, Some(signal)) => Some(format!("was ended by signal {signal}")),
            (None, None) => Some("ended, its agent does not say how".into()),
        };
        let text = |name: &str| {
            let bytes = STANDARD.decode(status[name].as_str().unwrap_or_default());
            String::from_utf8_lossy(&bytes.unwrap_or_default())
                .trim()
                .to_owned()
        };
        let said = [text("err-data"), text("out-data")]
            .into_iter()
            .find(|t| !t.is_empty());
        let said = said.map_or_else(String::new, |t| format!(": {}", short(&t)));
        Ok(Some(Ended { how, said }))
    }
}

/// The beginning of a text from a guest, for people and terminals.
fn short(text: &str) -> String {
    let plain = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    plain.take(SAID_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::super::testing::runtime;
    use super::*;
    use std::io::{BufRead, Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream as Blocking};
    use std::process::{Child, Command, Stdio};
    use std::time::Instant;

    fn argv(words: &[&str]) -> Vec<String> {
        words.iter().map(|w| (*w).to_owned()).collect()
    }

    /// The vsock device's side: takes the greeting, then is whatever `serve` is.
    fn device(folder: &Path, serve: impl Fn(Blocking) + Send + 'static) -> PathBuf {
        let path = folder.join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let mut stream = stream;
                let mut greeting = [0; 13];
                if stream.read_exact(&mut greeting).is_ok() {
                    assert_eq!(&greeting, b"CONNECT 9999\n");
                    serve(stream);
                }
            }
        });
        path
    }

    struct Real(Child);

    impl Drop for Real {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    /// Installed, or unpacked by scripts/setup.sh.
    fn program() -> Option<PathBuf> {
        let from = |name: &str| std::env::var_os(name).map(PathBuf::from);
        let cache = from("STEADFAST_CACHE")
            .or_else(|| from("XDG_CACHE_HOME").map(|c| c.join("steadfast")))
            .or_else(|| from("HOME").map(|h| h.join(".cache/steadfast")));
        let unpacked = cache.map(|c| c.join("qemu-ga/usr/sbin/qemu-ga"));
        let mut all = ["/usr/sbin/qemu-ga", "/usr/bin/qemu-ga"]
            .map(PathBuf::from)
            .into_iter()
            .chain(unpacked);
        all.find(|p| p.is_file())
    }

    /// QEMU's own agent, behind a socket that greets as the device does.
    fn real(folder: &Path) -> Option<(Real, PathBuf)> {
        let socket = folder.join("ga");
        let child = Command::new(program()?)
            .args(["--method=unix-listen", "--path"])
            .arg(&socket)
            .arg("--statedir")
            .arg(folder)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let child = Real(child);
        let until = Instant::now() + Duration::from_secs(20);
        while !socket.exists() {
            assert!(Instant::now() < until, "qemu-ga does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        let path = device(folder, move |mut stream| {
            let agent = Blocking::connect(&socket).unwrap();
            stream.write_all(b"OK 1073741824\n").unwrap();
            let (mut from, mut to) = (stream.try_clone().unwrap(), agent.try_clone().unwrap());
            let up = std::thread::spawn(move || {
                let _ = std::io::copy(&mut from, &mut to);
                let _ = to.shutdown(std::net::Shutdown::Both);
            });
            let _ = std::io::copy(&mut &agent, &mut stream);
            let _ = stream.shutdown(std::net::Shutdown::Both);
            let _ = up.join();
        });
        Some((child, path))
    }

    #[test]
    fn qemus_agent_runs_commands() {
        let folder = tempfile::tempdir().unwrap();
        let Some((_agent, path)) = real(folder.path()) else {
            println!(
                "SKIPPED: there is no qemu-ga (Debian package qemu-guest-agent; scripts/setup.sh unpacks it)"
            );
            return;
        };
        let agent = Agent::at(&path);
        runtime().block_on(async {
            assert_eq!(agent.ping().await, Ok(()));
            assert_eq!(agent.run(&argv(&["true"])).await, Ok(()));
            let why = agent
                .run(&argv(&["sh", "-c", "echo it is ill >&2; exit 3"]))
                .await
                .unwrap_err();
            assert_eq!(why, "`sh` exits with 3: it is ill");
            let why = agent.run(&argv(&["/no/such/program"])).await.unwrap_err();
            assert!(why.contains("guest-exec"), "{why}");
            // One that hangs is not started again before it has ended.
            let marks = folder.path().join("marks");
            let gate = folder.path().join("gate");
            let hangs = format!(
                "echo x >> {}; while ! test -e {}; do sleep 0.05; done",
                marks.display(),
                gate.display()
            );
            let hangs = argv(&["sh", "-c", &hangs]);
            for _ in 0..3 {
                let round = tokio::time::timeout(Duration::from_millis(500), agent.run(&hangs)).await;
                assert!(!matches!(round, Ok(Ok(()))), "{round:?}");
            }
            assert_eq!(std::fs::read_to_string(&marks).unwrap(), "x\n");
            std::fs::write(&gate, "").unwrap();
            let until = Instant::now() + Duration::from_secs(20);
            while let Err(why) = agent.run(&hangs).await {
                assert!(Instant::now() < until, "{why}");
            }
            assert_eq!(std::fs::read_to_string(&marks).unwrap(), "x\nx\n");
        });
    }

    #[test]
    fn what_a_guest_says_is_bounded_and_told() {
        let said = |serve: fn(Blocking)| {
            let folder = tempfile::tempdir().unwrap();
            let agent = Agent::at(&device(folder.path(), serve));
            runtime()
                .block_on(async {
                    let command = argv(&["true"]);
                    let asked = agent.run(&command);
                    tokio::time::timeout(Duration::from_secs(20), asked)
                        .await
                        .unwrap()
                })
                .unwrap_err()
        };
        let nobody = said(|_| {});
        assert!(nobody.contains("no agent listens"), "{nobody}");
        let gone = said(|mut s| s.write_all(b"OK 5\n").unwrap());
        assert!(gone.contains("hung up"), "{gone}");
        let endless = said(|mut s| {
            s.write_all(b"OK 5\n").unwrap();
            while s.write_all(&[b'a'; 4096]).is_ok() {}
        });
        assert!(endless.contains("longer than 1024 KiB"), "{endless}");
        let babble = said(|mut s| {
            s.write_all(b"OK 5\n").unwrap();
            while s.write_all(b"{\"return\": 7}\n").is_ok() {}
        });
        assert!(babble.contains("something else"), "{babble}");
        // What an earlier client was not there to read comes first, and is passed over.
        let refused = said(|mut s| {
            s.write_all(b"OK 5\n{\"return\": {\"pid\": 1}}\n").unwrap();
            let mut lines = std::io::BufReader::new(s.try_clone().unwrap());
            let mut line = Vec::new();
            lines.read_until(b'\n', &mut line).unwrap();
            let asked: Value = serde_json::from_slice(&line[1..]).unwrap();
            let id = asked["arguments"]["id"].as_i64().unwrap();
            s.write_all("half\u{fffd}".as_bytes()).unwrap();
            s.write_all(b"\xff").unwrap();
            s.write_all(format!("{{\"return\": {id}}}\n").as_bytes()).unwrap();
            lines.read_until(b'\n', &mut line).unwrap();
            s.write_all(b"{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"Command guest-exec has been disabled\\u0007\"}}\n")
                .unwrap();
        });
        assert_eq!(
            refused,
            "its agent refuses guest-exec: Command guest-exec has been disabled "
        );
    }
}
