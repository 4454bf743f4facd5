//! What a VM uses of its host, opened once: before the process gives up its privileges, and for all machines that
//! follow one another in it. A guest's reset builds a new machine from the same open files, so it needs no privilege,
//! cannot fail on a path that has changed meanwhile, and loses no lock on an image.
//!
//! A kernel or initrd is read from the start of its open file at every power-on: rewritten in place it is found
//! anew; replaced by another file of the same name it is found by the VM's next process.

use crate::assemble::{AssembleError, GiveDisk};
use crate::isolation::janitor::{NAME_BOUND, lock_folder, lock_folder_within};
use crate::spec::{Boot, DiskSpec, MemoryKind, NicTarget, VmSpec};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use steadfast_disk::image::{self, BlockIo, ImageFormat, ImageOptions};
use steadfast_disk::seed;
use steadfast_machine::devices::virtio::vsock::Vsock;
use steadfast_machine::kvm::Hypervisor;
use steadfast_net::{NetBackend, SocketBackend, SocketName, Tap, TapBackend, TapOptions};

/// Largest kernel, initrd or flat guest that is read into memory.
const BOOT_FILE_BYTES_MAX: u64 = 4 << 30;

/// Whose a VM's images and the names of its sockets are when its process begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// This process's from the start.
    Now,
    /// Another process's, which runs the VM still: see [`Resources::take_images`] and [`Resources::take_names`].
    Later,
}

/// Removes what a process left that was killed before it had the name of this socket.
pub fn remove_aside(socket: &Path, process: u32) {
    let _ = std::fs::remove_file(SocketName::aside_of(socket, process));
}

enum Card {
    Tap(Tap),
    Socket { socket: UnixDatagram, peer: PathBuf },
}

/// Open files, devices and sockets of one VM.
///
/// Shared by the machines that follow one another, of which one lives at a time.
pub struct Resources {
    /// Names of the sockets below, removed before those are closed: see [`SocketName`].
    names: Vec<SocketName>,
    /// `/dev/kvm`.
    pub hypervisor: Hypervisor,
    /// Disks in order; the seed, if any, is last. Locked while the VM lives.
    images: RwLock<Vec<Arc<dyn BlockIo>>>,
    cards: Vec<Card>,
    files: BTreeMap<PathBuf, File>,
    ram: Option<File>,
    virtio_console: Option<File>,
    vsock: Option<UnixListener>,
}

fn file_error(path: &Path) -> impl FnOnce(std::io::Error) -> AssembleError {
    let path = path.to_owned();
    move |source| AssembleError::File { path, source }
}

impl Resources {
    /// Opens all that `spec` names, but for disks that `give` has an image of. Formats of disks that it leaves open are
    /// filled in.
    ///
    /// # Errors
    /// [`AssembleError`] names what cannot be opened, and the way out.
    pub fn open(spec: &mut VmSpec, give: Option<&GiveDisk>, claim: Claim) -> Result<Self, AssembleError> {
        let mut this = Self {
            names: Vec::new(),
            hypervisor: Hypervisor::open()?,
            images: RwLock::default(),
            cards: Vec::new(),
            files: BTreeMap::new(),
            ram: None,
            virtio_console: None,
            vsock: None,
        };
        let mut images = Vec::new();
        for (i, disk) in spec.disks.iter_mut().enumerate() {
            images.push(match give.and_then(|give| give(i)) {
                Some(image) => image,
                None => open_disk(disk, claim)?,
            });
        }
        if let Some(user_data) = &spec.cloud_init {
            images.push(seed_image(spec, user_data)?);
        }
        this.images = RwLock::new(images);
        let boot_files: Vec<&PathBuf> = match &spec.boot {
            Boot::Kernel { kernel, initrd, .. } => std::iter::once(kernel).chain(initrd).collect(),
            Boot::Flat { elf, .. } => vec![elf],
            Boot::Disk { .. } => Vec::new(),
        };
        for path in boot_files {
            let file = File::open(path).map_err(file_error(path))?;
            this.files.insert(path.clone(), file);
        }
        if let MemoryKind::File(path) = &spec.memory {
            let mut open = File::options();
            open.read(true).write(true).create(true).truncate(false);
            this.ram = Some(open.open(path).map_err(file_error(path))?);
        }
        if let Some(path) = &spec.virtio_console {
            let file = File::options().append(true).create(true).open(path);
            this.virtio_console = Some(file.map_err(file_error(path))?);
        }
        for nic in &spec.nics {
            let card = this.card(&nic.to, nic.mtu, claim)?;
            this.cards.push(card);
        }
        if let Some(vsock) = &spec.vsock {
            // A dead process's janitor may be about to remove the name.
            let _lock = lock_folder(&vsock.path);
            let listens = match claim {
                Claim::Now => Vsock::listen(&vsock.path),
                Claim::Later => Vsock::listen_aside(&vsock.path),
            };
            let (name, listener) = listens.map_err(file_error(&vsock.path))?;
            this.names.push(name);
            this.vsock = Some(listener);
        }
        Ok(this)
    }

    fn card(&mut self, to: &NicTarget, mtu: Option<u16>, claim: Claim) -> Result<Card, AssembleError> {
        let options = |name: &str, bridge: Option<&String>| TapOptions {
            name: name.to_owned(),
            bridge: bridge.cloned(),
            mtu,
        };
        Ok(match to {
            NicTarget::Bridge(bridge) => Card::Tap(Tap::open(&options("", Some(bridge)))?),
            NicTarget::Tap(name) => Card::Tap(Tap::open(&options(name, None))?),
            NicTarget::Socket { own, peer } => {
                let _lock = lock_folder(own);
                let bound = match claim {
                    Claim::Now => SocketBackend::bind_kept(own),
                    Claim::Later => SocketBackend::bind_aside(own),
                };
                let (name, socket) = bound.map_err(file_error(own))?;
                self.names.push(name);
                Card::Socket {
                    socket,
                    peer: peer.clone(),
                }
            }
        })
    }

    /// Disks in order; the seed, if any, is last.
    pub fn images(&self) -> Vec<Arc<dyn BlockIo>> {
        self.images.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The next machine stands on what `give` has now, for the disks that it has an image of.
    pub fn give_again(&self, give: &GiveDisk) {
        let mut images = self.images.write().unwrap_or_else(PoisonError::into_inner);
        for (i, image) in images.iter_mut().enumerate() {
            if let Some(now) = give(i) {
                *image = now;
            }
        }
    }

    /// A handle on card `index` for the next machine.
    ///
    /// # Errors
    /// [`AssembleError`].
    pub fn backend(&self, index: usize) -> Result<Box<dyn NetBackend>, AssembleError> {
        let none = || AssembleError::Setting(format!("there is no network card {index}"));
        Ok(match self.cards.get(index).ok_or_else(none)? {
            Card::Tap(tap) => Box::new(TapBackend::new(tap.try_clone()?)),
            Card::Socket { socket, peer } => {
                let again = socket.try_clone().and_then(|s| SocketBackend::bound(s, peer));
                Box::new(again.map_err(file_error(peer))?)
            }
        })
    }

    /// What the boot file at `path` holds now.
    ///
    /// # Errors
    /// [`AssembleError::File`].
    pub fn read(&self, path: &Path) -> Result<Vec<u8>, AssembleError> {
        let read = || {
            let file = self.files.get(path).ok_or(std::io::ErrorKind::NotFound)?;
            let len = file.metadata()?.len();
            if len > BOOT_FILE_BYTES_MAX {
                return Err(std::io::Error::other(format!("{len} bytes are too much to boot")));
            }
            let mut bytes = vec![0; len as usize];
            file.read_exact_at(&mut bytes, 0)?;
            Ok(bytes)
        };
        read().map_err(file_error(path))
    }

    /// The file that holds guest RAM, if the specification names one.
    ///
    /// # Errors
    /// No descriptor to be had.
    pub fn ram_file(&self) -> std::io::Result<Option<File>> {
        self.ram.as_ref().map(File::try_clone).transpose()
    }

    /// The virtio console's output.
    ///
    /// # Errors
    /// No descriptor to be had.
    pub fn virtio_console(&self) -> std::io::Result<Option<File>> {
        self.virtio_console.as_ref().map(File::try_clone).transpose()
    }

    /// The listening socket of the vsock device.
    ///
    /// # Errors
    /// No descriptor to be had.
    pub fn vsock(&self) -> std::io::Result<Option<UnixListener>> {
        self.vsock.as_ref().map(UnixListener::try_clone).transpose()
    }

    /// Paths of the sockets that are bound here. They are removed when this is dropped; where an isolated process may
    /// not, its janitor does.
    pub fn sockets(&self) -> impl Iterator<Item = &Path> {
        self.names.iter().map(SocketName::path)
    }

    /// Gives up what only one process can have: the images' locks and the sockets' names. A process that may not
    /// rename in a socket's folder keeps that name until it ends, and says so.
    pub fn release(&self) {
        for name in &self.names {
            if let Err(error) = name.release() {
                tracing::warn!(path = %name.path().display(), %error, "a socket's path could not be released");
            }
        }
        for image in self.images() {
            if let Err(error) = image.release() {
                tracing::warn!(%error, "an image could not be released");
            }
        }
    }

    /// Takes the images of a process that has let go of them: of [`Claim::Later`].
    ///
    /// # Errors
    /// [`AssembleError`] while it has one.
    pub fn take_images(&self) -> Result<(), AssembleError> {
        self.images().iter().try_for_each(|i| i.reacquire())?;
        Ok(())
    }

    /// Takes the sockets' names of a process that stands still for good, whether it could give them up or not; all that are to be had.
    ///
    /// # Errors
    /// [`AssembleError`]: a name that is not.
    pub fn take_names(&self) -> Result<(), AssembleError> {
        let mut all = Ok(());
        for name in &self.names {
            // The janitor of the process that had the name may be about to remove it.
            let _lock = lock_folder_within(name.path(), NAME_BOUND);
            all = all.and(name.take().map_err(file_error(name.path())));
        }
        all
    }

    /// Takes back what [`Resources::release`] gave up.
    ///
    /// # Errors
    /// [`AssembleError`] while another process has a part of it; this one then has none.
    pub fn take_back(&self) -> Result<(), AssembleError> {
        let take = || {
            self.images().iter().try_for_each(|i| i.reacquire())?;
            self.names.iter().try_for_each(|name| {
                // The janitor of a process that had the name may be about to remove it.
                let _lock = lock_folder(name.path());
                name.take_back().map_err(file_error(name.path()))
            })
        };
        take().inspect_err(|_: &AssembleError| self.release())
    }
}

fn open_disk(disk: &mut DiskSpec, claim: Claim) -> Result<Arc<dyn BlockIo>, AssembleError> {
    let format = disk
        .format
        .as_deref()
        .map(str::parse::<ImageFormat>)
        .transpose()?;
    let options = ImageOptions {
        format,
        read_only: disk.read_only,
        direct: disk.direct,
        lock: claim == Claim::Now,
    };
    let image = image::open(&disk.path, &options)?;
    // The format is fixed at first sight: a guest that writes a qcow2 header into a raw disk changes nothing.
    disk.format = match image.info().format {
        ImageFormat::Raw => Some("raw".into()),
        ImageFormat::Qcow2 => Some("qcow2".into()),
        ImageFormat::Memory => disk.format.take(),
    };
    Ok(image)
}

fn seed_image(spec: &VmSpec, user_data: &Path) -> Result<Arc<dyn BlockIo>, AssembleError> {
    let text = std::fs::read(user_data).map_err(file_error(user_data))?;
    let seed = seed::Seed {
        user_data: text,
        local_hostname: spec.name.to_string(),
        instance_id: Some(spec.name.to_string()),
        network_config: None,
    };
    Ok(Arc::new(seed.to_image().map_err(|e| {
        AssembleError::Setting(format!("cloud-init seed: {e}"))
    })?))
}
