//! The rig: servers, switches and a client, made with [`RigBuilder`], ended by dropping it.
//!
//! ```text
//!   s1 s2 s3 ...   repl0  10.91.0.10+N/24   switch "repl0"
//!                  repl1  10.92.0.10+N/24   switch "repl1"
//!                  br0 on client0  10.90.0.10+N/24   switch "client0"   <- the client is 10.90.0.1; guests from 10.90.0.100
//! ```

use crate::artifacts::debian::{self, DebianGuest};
use crate::artifacts::mini::{self, MiniGuest};
use crate::artifacts::{Cache, Kernel, cache::lock_file, initramfs, packages, root, service};
use crate::error::{IoContext, Result, RigError};
use crate::host::client::Client;
use crate::host::qemu::{Disk, DiskCache, Hardware, Nic};
use crate::host::server::{BOOT_BOUND, Plan, Server};
use crate::inside::server::{BOOT_MODULES, ROOT_SERIAL};
use crate::inside::{MountConfig, NicConfig, ServerConfig};
use crate::switch::{Switch, plane::Cable};
use serde_json::json;
use std::fs::File;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// The NICs of every server, in order: two for replication, one for clients. Each is on the switch of the same name.
pub const NICS: [&str; 3] = ["repl0", "repl1", "client0"];
/// The second byte of the addresses on the switch of each NIC: 10.X.0.0/24.
const NETWORKS: [u8; 3] = [91, 92, 90];
/// The client's address on the client switch.
pub const CLIENT_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 90, 0, 1);
/// Most servers in one rig.
pub const SERVERS_MAX: usize = 32;

/// Describes a rig before it starts.
#[derive(Debug, Clone)]
pub struct RigBuilder {
    servers: usize,
    memory_mib: u32,
    cpus: u32,
    data_gib: u32,
    data_cache: DiskCache,
    client: bool,
    seed: u64,
    replication_mtu: u32,
    client_mtu: u32,
    packages: Vec<String>,
    files: Vec<(PathBuf, String)>,
    images: Vec<(String, PathBuf, Option<String>)>,
    private_images: Vec<(String, PathBuf)>,
    mini_guest: bool,
    debian_guest: bool,
    service_disk: bool,
    steadfast: Option<PathBuf>,
    run_folder: Option<PathBuf>,
    kernel_words: String,
}

impl Default for RigBuilder {
    fn default() -> Self {
        RigBuilder {
            servers: 1,
            memory_mib: 1024,
            cpus: 1,
            data_gib: 8,
            data_cache: DiskCache::Writeback,
            client: true,
            seed: 1,
            replication_mtu: 9000,
            client_mtu: 1500,
            packages: Vec::new(),
            files: Vec::new(),
            images: Vec::new(),
            private_images: Vec::new(),
            mini_guest: true,
            debian_guest: false,
            service_disk: false,
            steadfast: None,
            run_folder: None,
            kernel_words: String::new(),
        }
    }
}

impl RigBuilder {
    /// How many servers (1 to 32); they are called `s1`, `s2`, ...
    pub fn servers(mut self, count: usize) -> Self {
        self.servers = count;
        self
    }

    /// Megabytes of memory of each server; 1024 when not said.
    pub fn memory_mib(mut self, mib: u32) -> Self {
        self.memory_mib = mib;
        self
    }

    /// CPUs of each server; 1 when not said. Each is a thread of software emulation.
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// Gigabytes of each server's data disk (sparse); 8 when not said.
    pub fn data_gib(mut self, gib: u32) -> Self {
        self.data_gib = gib;
        self
    }

    /// How writes to the data disks reach this machine.
    pub fn data_cache(mut self, cache: DiskCache) -> Self {
        self.data_cache = cache;
        self
    }

    /// Whether there is a client on the client switch (it takes root); true when not said.
    pub fn client(mut self, client: bool) -> Self {
        self.client = client;
        self
    }

    /// The seed of the switches' faults.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Largest IP packet on the replication switches (9000 when not said) and on the client switch (1500).
    pub fn mtu(mut self, replication: u32, client: u32) -> Self {
        (self.replication_mtu, self.client_mtu) = (replication, client);
        self
    }

    /// More Debian packages in the servers' root (unpacked, not configured), such as `qemu-system-x86` or `fio`.
    pub fn packages(mut self, packages: &[&str]) -> Self {
        self.packages
            .extend(packages.iter().map(|name| (*name).to_string()));
        self
    }

    /// A file of this machine for the servers, under `/opt/steadfast/NAME` (read-only, executable if it is here).
    pub fn file(mut self, local: impl Into<PathBuf>, name: &str) -> Self {
        self.files.push((local.into(), name.to_string()));
        self
    }

    /// A raw image of this machine as a read-only disk of every server: `/dev/rig/SERIAL`, and mounted at `path` when it
    /// holds an ext4 file system and a path is given.
    pub fn image(mut self, serial: &str, image: impl Into<PathBuf>, path: Option<&str>) -> Self {
        self.images
            .push((serial.to_string(), image.into(), path.map(str::to_string)));
        self
    }

    /// Whether the servers have the mini guest under `/guests/mini` (see [`crate::inside::mini`]); true when not said.
    pub fn mini_guest(mut self, wanted: bool) -> Self {
        self.mini_guest = wanted;
        self
    }

    /// Whether the servers have the Debian guest's images under `/guests/debian` (see [`crate::artifacts::debian`]); false
    /// when not said: making it takes a minute, once.
    pub fn debian_guest(mut self, wanted: bool) -> Self {
        self.debian_guest = wanted;
        self
    }

    /// Whether the servers have the service disk as `/dev/rig/guests-service` (see [`crate::artifacts::service`]); false when
    /// not said.
    pub fn service_disk(mut self, wanted: bool) -> Self {
        self.service_disk = wanted;
        self
    }

    /// A disk of its own for every server that begins as a copy of this raw image: `/dev/rig/SERIAL`, written to at will,
    /// kept over the server's restarts. The copy is made as it is written (qcow2 over the image), so it costs nothing.
    pub fn disk_from(mut self, serial: &str, image: impl Into<PathBuf>) -> Self {
        self.private_images.push((serial.to_string(), image.into()));
        self
    }

    /// The `steadfast` program for the servers; when not said, `$STEADFAST_BIN` or the one beside this program.
    pub fn steadfast(mut self, program: impl Into<PathBuf>) -> Self {
        self.steadfast = Some(program.into());
        self
    }

    /// Where the run's files go; when not said, a folder under `/var/tmp` that ends with the rig.
    pub fn run_folder(mut self, folder: impl Into<PathBuf>) -> Self {
        self.run_folder = Some(folder.into());
        self
    }

    /// Words added to the servers' kernel command line.
    pub fn kernel_words(mut self, words: &str) -> Self {
        self.kernel_words = words.to_string();
        self
    }

    /// Makes what is missing, starts everything, and waits until all servers are up.
    ///
    /// # Errors
    /// [`RigError::ToolMissing`] without QEMU; whatever the first start takes (packages); a server that does not come up.
    pub fn start(self) -> Result<Rig> {
        let rig = self.start_without_waiting()?;
        for server in &rig.servers {
            server.wait_ready(BOOT_BOUND)?;
        }
        Ok(rig)
    }

    /// Like [`RigBuilder::start`], without waiting for the servers.
    pub fn start_without_waiting(mut self) -> Result<Rig> {
        if !(1..=SERVERS_MAX).contains(&self.servers) {
            return Err(RigError::Unknown(format!(
                "{} servers: a rig has 1 to {SERVERS_MAX}",
                self.servers
            )));
        }
        crate::tools::find("qemu-system-x86_64")?;
        let cache = Cache::of_user()?;
        let kernel = Kernel::of(&cache)?;
        let root_image = root::image(&cache, &kernel, &self.packages)?;
        if self.mini_guest {
            let guest = MiniGuest::of(&cache, &kernel)?;
            self.images.push((
                mini::SERIAL.to_string(),
                guest.image,
                Some(mini::MOUNTED_AT.to_string()),
            ));
        }
        if self.debian_guest {
            let guest = DebianGuest::of(&cache, &[])?;
            self.images.push((
                debian::SERIAL.to_string(),
                guest.image,
                Some(debian::MOUNTED_AT.to_string()),
            ));
        }
        if self.service_disk {
            let image = service::image(&cache)?;
            self.images.push((service::SERIAL.to_string(), image, None));
        }
        let base = Arc::new(initramfs::base(
            &kernel,
            BOOT_MODULES,
            &initramfs::own_program()?,
        )?);
        let run = RunFolder::new(self.run_folder.as_deref())?;
        let programs = self.programs_disk(&run.path)?;
        let mut switches = Vec::new();
        for (index, name) in NICS.iter().enumerate() {
            switches.push(Arc::new(Switch::start(
                name,
                self.seed.wrapping_add(index as u64),
            )?));
        }
        let client = if self.client {
            Some(self.start_client(&switches[2])?)
        } else {
            None
        };
        let mut servers = Vec::new();
        for index in 0..self.servers {
            servers.push(self.server(
                index,
                &run.path,
                &kernel,
                &root_image,
                &programs,
                &base,
                &switches,
            )?);
        }
        let rig = Rig {
            servers,
            switches,
            client,
            run,
            cache,
            kernel,
        };
        for server in &rig.servers {
            server.power_on()?;
        }
        Ok(rig)
    }

    fn start_client(&self, switch: &Switch) -> Result<Client> {
        let (client, tap) = Client::start(CLIENT_ADDRESS, 24, [0x02, 0x53, 0x46, 90, 0, 1], self.client_mtu)?;
        let port = switch.add_port("client");
        switch.plug_cable(port, Cable::Tap(tap));
        Ok(client)
    }

    /// The disk with `steadfast` and what else the caller wants in the servers; made anew for each rig.
    fn programs_disk(&self, run: &Path) -> Result<PathBuf> {
        let tree = run.join("programs");
        std::fs::create_dir_all(&tree).what(|| format!("make {}", tree.display()))?;
        let mut files = self.files.clone();
        if let Some(program) = self.steadfast.clone().or_else(initramfs::steadfast_program) {
            files.push((program, "steadfast".to_string()));
        }
        files.push((initramfs::own_program()?, "steadfast-rig".to_string()));
        for (local, name) in &files {
            let target = tree.join(name);
            if let Some(folder) = target.parent() {
                std::fs::create_dir_all(folder).what(|| format!("make {}", folder.display()))?;
            }
            std::fs::copy(local, &target).what(|| format!("copy {} for the servers", local.display()))?;
        }
        let image = run.join("programs.ext4");
        let bytes = packages::tree_bytes(&tree)? * 11 / 10 + (8 << 20);
        packages::ext4_of(Some(&tree), &image, bytes, 0, &["-O", "^has_journal", "-m", "0"])?;
        std::fs::remove_dir_all(&tree).what(|| format!("remove {}", tree.display()))?;
        Ok(image)
    }

    #[allow(clippy::too_many_arguments, reason = "the parts of one rig, used once")]
    fn server(
        &self,
        index: usize,
        run: &Path,
        kernel: &Kernel,
        root_image: &Path,
        programs: &Path,
        base: &Arc<Vec<u8>>,
        switches: &[Arc<Switch>],
    ) -> Result<Server> {
        let name = format!("s{}", index + 1);
        let folder = run.join(&name);
        std::fs::create_dir_all(&folder).what(|| format!("make {}", folder.display()))?;
        let data = folder.join("data.img");
        if !data.exists() {
            packages::ext4_of(None, &data, u64::from(self.data_gib) << 30, 0, &["-m", "0"])?;
        }
        let shared = |serial: &str, image: &Path| Disk {
            serial: serial.to_string(),
            image: image.to_path_buf(),
            read_only: true,
            qcow2: false,
            cache: DiskCache::Unsafe,
        };
        let mount = |serial: &str, path: Option<String>, read_only: bool| MountConfig {
            serial: serial.to_string(),
            path,
            read_only,
            faulty: serial == "data",
        };
        let mut disks = vec![shared(ROOT_SERIAL, root_image), shared("programs", programs)];
        let mut mounts = vec![mount("programs", Some("/opt/steadfast".to_string()), true)];
        disks.push(Disk {
            serial: "data".to_string(),
            image: data,
            read_only: false,
            qcow2: false,
            cache: self.data_cache,
        });
        mounts.push(mount("data", Some("/data".to_string()), false));
        for (serial, image, path) in &self.images {
            disks.push(shared(serial, image));
            mounts.push(mount(serial, path.clone(), true));
        }
        for (serial, base) in &self.private_images {
            let image = folder.join(format!("{serial}.qcow2"));
            if !image.exists() {
                overlay(base, &image)?;
            }
            disks.push(Disk {
                serial: serial.clone(),
                image,
                read_only: false,
                qcow2: true,
                cache: self.data_cache,
            });
            mounts.push(mount(serial, None, false));
        }
        let mut nics = Vec::new();
        let mut nic_configs = Vec::new();
        let mut ports = Vec::new();
        for (number, nic) in NICS.iter().enumerate() {
            let client_side = number == 2;
            let mac = format!("52:54:00:{:02x}:00:{:02x}", NETWORKS[number], index + 11);
            let mtu = if client_side {
                self.client_mtu
            } else {
                self.replication_mtu
            };
            nic_configs.push(NicConfig {
                mac: mac.clone(),
                name: (*nic).to_string(),
                address: format!("10.{}.0.{}/24", NETWORKS[number], index + 11),
                bridge: client_side.then(|| "br0".to_string()),
                mtu,
            });
            nics.push(Nic {
                name: (*nic).to_string(),
                mac,
                mtu,
            });
            ports.push((Arc::clone(&switches[number]), switches[number].add_port(&name)));
        }
        let mut hosts = vec![(CLIENT_ADDRESS.to_string(), "client".to_string())];
        for other in 0..self.servers {
            for (number, suffix) in ["", "-b", "-client"].iter().enumerate() {
                hosts.push((
                    format!("10.{}.0.{}", NETWORKS[number], other + 11),
                    format!("s{}{suffix}", other + 1),
                ));
            }
        }
        let hardware = Hardware {
            name: name.clone(),
            memory_mib: self.memory_mib,
            cpus: self.cpus,
            kernel: kernel.image.clone(),
            initramfs: folder.join("initramfs"),
            kernel_words: self.kernel_words.clone(),
            console: folder.join("console.log"),
            complaints: folder.join("qemu.log"),
            disks,
            nics,
        };
        let config = ServerConfig {
            name,
            nics: nic_configs,
            hosts,
            mounts,
        };
        Ok(Server::new(Plan {
            hardware,
            config,
            initramfs_base: Arc::clone(base),
            ports,
        }))
    }
}

/// An image that begins as `base` and keeps what is written.
fn overlay(base: &Path, image: &Path) -> Result<()> {
    let base = base.canonicalize().what(|| format!("find {}", base.display()))?;
    let mut create = std::process::Command::new(crate::tools::find("qemu-img")?);
    create
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
        .arg(base)
        .arg(image);
    crate::tools::run(&mut create, Duration::from_secs(60)).map(|_| ())
}

/// The folder of one run. Its lock is held for the run's life, so that a later rig can tell dead runs and sweep them.
struct RunFolder {
    path: PathBuf,
    ours: bool,
    _lock: File,
}

/// Where runs without a folder of their own go.
fn runs_folder() -> PathBuf {
    if let Some(folder) = std::env::var_os("STEADFAST_RUN").map(PathBuf::from) {
        return folder.join("runs");
    }
    // SAFETY: no memory is passed, it cannot fail.
    let user = unsafe { libc::geteuid() };
    PathBuf::from(format!("/var/tmp/steadfast-rig-{user}"))
}

impl RunFolder {
    fn new(given: Option<&Path>) -> Result<RunFolder> {
        let ours = given.is_none();
        let path = match given {
            Some(path) => path.to_path_buf(),
            None => {
                let runs = runs_folder();
                std::fs::create_dir_all(&runs).what(|| format!("make {}", runs.display()))?;
                sweep(&runs);
                unique_folder(&runs)?
            }
        };
        std::fs::create_dir_all(&path).what(|| format!("make {}", path.display()))?;
        let lock = lock_file(&path.join("lock"), Duration::ZERO)?;
        Ok(RunFolder {
            path,
            ours,
            _lock: lock,
        })
    }
}

fn unique_folder(runs: &Path) -> Result<PathBuf> {
    for number in 0..10_000 {
        let path = runs.join(format!("{}-{number}", std::process::id()));
        match std::fs::create_dir(&path) {
            Ok(()) => return Ok(path),
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e).what(|| format!("make {}", path.display())),
        }
    }
    Err(RigError::Unknown(format!("{} is full of runs", runs.display())))
}

/// Removes the folders of runs whose process is gone.
fn sweep(runs: &Path) {
    let Ok(entries) = std::fs::read_dir(runs) else {
        return;
    };
    for entry in entries.flatten() {
        let lock = entry.path().join("lock");
        // A folder without a lock is one that is just being made.
        if lock.exists() && lock_file(&lock, Duration::ZERO).is_ok() {
            // What cannot be removed now is tried again by the next rig.
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

impl RunFolder {
    /// Removes it, unless the caller named it: then it is the caller's.
    fn remove(&self) {
        if self.ours {
            // What cannot be removed now is swept by the next rig.
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        self.remove();
    }
}

/// A running data centre in a box. Dropping it ends every process and removes its files.
pub struct Rig {
    servers: Vec<Server>,
    switches: Vec<Arc<Switch>>,
    client: Option<Client>,
    run: RunFolder,
    cache: Cache,
    kernel: Kernel,
}

impl Rig {
    /// Describes a rig.
    pub fn builder() -> RigBuilder {
        RigBuilder::default()
    }

    /// All servers.
    pub fn servers(&self) -> &[Server] {
        &self.servers
    }

    /// The server with this index, from 0 (its name is one more: `s1` has index 0).
    ///
    /// # Panics
    /// When there is no such server, as indexing a slice does.
    pub fn server(&self, index: usize) -> &Server {
        &self.servers[index]
    }

    /// The server with this name.
    pub fn server_named(&self, name: &str) -> Result<&Server> {
        self.servers
            .iter()
            .find(|server| server.name() == name)
            .ok_or_else(|| {
                let known: Vec<&str> = self.servers.iter().map(Server::name).collect();
                RigError::Unknown(format!(
                    "there is no server {name}; there are: {}",
                    known.join(", ")
                ))
            })
    }

    /// All switches, in the order of [`NICS`].
    pub fn switches(&self) -> &[Arc<Switch>] {
        &self.switches
    }

    /// The switch with this name: `repl0`, `repl1` or `client0`. Its ports have the servers' names, and `client`.
    pub fn switch(&self, name: &str) -> Result<&Switch> {
        self.switches
            .iter()
            .map(Arc::as_ref)
            .find(|switch| switch.name() == name)
            .ok_or_else(|| {
                RigError::Unknown(format!(
                    "there is no switch {name}; there are: {}",
                    NICS.join(", ")
                ))
            })
    }

    /// The client on the client switch.
    ///
    /// # Errors
    /// When the rig was made without one.
    pub fn client(&self) -> Result<&Client> {
        self.client.as_ref().ok_or_else(|| RigError::NotHere {
            what: "the client".to_string(),
            why: "this rig was made without one".to_string(),
        })
    }

    /// Pulls the cable of a server's NIC: the server sees its carrier go.
    pub fn unplug(&self, server: &str, nic: &str) -> Result<()> {
        self.set_cable(server, nic, false)
    }

    /// Plugs it in again.
    pub fn plug(&self, server: &str, nic: &str) -> Result<()> {
        self.set_cable(server, nic, true)
    }

    fn set_cable(&self, server: &str, nic: &str, plugged: bool) -> Result<()> {
        let server = self.server_named(server)?;
        let (_, switch) = server.switches().find(|(name, _)| *name == nic).ok_or_else(|| {
            RigError::Unknown(format!(
                "server {} has no NIC {nic}; it has: {}",
                server.name(),
                NICS.join(", ")
            ))
        })?;
        switch.set_unplugged(server.name(), !plugged)?;
        // An off or frozen server cannot be told; its cable is pulled at the switch all the same.
        match server
            .qmp()
            .and_then(|qmp| qmp.execute("set_link", json!({"name": nic, "up": plugged})))
        {
            Ok(_) | Err(RigError::ServerOff { .. } | RigError::Timeout { .. }) => Ok(()),
            Err(other) => Err(other),
        }
    }

    /// Heals every switch: partitions, faults, pulled cables, power.
    pub fn heal_network(&self) -> Result<()> {
        for switch in &self.switches {
            switch.heal();
        }
        for server in &self.servers {
            for nic in NICS {
                self.plug(server.name(), nic)?;
            }
        }
        Ok(())
    }

    /// The folder of this run: consoles, disks.
    pub fn folder(&self) -> &Path {
        &self.run.path
    }

    /// The cache of artefacts.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// The servers' kernel (and that of the guests made from it).
    pub fn kernel(&self) -> &Kernel {
        &self.kernel
    }
}

impl Rig {
    /// Ends every server now and removes the run's files. Dropping the rig does it too; this is for a rig that is shared.
    pub fn end(&self) {
        std::thread::scope(|scope| {
            for server in &self.servers {
                scope.spawn(|| server.end());
            }
        });
        self.run.remove();
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.end();
    }
}
