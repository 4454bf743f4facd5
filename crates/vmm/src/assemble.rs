//! From a specification to a machine that stands still, with the handles that reach its devices.

use crate::resources::{Claim, Resources};
use crate::spec::{Boot, Dirty, DiskSpec, MemoryKind, NicSpec, VmSpec, made_mac, parse_mac};
use kvm_bindings::kvm_cpuid_entry2;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;
use steadfast_disk::DiskError;
use steadfast_disk::boot::{DiscoverOptions, discover};
use steadfast_disk::image::BlockIo;
use steadfast_machine::boot::acpi::{self, AcpiConfig};
use steadfast_machine::boot::{self, BootError, Entry, initial_msrs, initial_registers};
use steadfast_machine::cpuid::{self, CpuidError, GuestCpu, KvmCaps, WhyNot};
use steadfast_machine::devices::legacy::{self, OutputSink, Power, SerialPort, Watchdog};
use steadfast_machine::devices::virtio::DeviceError;
use steadfast_machine::devices::virtio::balloon::{Balloon, BalloonHandle, PageReclaimer};
use steadfast_machine::devices::virtio::block::{
    Block, BlockConfig, BlockHandle, ReportErrors, image_backend,
};
use steadfast_machine::devices::virtio::console::{Console, WriteSink};
use steadfast_machine::devices::virtio::net::{Net, NetConfig, NetHandle};
use steadfast_machine::devices::virtio::rng::Rng;
use steadfast_machine::devices::virtio::vsock::Vsock;
use steadfast_machine::kvm::{DirtyMethod, KvmError};
use steadfast_machine::machine::{Builder, Machine, MachineError, ThreadHooks};
use steadfast_machine::memory::{MemoryError, Ram, RamBacking};
use steadfast_machine::vcpu::VcpuEvents;
use steadfast_net::{NetBackend, TapError};
use steadfast_types::Gfn;

/// A VM that cannot be put together. Each names the cause and the way out.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum AssembleError {
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(transparent)]
    Discover(#[from] steadfast_disk::boot::BootError),
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Tap(#[from] TapError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("this KVM cannot run a 64-bit Linux guest: {0}")]
    NoLinux(WhyNot),
    #[error("{path}: {source}")]
    File { path: PathBuf, source: std::io::Error },
    #[error("{0}")]
    Setting(String),
}

/// A machine with what reaches its parts from outside. It stands still.
pub struct Vm {
    /// The machine.
    pub machine: Machine,
    /// Its specification, with every format filled in.
    pub spec: VmSpec,
    /// The serial port.
    pub serial: Arc<Mutex<SerialPort>>,
    /// Power button and reset.
    pub power: Arc<Mutex<Power>>,
    /// Disks in order; the seed, if any, is last.
    pub disks: Vec<BlockHandle>,
    /// Network cards in order.
    pub nics: Vec<NetHandle>,
    /// The guest's watchdog, if there is one.
    pub watchdog: Option<Arc<Mutex<Watchdog>>>,
    /// The balloon, if there is one.
    pub balloon: Option<BalloonHandle>,
    /// What is open of the host; images stay locked while the VM lives.
    pub resources: Arc<Resources>,
    supported: kvm_bindings::CpuId,
}

/// Who hears of the guest: vCPU events and device events.
pub trait GuestEvents: VcpuEvents + legacy::EventSink {}
impl<T: VcpuEvents + legacy::EventSink> GuestEvents for T {}

/// What the VM's surroundings give it.
pub struct Surroundings<E> {
    /// Hears of shutdown, reset, panic.
    pub events: Arc<E>,
    /// Takes the serial port's output.
    pub serial: Box<dyn OutputSink>,
    /// Takes debug console output (port 0xe9).
    pub debugcon: Option<Box<dyn OutputSink>>,
    /// Run first on each thread.
    pub hooks: ThreadHooks,
    /// Puts something between a NIC (by its index) and what it is plugged into.
    pub wrap_net: Option<WrapNet>,
    /// Gives the image of a disk (by its index) that [`assemble`] shall not simply open.
    pub give_disk: Option<GiveDisk>,
    /// Memory that is there already, of the size of the specification: that of the machine before. Or, for [`assemble`], that of another
    /// process, which runs the VM until it leaves it to this one: until then its images and the names of its sockets are its own too
    /// ([`Claim::Later`]).
    pub give_ram: Option<File>,
}

/// See [`Surroundings::wrap_net`].
pub type WrapNet = Arc<dyn Fn(usize, Box<dyn NetBackend>) -> Box<dyn NetBackend> + Send + Sync>;

/// See [`Surroundings::give_disk`].
pub type GiveDisk = Arc<dyn Fn(usize) -> Option<Arc<dyn BlockIo>> + Send + Sync>;

/// Puts the machine of `spec` together. Nothing is loaded and nothing runs yet: [`Vm::boot`] or a restore follows.
///
/// # Errors
/// [`AssembleError`].
pub fn assemble<E: GuestEvents + 'static>(
    spec: &VmSpec,
    around: Surroundings<E>,
) -> Result<Vm, AssembleError> {
    let mut spec = spec.clone();
    let claim = match &around.give_ram {
        Some(_) => Claim::Later,
        None => Claim::Now,
    };
    let resources = Arc::new(Resources::open(&mut spec, around.give_disk.as_ref(), claim)?);
    assemble_from(spec, resources, around)
}

/// As [`assemble`], from what is open already: after a reset, or once the process has given up the privileges to open
/// anything. Formats of all disks are filled in.
///
/// # Errors
/// [`AssembleError`].
pub fn assemble_from<E: GuestEvents + 'static>(
    spec: VmSpec,
    resources: Arc<Resources>,
    around: Surroundings<E>,
) -> Result<Vm, AssembleError> {
    if let Some(give) = &around.give_disk {
        resources.give_again(give);
    }
    let supported = resources.hypervisor.supported_cpuid()?;
    if !matches!(spec.boot, Boot::Flat { .. }) {
        cpuid::can_run_linux_64(&supported).map_err(AssembleError::NoLinux)?;
    }
    let again = |e: std::io::Error| AssembleError::Setting(format!("cannot use an open file again: {e}"));
    let backing = match &spec.memory {
        MemoryKind::Anonymous => RamBacking::Memfd,
        MemoryKind::Huge => RamBacking::MemfdHuge,
        MemoryKind::File(path) => RamBacking::File(path.clone()),
    };
    let ram = match (around.give_ram, resources.ram_file().map_err(again)?) {
        (Some(file), _) | (None, Some(file)) => Ram::on_file(file, spec.memory_bytes)?,
        (None, None) => Ram::new(spec.memory_bytes, &backing)?,
    };
    if backing == RamBacking::MemfdHuge {
        ram.use_huge_pages();
    }
    let dirty = match spec.dirty {
        Dirty::Auto => DirtyMethod::Auto,
        Dirty::Log => DirtyMethod::Log,
        Dirty::LogManual => DirtyMethod::LogManual,
        Dirty::Ring => DirtyMethod::Ring,
    };
    let mut b = Builder::new(&resources.hypervisor, ram, spec.vcpus, dirty, around.hooks)?;
    let sink: Arc<dyn legacy::EventSink> = Arc::clone(&around.events) as _;
    let serial = SerialPort::new(b.line(legacy::serial::COM1_IRQ)?, around.serial)
        .map_err(|e| AssembleError::Setting(format!("serial port: {e}")))?;
    let serial = b.add_ports(&[(legacy::serial::COM1_PORT, legacy::serial::PORTS)], serial)?;
    let power = Power::new(b.line(legacy::power::GED_IRQ)?, Arc::clone(&sink));
    let power = b.add_ports(&[(legacy::power::PORT, legacy::power::PORTS)], power)?;
    b.add_ports(
        &[(legacy::i8042::PORT, legacy::i8042::PORTS)],
        legacy::I8042::new(Arc::clone(&sink)),
    )?;
    b.add_ports(
        &[(legacy::pvpanic::PORT, legacy::pvpanic::PORTS)],
        legacy::PvPanic::new(sink),
    )?;
    b.add_ports(&[(legacy::rtc::PORT, legacy::rtc::PORTS)], legacy::Rtc::default())?;
    let watchdog = match spec.watchdog {
        true => Some(b.add_ports(
            &[(legacy::watchdog::PORT, legacy::watchdog::PORTS)],
            Watchdog::default(),
        )?),
        false => None,
    };
    b.add_stateless_ports(
        legacy::debugcon::PORT,
        legacy::debugcon::PORTS,
        Arc::new(Mutex::new(legacy::DebugCon::new(around.debugcon))),
    )?;
    let mut disks = Vec::new();
    for (i, io) in resources.images().iter().enumerate() {
        let settings = spec.disks.get(i);
        disks.push(add_disk(&mut b, i, settings, io, spec.vcpus)?);
    }
    let mut nics = Vec::new();
    for (i, nic) in spec.nics.iter().enumerate() {
        let backend = resources.backend(i)?;
        let backend = match &around.wrap_net {
            Some(wrap) => wrap(i, backend),
            None => backend,
        };
        nics.push(add_nic(&mut b, &spec, i, nic, backend)?);
    }
    let balloon = add_others(&mut b, &spec, &resources)?;
    let leaves = (0..spec.vcpus)
        .map(|v| leaves(&supported, &spec, v))
        .collect::<Result<Vec<_>, _>>()?;
    let machine = b.build(around.events, |v| {
        leaves.get(v as usize).cloned().unwrap_or_default()
    })?;
    Ok(Vm {
        machine,
        spec,
        serial,
        power,
        disks,
        nics,
        watchdog,
        balloon,
        resources,
        supported,
    })
}

fn leaves(
    supported: &kvm_bindings::CpuId,
    spec: &VmSpec,
    vcpu: u32,
) -> Result<Vec<kvm_cpuid_entry2>, AssembleError> {
    let caps = KvmCaps {
        tsc_deadline: true,
        invariant_tsc: false,
        tsc_khz: None,
    };
    Ok(cpuid::build(supported, &spec.cpu, vcpu, spec.vcpus, &caps)?
        .as_slice()
        .to_vec())
}

fn add_disk(
    b: &mut Builder,
    index: usize,
    settings: Option<&DiskSpec>,
    io: &Arc<dyn BlockIo>,
    vcpus: u32,
) -> Result<BlockHandle, AssembleError> {
    let name = format!("block{index}");
    let host = |e: std::io::Error| AssembleError::Setting(format!("{name}: {e}"));
    let backend = image_backend(Arc::clone(io)).map_err(host)?;
    let queues = match settings.map_or(0, |s| s.queues) {
        0 => u16::try_from(vcpus).unwrap_or(8).min(8),
        n => n,
    };
    let block = Block::new(
        BlockConfig {
            serial: settings.map_or_else(|| "cloud-init".to_owned(), |s| s.serial.clone()),
            queues,
            rate: Default::default(),
            policy: Box::new(ReportErrors),
            name: name.clone(),
        },
        backend,
    )?;
    let handle = block.handle();
    b.add_virtio(Box::new(block), &format!("io-{name}"))?;
    Ok(handle)
}

fn add_nic(
    b: &mut Builder,
    spec: &VmSpec,
    index: usize,
    nic: &NicSpec,
    backend: Box<dyn NetBackend>,
) -> Result<NetHandle, AssembleError> {
    let mac = match &nic.mac {
        Some(text) => parse_mac(text).map_err(AssembleError::Setting)?,
        None => made_mac(&spec.name, index),
    };
    let config = NetConfig {
        name: format!("net{index}"),
        mac,
        mtu: nic.mtu,
        tx_rate: Default::default(),
        rx_rate: Default::default(),
    };
    let net = Net::new(config, backend)?;
    let handle = net.handle();
    b.add_virtio(Box::new(net), &format!("io-net{index}"))?;
    Ok(handle)
}

/// Devices that share one I/O thread: none of them carries much.
fn add_others(
    b: &mut Builder,
    spec: &VmSpec,
    from: &Resources,
) -> Result<Option<BalloonHandle>, AssembleError> {
    const THREAD: &str = "io-misc";
    let setting = |what: &str, e: std::io::Error| AssembleError::Setting(format!("{what}: {e}"));
    if spec.rng {
        let rng = Rng::new("rng0", Default::default()).map_err(|e| setting("rng0", e))?;
        b.add_virtio(Box::new(rng), THREAD)?;
    }
    if let Some(file) = from.virtio_console().map_err(|e| setting("console0", e))? {
        let console =
            Console::new("console0", Box::new(WriteSink(file))).map_err(|e| setting("console0", e))?;
        b.add_virtio(Box::new(console), THREAD)?;
    }
    if let (Some(vsock), Some(listener)) = (&spec.vsock, from.vsock().map_err(|e| setting("vsock0", e))?) {
        let vsock = Vsock::on_listener("vsock0", vsock.cid, listener, &vsock.path)?;
        b.add_virtio(Box::new(vsock), THREAD)?;
    }
    if !spec.balloon {
        return Ok(None);
    }
    let balloon =
        Balloon::new("balloon0", Box::new(Reclaimer(b.ram().clone()))).map_err(|e| setting("balloon0", e))?;
    let handle = balloon.handle();
    b.add_virtio(Box::new(balloon), THREAD)?;
    Ok(Some(handle))
}

/// Gives pages that the guest does not use back to the host.
struct Reclaimer(Ram);

impl PageReclaimer for Reclaimer {
    fn reclaim(&self, first_gfn: u64, pages: u64) {
        self.0.give_back(Gfn(first_gfn), pages);
    }
}

impl Vm {
    /// Gives up what only one process can have, so that another can take the VM over: the images' locks and the
    /// paths of sockets. The machine stands still and has been drained.
    pub fn release(&self) {
        self.resources.release();
    }

    /// Lets time pass for the guest's watchdog; whether it fired.
    pub fn watchdog_fired(&self, now: Instant, guest_runs: bool) -> bool {
        let look = |w: &Arc<Mutex<Watchdog>>| {
            let mut watchdog = w.lock().unwrap_or_else(PoisonError::into_inner);
            watchdog.look(now, guest_runs)
        };
        self.watchdog.as_ref().is_some_and(look)
    }

    /// Takes back what [`Vm::release`] gave up, before the machine goes on.
    ///
    /// # Errors
    /// [`AssembleError`] while another process has a part of it; this one then has none.
    pub fn take_back(&self) -> Result<(), AssembleError> {
        self.resources.take_back()
    }

    /// Loads what the specification boots and sets the first registers.
    ///
    /// # Errors
    /// [`AssembleError`].
    pub fn boot(&self) -> Result<(), AssembleError> {
        let ram = self.machine.ram();
        let read = |path: &Path| self.resources.read(path);
        let acpi = AcpiConfig {
            watchdog: self.spec.watchdog,
            ..AcpiConfig::full(self.spec.vcpus)
        };
        let entry = match &self.spec.boot {
            Boot::Kernel {
                kernel,
                initrd,
                cmdline,
            } => {
                let rsdp = acpi::build(ram, &acpi)?;
                let initrd = initrd.as_deref().map(read).transpose()?;
                boot::linux(ram, &read(kernel)?, initrd.as_deref(), cmdline, Some(rsdp))?
            }
            Boot::Disk {
                file_system,
                cmdline_extra,
            } => {
                let images = self.resources.images();
                let disk = images.first().ok_or_else(|| {
                    AssembleError::Setting(
                        "booting from disk needs a disk: give an image, or --kernel".into(),
                    )
                })?;
                let options = DiscoverOptions {
                    boot_fs: file_system.clone(),
                    ..Default::default()
                };
                let plan = discover(disk, &options)?;
                tracing::info!(source = %plan.source, title = ?plan.title, cmdline = %plan.cmdline, "booting from disk");
                let cmdline = format!("{} {cmdline_extra}", plan.cmdline);
                let rsdp = acpi::build(ram, &acpi)?;
                boot::linux(
                    ram,
                    &plan.kernel,
                    plan.initrd.as_deref(),
                    cmdline.trim(),
                    Some(rsdp),
                )?
            }
            Boot::Flat { elf, cmdline } => boot::flat(ram, &read(elf)?, cmdline, self.spec.vcpus)?,
        };
        self.enter(&entry)
    }

    fn enter(&self, entry: &Entry) -> Result<(), AssembleError> {
        for v in 0..self.spec.vcpus {
            self.machine.set_msrs(v, &initial_msrs())?;
            if entry.starts(v) {
                self.machine
                    .set_registers(v, |base| initial_registers(entry, v, base))?;
                self.machine.make_runnable(v)?;
            }
        }
        Ok(())
    }

    /// Whether this host can show a guest this CPU, which it has seen on another.
    ///
    /// # Errors
    /// What this host lacks.
    pub fn can_show(&self, cpu: &GuestCpu) -> Result<(), CpuidError> {
        match self.machine.cpu() == *cpu {
            true => Ok(()),
            false => cpu.check(&self.supported),
        }
    }

    /// What KVM supports on this host.
    #[must_use]
    pub fn supported_cpuid(&self) -> &kvm_bindings::CpuId {
        &self.supported
    }
}
