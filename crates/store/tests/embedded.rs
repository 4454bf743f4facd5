//! The embedded store: several processes, killed at any instant.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use steadfast_store::{Commit, Committed, Embedded, Kv, StoreError, random_u64};

fn put(key: &str, value: &str) -> Commit {
    Commit::default().put(key, value)
}

#[test]
fn reads_commits_conflicts_and_opens_again() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (
        Embedded::open(dir.path()).unwrap(),
        Embedded::open(dir.path()).unwrap(),
    );
    assert!(
        one.commit(&put("a/1", "x").unchanged("a/1", None))
            .unwrap()
            .is_done()
    );
    let seen = two.read(&["a/1"]).unwrap();
    assert!(
        two.commit(&put("a/1", "y").unchanged("a/1", seen.get("a/1")))
            .unwrap()
            .is_done()
    );
    let Committed::Conflict(now) = one
        .commit(&put("a/1", "z").unchanged("a/1", seen.get("a/1")))
        .unwrap()
    else {
        panic!("a stale revision was accepted");
    };
    assert_eq!(now.entries[0].value, b"y");
    one.commit(&put("b", "1").delete("a/1")).unwrap();
    drop((one, two));
    let again = Embedded::open(dir.path()).unwrap();
    assert_eq!(again.list("").unwrap().entries.len(), 1);
    assert_eq!(again.list("a").unwrap().entries.len(), 0);
    assert_eq!(again.read(&[]).unwrap().identity, seen.identity);
    assert!(matches!(again.commit(&put("", "")), Err(StoreError::Refused(_))));
    assert!(matches!(
        again.commit(&put("k", "1").put("k", "2")),
        Err(StoreError::Refused(_))
    ));
}

#[test]
fn the_log_is_rewritten_under_others() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (
        Embedded::open(dir.path()).unwrap(),
        Embedded::open(dir.path()).unwrap(),
    );
    let large = "v".repeat(200_000);
    for i in 0..30 {
        let kv = if i % 2 == 0 { &one } else { &two };
        kv.commit(&put("k", &format!("{i}{large}"))).unwrap();
        kv.commit(&put(&format!("n/{i}"), "x")).unwrap();
    }
    let length = std::fs::metadata(dir.path().join("log")).unwrap().len();
    assert!(length < 3 << 20, "{length} bytes");
    for kv in [&one, &two, &Embedded::open(dir.path()).unwrap()] {
        assert_eq!(kv.list("n/").unwrap().entries.len(), 30);
        assert!(kv.read(&["k"]).unwrap().entries[0].value.starts_with(b"29v"));
    }
}

#[test]
fn cut_short_anywhere_the_last_commit_is_whole_or_gone() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let kv = Embedded::open(dir.path()).unwrap();
    kv.commit(&put("k", "1")).unwrap();
    let before = std::fs::metadata(&log).unwrap().len() as usize;
    kv.commit(&put("k", "2").put("l", "2")).unwrap();
    drop(kv);
    let whole = std::fs::read(&log).unwrap();
    for cut in before..=whole.len() {
        std::fs::write(&log, &whole[..cut]).unwrap();
        let kv = Embedded::open(dir.path()).unwrap();
        let found = kv.list("").unwrap().entries.len();
        assert_eq!(found, if cut == whole.len() { 2 } else { 1 }, "cut at {cut}");
        kv.commit(&put("m", "3")).unwrap();
        assert_eq!(
            Embedded::open(dir.path())
                .unwrap()
                .list("")
                .unwrap()
                .entries
                .len(),
            found + 1
        );
    }
    let mut rotten = whole.clone();
    rotten[before - 1] ^= 1;
    std::fs::write(&log, &rotten).unwrap();
    assert!(matches!(
        Embedded::open(dir.path()),
        Err(StoreError::Damaged { .. })
    ));
}

#[test]
#[ignore = "not a test: a writer that is killed by killed_writers"]
fn writer_process() {
    let Some(folder) = std::env::var_os("STORE_WRITER") else {
        return;
    };
    let kv = Embedded::open(Path::new(&folder)).unwrap();
    loop {
        let now = kv.read(&["n", "copy"]).unwrap();
        let n: u64 = now
            .get("n")
            .map_or(0, |e| String::from_utf8_lossy(&e.value).parse().unwrap());
        assert_eq!(
            now.get("n").map(|e| &e.value),
            now.get("copy").map(|e| &e.value),
            "torn"
        );
        let next = (n + 1).to_string();
        let commit = put("n", next.as_str())
            .put("copy", next.as_str())
            .unchanged("n", now.get("n"));
        if kv.commit(&commit).unwrap().is_done() {
            // Confirmed: the reader on the other side of this pipe must find at least this.
            println!("confirmed {next}");
        }
    }
}

/// Writers are killed at random instants; what they were told is done is there, and no commit is half there.
#[test]
fn killed_writers() {
    let dir = tempfile::tempdir().unwrap();
    let kv = Embedded::open(dir.path()).unwrap();
    let began = Instant::now();
    let mut most = 0;
    for _ in 0..8 {
        let mut writers: Vec<_> = (0..2)
            .map(|_| {
                Command::new(std::env::current_exe().unwrap())
                    .args(["--ignored", "--exact", "writer_process", "--nocapture"])
                    .env("STORE_WRITER", dir.path())
                    .stdout(Stdio::piped())
                    .stderr(Stdio::null())
                    .spawn()
                    .unwrap()
            })
            .collect();
        std::thread::sleep(Duration::from_millis(100 + random_u64().unwrap() % 150));
        for writer in &mut writers {
            writer.kill().unwrap();
        }
        for writer in writers {
            let out = writer.wait_with_output().unwrap();
            let text = String::from_utf8_lossy(&out.stdout);
            // The last line may be cut off.
            let whole = text.rsplit_once('\n').map_or("", |(lines, _)| lines);
            let confirmed = whole
                .lines()
                .filter_map(|l| l.strip_prefix("confirmed ")?.parse::<u64>().ok());
            most = most.max(confirmed.max().unwrap_or(0));
        }
        let now = kv.read(&["n", "copy"]).unwrap();
        let value = |k| {
            now.get(k)
                .map_or(0, |e| String::from_utf8_lossy(&e.value).parse().unwrap())
        };
        let (n, copy): (u64, u64) = (value("n"), value("copy"));
        assert_eq!(n, copy, "half a commit");
        assert!(n >= most, "{most} was confirmed, {n} is there");
    }
    assert!(most > 20, "only {most} commits in {:?}", began.elapsed());
    println!("{most} commits in {:?}", began.elapsed());
}
