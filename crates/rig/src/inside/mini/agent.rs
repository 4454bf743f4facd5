//! What a host needs of QEMU's guest agent, on vsock port 9999: commands in the guest. There is no shell here: they are built in, behind
//! `/bin/sh -c`. The service that they are about is a word that somebody sets.
//!
//! | command | exits with |
//! |---|---|
//! | `service-well` | 0 unless TCP port 10 was told `service_ill` |
//! | `service-restart` | 0; the service is well again |
//! | anything else | 127 |

use super::Guest;
use serde_json::{Value, json};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::sync::atomic::Ordering;

/// Where it listens.
pub const PORT: u32 = 9999;
const LINE_BYTES_MAX: u64 = 64 << 10;
/// Before an answer that whoever asks waits for.
const DELIMITER: u8 = 0xff;

/// Answers one client to its end.
pub fn answer(guest: &Guest, stream: File) -> io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut writer = stream;
    // A command is over before its answer is sent.
    let mut codes: Vec<i64> = Vec::new();
    loop {
        let mut line = Vec::new();
        if (&mut reader).take(LINE_BYTES_MAX).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        let fresh = line.iter().rposition(|b| *b == DELIMITER).map_or(0, |at| at + 1);
        let asked: Value = serde_json::from_slice(&line[fresh..]).unwrap_or_default();
        let given = &asked["arguments"];
        let mut bytes = Vec::new();
        let said = match asked["execute"].as_str() {
            Some("guest-ping") => json!({ "return": {} }),
            Some("guest-sync-delimited") => {
                bytes.push(DELIMITER);
                json!({ "return": given["id"] })
            }
            Some("guest-exec") => {
                codes.push(run(guest, given["arg"][1].as_str().unwrap_or_default()));
                json!({ "return": { "pid": codes.len() } })
            }
            Some("guest-exec-status") => {
                let index = given["pid"].as_u64().and_then(|p| p.checked_sub(1));
                match index.and_then(|i| codes.get(i as usize)) {
                    Some(code) => json!({ "return": { "exited": true, "exitcode": code } }),
                    None => {
                        json!({ "error": { "class": "GenericError", "desc": "there is no such process" } })
                    }
                }
            }
            _ => json!({ "error": { "class": "CommandNotFound", "desc": "this agent does not know that" } }),
        };
        bytes.extend_from_slice(said.to_string().as_bytes());
        bytes.push(b'\n');
        writer.write_all(&bytes)?;
    }
}

fn run(guest: &Guest, command: &str) -> i64 {
    match command {
        "service-well" => i64::from(guest.service_ill.load(Ordering::Acquire)),
        "service-restart" => {
            guest.service_ill.store(false, Ordering::Release);
            guest.service_restarts.fetch_add(1, Ordering::AcqRel);
            0
        }
        _ => 127,
    }
}
