//! The rolling upgrade of the pool: one program file goes to every host, host after host.
//!
//! ```text
//! CLI --file--> a daemon: kept under its hash, tried (`--version`), wanted by the pool's settings
//! leader:  decide: next host, drained with protection kept -> UpgradeHost
//! host:    fetch from any host that has it -> check the hash -> try it -> in place of the old one -> the daemon becomes it (exec)
//! leader:  the host reports the new version -> used again -> the next
//! ```
//! A version is `RELEASE+HASH`: the release, and the first digits of the file's SHA-256. So two builds of one release differ, and
//! what a host reports is what it runs. The old program stays beside the new one (`steadfast.previous`), and is kept under its own
//! hash too: the way back is the same verb.
//!
//! The first host that fails ends the upgrade: the pool stays on two versions, which it can do, until somebody looks.

use crate::error::{IoContext, NodeError, Result, refused};
use crate::http::fetch;
use crate::journal::About;
use crate::migrate::key;
use crate::node::Node;
use crate::pki::fingerprint;
use crate::pool::Pool;
use crate::records::{SETTINGS, StoredTask, TaskState, json, now_ms, update};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use steadfast_cluster::model::{PoolSettings, Task};
use steadfast_store::Commit;
use steadfast_types::HostId;

/// Largest program file in bytes.
pub const PROGRAM_MAX: usize = 512 << 20;
/// Programs kept on a host beside the one that runs.
const KEPT: usize = 3;
/// How long a program may take to say what it is.
const TRY_BOUND: Duration = Duration::from_secs(20);
/// How long a file may take from host to host.
const FETCH_BOUND: Duration = Duration::from_secs(300);
/// A host that does not run the new version after so long has failed, ms.
const HOST_BOUND_MS: u64 = 10 * 60_000;
/// How long the answer to whoever asked may take to leave before the daemon becomes the new one.
const LAST_WORDS: Duration = Duration::from_millis(300);

/// The version of a program file: its release, as it says, and its content.
#[must_use]
pub fn version_of(release: &str, bytes: &[u8]) -> String {
    let hash = fingerprint(bytes);
    format!("{release}+{}", hash.get(..12).unwrap_or(&hash))
}

/// The version that this daemon runs.
///
/// # Errors
/// Its own file cannot be read.
pub fn own_version() -> Result<String> {
    // The file that was started, also if another has been put in its place since.
    let bytes = fs::read("/proc/self/exe").what(|| "read this program".into())?;
    Ok(version_of(env!("CARGO_PKG_VERSION"), &bytes))
}

fn folder(node: &Node) -> PathBuf {
    node.folders.data.join("programs")
}

/// The file of a version, on this host. A version that is no file name is none.
fn file(node: &Node, version: &str) -> Result<PathBuf> {
    let plain = |c: char| c.is_ascii_alphanumeric() || ".+-".contains(c);
    if version.is_empty() || version.len() > 64 || version.starts_with('.') || !version.chars().all(plain) {
        return refused(format!("{version:?} is no version"));
    }
    Ok(folder(node).join(version))
}

/// A program of a version that this host has.
///
/// # Errors
/// It has none.
pub fn read(node: &Node, version: &str) -> Result<Vec<u8>> {
    let path = file(node, version)?;
    fs::read(&path).map_err(|_| NodeError::NotFound(format!("program {version} on this host")))
}

/// Keeps a program; it must be able to say what it is. Gives its version.
///
/// # Errors
/// It does not run here.
pub fn keep(node: &Node, bytes: &[u8]) -> Result<String> {
    fs::create_dir_all(folder(node)).what(|| format!("make {}", folder(node).display()))?;
    let new = folder(node).join(format!("incoming-{}", fingerprint(bytes)));
    fs::write(&new, bytes).what(|| format!("write {}", new.display()))?;
    fs::set_permissions(&new, fs::Permissions::from_mode(0o755))
        .what(|| format!("make {} executable", new.display()))?;
    let tried = try_out(&new);
    if tried.is_err() {
        let _ = fs::remove_file(&new);
    }
    let version = version_of(&tried?, bytes);
    let path = file(node, &version)?;
    fs::rename(&new, &path).what(|| format!("keep {}", path.display()))?;
    forget_old(node, &version);
    Ok(version)
}

/// `FILE --version` must end well, soon, and name this program. Gives its release.
fn try_out(program: &Path) -> Result<String> {
    let not = |why: String| {
        NodeError::Refused(format!(
            "this file is not a steadfast that runs here: {why}; give the program that was built for this kind of machine"
        ))
    };
    let mut child = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| not(e.to_string()))?;
    let until = Instant::now() + TRY_BOUND;
    loop {
        match child.try_wait().map_err(|e| not(e.to_string()))? {
            Some(_) => break,
            None if Instant::now() > until => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(not("it does not end".into()));
            }
            None => std::thread::sleep(Duration::from_millis(10)),
        }
    }
    let out = child.wait_with_output().map_err(|e| not(e.to_string()))?;
    let said = String::from_utf8_lossy(&out.stdout);
    let release = said.strip_prefix("steadfast ").map(str::trim);
    match release.filter(|r| out.status.success() && !r.is_empty()) {
        Some(release) => Ok(release.to_owned()),
        None => Err(not(format!("`--version` {} and says {said:?}", out.status))),
    }
}

/// The oldest programs go, but the newest few and `version` stay.
fn forget_old(node: &Node, version: &str) {
    let mut all: Vec<_> = fs::read_dir(folder(node))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| Some((e.metadata().ok()?.modified().ok()?, e.path())))
        .filter(|(_, path)| path.file_name().is_none_or(|n| n != version))
        .collect();
    all.sort();
    for (_, path) in all.iter().rev().skip(KEPT) {
        let _ = fs::remove_file(path);
    }
}

/// Wants a version on all hosts, or none any more. Blocks.
///
/// # Errors
/// The store's.
pub fn want(node: &Node, version: Option<&str>, why: &str) -> Result<()> {
    update(&*node.kv(), SETTINGS, |old: Option<PoolSettings>| {
        let mut settings = old.unwrap_or_default();
        settings.upgrade_to = version.map(str::to_owned);
        Ok(Some(settings))
    })?;
    node.note(About::Pool, why);
    Ok(())
}

/// Puts a version in place on this host. The daemon becomes it a moment later.
///
/// # Errors
/// No host has it, it does not run here, or the program's folder cannot be written; nothing is changed then.
pub async fn install(node: &Arc<Node>, to: &str) -> Result<()> {
    if node.version == to {
        return Ok(());
    }
    let here = {
        let to = to.to_owned();
        node.blocking(move |n| Ok(read(n, &to).ok())).await?
    };
    let bytes = match here {
        Some(bytes) => bytes,
        None => fetch_from_others(node, to).await?,
    };
    let to = to.to_owned();
    node.blocking(move |n| put_in_place(n, &bytes, &to)).await?;
    let node = Arc::clone(node);
    tokio::spawn(async move {
        tokio::time::sleep(LAST_WORDS).await;
        node.become_new.notify_one();
    });
    Ok(())
}

async fn fetch_from_others(node: &Arc<Node>, to: &str) -> Result<Vec<u8>> {
    let pool = node.blocking(|n| Pool::load(&*n.kv())).await?;
    let me = node.host();
    let mut last = None;
    for (id, info) in pool.hosts.iter().filter(|(id, _)| **id != me) {
        let path = format!("/internal/v1/programs/{to}");
        match fetch(&node.target(id, info)?, &path, PROGRAM_MAX, FETCH_BOUND).await {
            Ok(bytes) => return Ok(bytes.into()),
            Err(error) => last = Some(format!("{id}: {error}")),
        }
    }
    Err(NodeError::NotFound(format!(
        "program {to} on any host that answers ({}); give it again: steadfast pool upgrade --binary FILE",
        last.unwrap_or_else(|| "there is no other host".into())
    )))
}

/// Blocks.
fn put_in_place(node: &Node, bytes: &[u8], to: &str) -> Result<()> {
    // What is kept is what was asked for, whoever gave it.
    let kept = keep(node, bytes)?;
    if kept != to {
        return refused(format!("what another host calls {to} is {kept}"));
    }
    let program = &node.program;
    let previous = program.with_extension("previous");
    // A copy: the program's own name is never without a file.
    let old = fs::read("/proc/self/exe").what(|| "read this program".into())?;
    keep(node, &old)?;
    let write = |path: &Path, bytes: &[u8]| -> Result<()> {
        let new = path.with_extension("new");
        fs::write(&new, bytes).what(|| format!("write {}", new.display()))?;
        fs::set_permissions(&new, fs::Permissions::from_mode(0o755))
            .what(|| format!("make {} executable", new.display()))?;
        let kept = fs::File::open(&new).and_then(|f| f.sync_all());
        kept.what(|| format!("sync {}", new.display()))?;
        fs::rename(&new, path).what(|| format!("replace {}", path.display()))
    };
    write(&previous, &old)?;
    write(program, bytes)
}

/// The leader's part: the task of a host, so that it can be seen; then the host is asked.
///
/// # Errors
/// Why the host does not do it. The upgrade has ended then.
pub async fn begin(node: &Arc<Node>, pool: &Pool, host: &HostId, to: &str) -> Result<()> {
    let task = StoredTask {
        id: format!("upgrade-{host}-{}", now_ms()),
        task: Task::Upgrade {
            host: host.clone(),
            to: to.to_owned(),
            since_ms: now_ms(),
        },
        state: TaskState::Running,
        text: "it fetches the program".into(),
        ended_ms: None,
    };
    let (key, value, id) = (key(&task.id), json(&task)?, task.id.clone());
    node.blocking(move |n| {
        n.kv()
            .commit(&Commit::default().unchanged(&key, None).put(&key, value))?;
        Ok(())
    })
    .await?;
    let asked = ask(node, pool, host, to).await;
    if let Err(error) = &asked {
        end(node, &id, host, TaskState::Failed, &error.to_string()).await?;
    }
    asked
}

async fn ask(node: &Arc<Node>, pool: &Pool, host: &HostId, to: &str) -> Result<()> {
    if *host == node.host() {
        return install(node, to).await;
    }
    let target = node.target(host, pool.host(host)?)?;
    let action = steadfast_cluster::Action::UpgradeHost {
        host: host.clone(),
        to: to.to_owned(),
    };
    let path = "/internal/v1/act";
    let method = crate::http::Method::POST;
    let _: serde_json::Value = crate::http::ask(&target, method, path, Some(&action), FETCH_BOUND).await?;
    Ok(())
}

/// Ends a host's task; one that failed or was cancelled ends the whole upgrade.
///
/// # Errors
/// The store's.
pub async fn end(node: &Arc<Node>, id: &str, host: &HostId, state: TaskState, why: &str) -> Result<()> {
    let (task_key, text, host, id) = (key(id), why.to_owned(), host.clone(), id.to_owned());
    node.blocking(move |n| {
        let mut ended = false;
        update(&*n.kv(), &task_key, |old: Option<StoredTask>| {
            Ok(old.filter(|t| t.state == TaskState::Running).map(|mut t| {
                ended = true;
                t.state = state;
                t.text = text.clone();
                t.ended_ms = Some(now_ms());
                t
            }))
        })?;
        if !ended {
            return Ok(());
        }
        n.note(&host, format!("{id}: {text}"));
        if state != TaskState::Done {
            let why = format!(
                "the upgrade stops at host {host}: {text}; the hosts before it run the new version, the others the old"
            );
            want(n, None, &why)?;
        }
        Ok(())
    })
    .await
}

/// Looks where each host's upgrade stands.
///
/// # Errors
/// The store's.
pub async fn progress(node: &Arc<Node>, pool: &Pool) -> Result<()> {
    for stored in pool.tasks.iter().filter(|t| t.state == TaskState::Running) {
        let Task::Upgrade { host, to, since_ms } = &stored.task else {
            continue;
        };
        let runs = pool
            .reports
            .get(host)
            .map(|r| r.status.versions.steadfast.as_str());
        if runs == Some(to) {
            let text = format!("it runs {to}, after {} ms", now_ms().saturating_sub(*since_ms));
            end(node, &stored.id, host, TaskState::Done, &text).await?;
        } else if now_ms() > since_ms.saturating_add(HOST_BOUND_MS) {
            let text = format!("it does not run {to} after {} s", HOST_BOUND_MS / 1000);
            end(node, &stored.id, host, TaskState::Failed, &text).await?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_of_the_content() {
        let (a, b) = (version_of("1.2", b"one"), version_of("1.2", b"two"));
        assert!(a != b && a.starts_with("1.2+"), "{a} {b}");
        assert_eq!(a, version_of("1.2", b"one"));
    }

    #[test]
    fn only_a_steadfast_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("program");
        for (script, why) in [
            ("#!/bin/sh\necho other 1.0\n", "another program"),
            ("#!/bin/sh\necho steadfast 9; exit 3\n", "it fails"),
            ("garbage", "no program"),
        ] {
            fs::write(&path, script).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            let error = try_out(&path).expect_err(why).to_string();
            assert!(error.contains("not a steadfast that runs here"), "{error}");
        }
        fs::write(&path, "#!/bin/sh\necho steadfast 0.9.9\n").unwrap();
        assert_eq!(try_out(&path).unwrap(), "0.9.9");
    }
}
