//! The file of a saved machine.
//!
//! ```text
//! header   magic "STDFSAVE", format u32, header length u32, CRC-32 of the header body
//! body     postcard: spec of the machine (opaque to this module), machine state, RAM bytes
//! pages    records of { first page u64, count u32, kind u32 } and data: zero runs carry none
//! end      record with count 0, then CRC-32 over all page records and data
//! ```
//! All numbers little-endian. Nothing is believed before its checksum: a torn or damaged file is refused whole.

use super::{MachineState, PendingFile};
use crate::memory::{Ram, RamRegion};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use steadfast_types::PAGE_SIZE;
use vm_memory::{Bytes, GuestAddress};

/// Version of the file's layout. History: 1, the first.
pub const SAVE_FORMAT: u32 = 1;
const MAGIC: &[u8; 8] = b"STDFSAVE";
const HEADER_BYTES_MAX: u32 = 64 << 20;
const KIND_ZERO: u32 = 0;
const KIND_DATA: u32 = 1;
/// Pages per record at most: 1 MiB of data.
const RUN_PAGES: u64 = 256;

/// A save file that cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The system refused.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Not a save file.
    #[error("{0} is not a saved machine")]
    NotASave(PathBuf),
    /// A format of another version.
    #[error("{path} has save format {found}, this build reads {SAVE_FORMAT}")]
    Format {
        /// The file.
        path: PathBuf,
        /// Format found.
        found: u32,
    },
    /// The file ends early or a checksum is wrong.
    #[error("{path} is damaged ({why}); nothing of it was used")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
}

#[derive(Serialize, Deserialize)]
struct Body {
    spec: Vec<u8>,
    state: MachineState,
    ram_bytes: u64,
}

/// Writes a machine to a file, atomically: the name appears only when all is on disk.
pub struct SaveWriter {
    out: BufWriter<Target>,
    path: PathBuf,
    crc: crc32fast::Hasher,
}

/// Where the bytes go.
enum Target {
    /// A file of ours, which gets its name at the end.
    Pending(PendingFile),
    /// Whoever opened it sees to its name.
    Given(File),
}

impl Target {
    fn file(&self) -> &File {
        match self {
            Self::Pending(pending) => pending.file(),
            Self::Given(file) => file,
        }
    }
}

impl Write for Target {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.file().write(buf)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.file().flush()
    }
}

impl SaveWriter {
    /// Starts a file: `spec` is opaque to this module and given back by [`SaveReader::open`].
    ///
    /// # Errors
    /// [`SaveError::Io`].
    pub fn create(path: &Path, spec: &[u8], state: &MachineState, ram_bytes: u64) -> Result<Self, SaveError> {
        // By name: a confined process could not name a nameless file.
        let pending = PendingFile::named(path).map_err(|source| SaveError::Io {
            path: path.to_owned(),
            source,
        })?;
        Self::begin(Target::Pending(pending), path, spec, state, ram_bytes)
    }

    /// As [`SaveWriter::create`], into a file that another process opened. It is made durable at the end; its name is
    /// that process's business, `path` is for messages only.
    ///
    /// # Errors
    /// [`SaveError::Io`].
    pub fn into_file(
        file: File,
        path: &Path,
        spec: &[u8],
        state: &MachineState,
        ram_bytes: u64,
    ) -> Result<Self, SaveError> {
        Self::begin(Target::Given(file), path, spec, state, ram_bytes)
    }

    fn begin(
        target: Target,
        path: &Path,
        spec: &[u8],
        state: &MachineState,
        ram_bytes: u64,
    ) -> Result<Self, SaveError> {
        let fail = |source| SaveError::Io {
            path: path.to_owned(),
            source,
        };
        let body = Body {
            spec: spec.to_vec(),
            state: state.clone(),
            ram_bytes,
        };
        let body = postcard::to_stdvec(&body).map_err(|e| fail(io::Error::other(e.to_string())))?;
        let len =
            u32::try_from(body.len()).map_err(|_| fail(io::Error::other("state is larger than 4 GiB")))?;
        let mut out = BufWriter::with_capacity(1 << 20, target);
        let mut write = |b: &[u8]| out.write_all(b).map_err(fail);
        write(MAGIC)?;
        write(&SAVE_FORMAT.to_le_bytes())?;
        write(&len.to_le_bytes())?;
        write(&crc32fast::hash(&body).to_le_bytes())?;
        write(&body)?;
        Ok(Self {
            out,
            path: path.to_owned(),
            crc: crc32fast::Hasher::new(),
        })
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), SaveError> {
        self.crc.update(bytes);
        self.out.write_all(bytes).map_err(|source| SaveError::Io {
            path: self.path.clone(),
            source,
        })
    }

    fn record(&mut self, first: u64, count: u32, kind: u32) -> Result<(), SaveError> {
        self.put(&first.to_le_bytes())?;
        self.put(&count.to_le_bytes())?;
        self.put(&kind.to_le_bytes())
    }

    /// Ends the file without memory: that stays where it is, and whoever goes on with the machine takes it from there.
    /// [`SaveReader::ram_bytes`] is 0 if [`SaveWriter::create`] was told so.
    ///
    /// # Errors
    /// [`SaveError::Io`].
    pub fn finish_without_memory(self) -> Result<(), SaveError> {
        self.end()
    }

    /// Writes all of RAM (the machine must stand still) and makes the file durable under its name.
    ///
    /// # Errors
    /// [`SaveError::Io`]; the temporary file is removed.
    pub fn finish(mut self, ram: &Ram) -> Result<(), SaveError> {
        let mut buf = vec![0u8; (RUN_PAGES * PAGE_SIZE) as usize];
        for region in ram.regions() {
            self.region(ram, region, &mut buf)?;
        }
        self.end()
    }

    fn end(mut self) -> Result<(), SaveError> {
        self.record(0, 0, KIND_ZERO)?;
        let crc = self.crc.clone().finalize();
        let path = self.path;
        let fail = |source| SaveError::Io {
            path: path.clone(),
            source,
        };
        self.out.write_all(&crc.to_le_bytes()).map_err(fail)?;
        match self.out.into_inner().map_err(|e| fail(e.into_error()))? {
            Target::Pending(pending) => pending.keep().map_err(fail),
            Target::Given(file) => file.sync_all().map_err(fail),
        }
    }

    fn region(&mut self, ram: &Ram, region: RamRegion, buf: &mut [u8]) -> Result<(), SaveError> {
        let first = region.start / PAGE_SIZE;
        let pages = region.len / PAGE_SIZE;
        let mut page = 0;
        while page < pages {
            // Holes of the memory file were never touched: they are zero without being read.
            let (data_from, data_to) = data_range(ram.file(), region, page);
            page = data_from;
            while page < data_to {
                let count = RUN_PAGES.min(data_to - page);
                let slice = &mut buf[..(count * PAGE_SIZE) as usize];
                ram.memory()
                    .read_slice(slice, GuestAddress(region.start + page * PAGE_SIZE))
                    .map_err(|e| SaveError::Io {
                        path: self.path.clone(),
                        source: io::Error::other(e.to_string()),
                    })?;
                self.runs(first + page, slice)?;
                page += count;
            }
        }
        Ok(())
    }

    /// Writes the non-zero runs of a block of pages.
    fn runs(&mut self, first: u64, block: &[u8]) -> Result<(), SaveError> {
        let page = PAGE_SIZE as usize;
        let mut start = None;
        let count = block.len() / page;
        for i in 0..=count {
            let data = i < count && block[i * page..(i + 1) * page].iter().any(|&b| b != 0);
            match (data, start) {
                (true, None) => start = Some(i),
                (false, Some(s)) => {
                    self.record(first + s as u64, (i - s) as u32, KIND_DATA)?;
                    self.put(&block[s * page..i * page])?;
                    start = None;
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// The next range of pages, from `page` on, that may hold data.
fn data_range(file: &File, region: RamRegion, page: u64) -> (u64, u64) {
    use rustix::fs::{SeekFrom, seek};
    let pages = region.len / PAGE_SIZE;
    let from = region.file_offset + page * PAGE_SIZE;
    let to_page = |offset: u64| offset.saturating_sub(region.file_offset) / PAGE_SIZE;
    match seek(file, SeekFrom::Data(from)) {
        Ok(data) => {
            let start = to_page(data).min(pages);
            let end = match seek(file, SeekFrom::Hole(data)) {
                Ok(hole) => to_page(hole.saturating_add(PAGE_SIZE - 1)).min(pages),
                Err(_) => pages,
            };
            (start, end.max(start))
        }
        // ENXIO: no data from here on.
        Err(rustix::io::Errno::NXIO) => (pages, pages),
        Err(_) => (page, pages),
    }
}

/// Reads a saved machine.
pub struct SaveReader {
    input: BufReader<File>,
    path: PathBuf,
    /// What [`SaveWriter::create`] was given.
    pub spec: Vec<u8>,
    /// State of vCPUs and devices.
    pub state: MachineState,
    /// Size of RAM in bytes; 0: it is not in the file.
    pub ram_bytes: u64,
}

impl SaveReader {
    /// Opens a file and reads all but the memory.
    ///
    /// # Errors
    /// [`SaveError`].
    pub fn open(path: &Path) -> Result<Self, SaveError> {
        let fail = |source: io::Error| match source.kind() {
            io::ErrorKind::UnexpectedEof => SaveError::Damaged {
                path: path.to_owned(),
                why: "it ends early".into(),
            },
            _ => SaveError::Io {
                path: path.to_owned(),
                source,
            },
        };
        let mut input = BufReader::with_capacity(1 << 20, File::open(path).map_err(fail)?);
        let mut head = [0u8; 20];
        input
            .read_exact(&mut head)
            .map_err(|_| SaveError::NotASave(path.to_owned()))?;
        if &head[..8] != MAGIC {
            return Err(SaveError::NotASave(path.to_owned()));
        }
        let word = |i: usize| u32::from_le_bytes([head[i], head[i + 1], head[i + 2], head[i + 3]]);
        if word(8) != SAVE_FORMAT {
            return Err(SaveError::Format {
                path: path.to_owned(),
                found: word(8),
            });
        }
        let damaged = |why: &str| SaveError::Damaged {
            path: path.to_owned(),
            why: why.into(),
        };
        if word(12) > HEADER_BYTES_MAX {
            return Err(damaged("its header is too long"));
        }
        let mut body = vec![0u8; word(12) as usize];
        input.read_exact(&mut body).map_err(fail)?;
        if crc32fast::hash(&body) != word(16) {
            return Err(damaged("the checksum of its header is wrong"));
        }
        let body: Body = postcard::from_bytes(&body).map_err(|_| damaged("its header does not parse"))?;
        Ok(Self {
            input,
            path: path.to_owned(),
            spec: body.spec,
            state: body.state,
            ram_bytes: body.ram_bytes,
        })
    }

    /// Fills fresh (all zero) RAM. On an error the RAM must be thrown away.
    ///
    /// # Errors
    /// [`SaveError::Damaged`] when the file ends early, names pages outside RAM or fails its checksum.
    pub fn load(mut self, ram: &Ram) -> Result<(), SaveError> {
        let mut crc = crc32fast::Hasher::new();
        let path = self.path.clone();
        let damaged = |why: String| SaveError::Damaged {
            path: path.clone(),
            why,
        };
        let mut buf = vec![0u8; (RUN_PAGES * PAGE_SIZE) as usize];
        loop {
            let mut head = [0u8; 16];
            self.read(&mut head)?;
            crc.update(&head);
            let first = u64::from_le_bytes([
                head[0], head[1], head[2], head[3], head[4], head[5], head[6], head[7],
            ]);
            let count = u64::from(u32::from_le_bytes([head[8], head[9], head[10], head[11]]));
            let kind = u32::from_le_bytes([head[12], head[13], head[14], head[15]]);
            if count == 0 {
                break;
            }
            if kind != KIND_DATA || count > RUN_PAGES {
                return Err(damaged(format!("a record of kind {kind} with {count} pages")));
            }
            let slice = &mut buf[..(count * PAGE_SIZE) as usize];
            self.read(slice)?;
            crc.update(slice);
            let address = first
                .checked_mul(PAGE_SIZE)
                .ok_or_else(|| damaged("a page number is absurd".into()))?;
            ram.memory()
                .write_slice(slice, GuestAddress(address))
                .map_err(|e| damaged(format!("pages at {address:#x}: {e}")))?;
        }
        let mut sum = [0u8; 4];
        self.read(&mut sum)?;
        if u32::from_le_bytes(sum) == crc.finalize() {
            Ok(())
        } else {
            Err(damaged("the checksum of its memory is wrong".into()))
        }
    }

    fn read(&mut self, buf: &mut [u8]) -> Result<(), SaveError> {
        self.input.read_exact(buf).map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof => SaveError::Damaged {
                path: self.path.clone(),
                why: "it ends early".into(),
            },
            _ => SaveError::Io {
                path: self.path.clone(),
                source,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::RamBacking;

    fn saved(dir: &Path) -> PathBuf {
        let ram = Ram::new(128 << 20, &RamBacking::Memfd).unwrap();
        ram.memory()
            .write_slice(&[7u8; 9000], GuestAddress(0x10_0fff))
            .unwrap();
        ram.memory()
            .write_obj(0xabcdu64, GuestAddress((128 << 20) - 8))
            .unwrap();
        let path = dir.join("vm.save");
        let state = MachineState::default();
        SaveWriter::create(&path, b"spec", &state, ram.bytes())
            .unwrap()
            .finish(&ram)
            .unwrap();
        path
    }

    #[test]
    fn what_was_saved_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = saved(dir.path());
        let reader = SaveReader::open(&path).unwrap();
        assert_eq!(reader.spec, b"spec");
        let ram = Ram::new(reader.ram_bytes, &RamBacking::Memfd).unwrap();
        reader.load(&ram).unwrap();
        let mut back = vec![0u8; 9000];
        ram.memory()
            .read_slice(&mut back, GuestAddress(0x10_0fff))
            .unwrap();
        assert!(back.iter().all(|&b| b == 7));
        assert_eq!(
            ram.memory()
                .read_obj::<u64>(GuestAddress((128 << 20) - 8))
                .unwrap(),
            0xabcd
        );
        assert_eq!(
            std::fs::read_dir(dir.path()).unwrap().count(),
            1,
            "no temporary file is left"
        );
    }

    #[test]
    fn every_torn_or_flipped_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = saved(dir.path());
        let whole = std::fs::read(&path).unwrap();
        let ram = Ram::new(128 << 20, &RamBacking::Memfd).unwrap();
        let refused = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            SaveReader::open(&path).and_then(|r| r.load(&ram)).is_err()
        };
        for cut in (0..whole.len()).step_by(997) {
            assert!(refused(&whole[..cut]), "cut at {cut}");
        }
        for at in (0..whole.len()).step_by(211) {
            let mut bad = whole.clone();
            bad[at] ^= 0x10;
            assert!(refused(&bad), "flipped at {at}");
        }
    }
}
