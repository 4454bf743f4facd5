//! What a simulated server starts from: this very program as `/init`, and the modules of its first stage. Made anew at each
//! start (some megabytes of copying), so it always has the program that runs the rig.

use super::cpio::Cpio;
use super::kernel::Kernel;
use crate::error::{IoContext, Result, RigError};
use crate::inside::{CONFIG_PATH, ServerConfig};
use std::path::{Path, PathBuf};

/// The `steadfast-rig` program for the inside of servers: `$STEADFAST_RIG`, else this very program when it is it, else the
/// one beside this program or in the folder above (tests run from `deps/`).
///
/// # Errors
/// When there is none: `cargo build --release -p steadfast-rig` makes it.
pub fn own_program() -> Result<PathBuf> {
    beside("steadfast-rig", "STEADFAST_RIG").ok_or_else(|| RigError::NotHere {
        what: "starting simulated servers".to_string(),
        why: "the program steadfast-rig is not beside this one; build it with \
              `cargo build --release -p steadfast-rig`, or name it in STEADFAST_RIG"
            .to_string(),
    })
}

/// The `steadfast` program that servers get: `$STEADFAST_BIN`, else the one beside this program; none when it is not built.
pub fn steadfast_program() -> Option<PathBuf> {
    beside("steadfast", "STEADFAST_BIN")
}

fn beside(name: &str, variable: &str) -> Option<PathBuf> {
    if let Some(path) = std::env::var_os(variable)
        .map(PathBuf::from)
        .filter(|path| path.is_file())
    {
        return Some(path);
    }
    let own = std::env::current_exe().ok()?;
    let folders = [own.parent(), own.parent().and_then(Path::parent)];
    folders
        .into_iter()
        .flatten()
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
}

/// An ELF program without what is only for debuggers: everything behind its last loadable segment is cut off, and the
/// table of sections with it. A file that is no 64-bit little-endian ELF is given back as it is.
pub fn stripped(mut bytes: Vec<u8>) -> Vec<u8> {
    let u16_at = |at: usize| {
        bytes
            .get(at..at + 2)
            .map(|b| u16::from_le_bytes([b[0], b[1]]) as usize)
    };
    let u64_at = |at: usize| {
        let bytes: [u8; 8] = bytes.get(at..at + 8)?.try_into().ok()?;
        usize::try_from(u64::from_le_bytes(bytes)).ok()
    };
    let end_of_segments = || {
        if bytes.get(0..6)? != b"\x7fELF\x02\x01" {
            return None;
        }
        let (table, size, count) = (u64_at(32)?, u16_at(54)?, u16_at(56)?);
        let mut end = table + size * count;
        for index in 0..count {
            let at = table + index * size;
            end = end.max(u64_at(at + 8)?.checked_add(u64_at(at + 32)?)?);
        }
        (end <= bytes.len()).then_some(end)
    };
    if let Some(end) = end_of_segments() {
        bytes.truncate(end);
        bytes[40..48].fill(0); // e_shoff
        bytes[58..64].fill(0); // e_shentsize, e_shnum, e_shstrndx
    }
    bytes
}

/// The part that all servers share: the program as `/init` and the boot modules.
pub fn base(kernel: &Kernel, modules: &[&str], program: &Path) -> Result<Vec<u8>> {
    let mut archive = Cpio::new();
    for folder in ["dev", "proc", "sys", "lower", "upper", "newroot", "tmp", "run"] {
        archive.folder(folder);
    }
    archive.character_device("dev/console", 5, 1);
    archive.character_device("dev/null", 1, 3);
    let program_bytes = std::fs::read(program).what(|| format!("read {}", program.display()))?;
    archive.file("init", 0o755, &stripped(program_bytes));
    let source = kernel.modules();
    let target = format!("lib/modules/{}", kernel.release);
    for file in kernel.closure(modules)? {
        archive.file_from(&format!("{target}/{file}"), 0o644, &source.join(&file))?;
    }
    for file in ["modules.dep", "modules.builtin"] {
        archive.file_from(&format!("{target}/{file}"), 0o644, &source.join(file))?;
    }
    Ok(archive.finish())
}

/// The part of one server: its configuration. It goes behind the shared part.
pub fn of_server(config: &ServerConfig) -> Result<Vec<u8>> {
    let text = serde_json::to_vec(config).map_err(|e| RigError::malformed("server configuration", e))?;
    let mut archive = Cpio::new();
    archive.file(CONFIG_PATH, 0o644, &text);
    Ok(archive.finish())
}
