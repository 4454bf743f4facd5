//! ACPI tables: RSDP, XSDT, FADT (hardware-reduced), MADT, MCFG, WDAT where there is a watchdog, and the DSDT of [`dsdt`].
//!
//! Hardware-reduced ACPI (ACPI 6.5, section 4.1) has no SCI, no PM timer and no fixed events: sleep and reset are
//! single ports of [`crate::devices::legacy::power`], and the power button comes through a Generic Event Device.
//! All tables lie one after another from [`RSDP_ADDRESS`], in memory that the E820 map calls ACPI.

mod dsdt;
mod wdat;

pub use dsdt::dsdt;

use super::{BootError, put};
use crate::devices::legacy::power;
use crate::memory::{Ram, layout};
use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

/// Where the RSDP is; also in the range that a kernel scans for it.
pub const RSDP_ADDRESS: u64 = 0xE_0000;
/// Most vCPUs: their APIC ids fit into 8 bits, and Linux needs no x2APIC entries.
pub const CPUS_MAX: u32 = 64;

const OEM_ID: [u8; 6] = *b"STEADF";
const OEM_TABLE: [u8; 8] = *b"STEADFST";
const OEM_REVISION: u32 = 1;
/// Offset of the century byte in CMOS.
pub(crate) const CMOS_CENTURY: u8 = 0x32;

/// FADT boot architecture flags (ACPI 6.5, table 5.10): no VGA, no ASPM, and no 8042 (bit 1 is clear).
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;
const BOOT_ARCH_NO_ASPM: u16 = 1 << 4;

/// What the tables describe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AcpiConfig {
    /// Number of vCPUs, 1 to [`CPUS_MAX`]; the APIC id of each is its index.
    pub ncpus: u32,
    /// Describe the serial port COM1.
    pub serial: bool,
    /// Describe the PCI host bridge and ECAM.
    pub pci: bool,
    /// Describe pvpanic.
    pub pvpanic: bool,
    /// Describe the watchdog.
    pub watchdog: bool,
}

impl AcpiConfig {
    /// Everything that a normal machine has; no watchdog.
    #[must_use]
    pub fn full(ncpus: u32) -> Self {
        Self {
            ncpus,
            serial: true,
            pci: true,
            pvpanic: true,
            watchdog: false,
        }
    }
}

/// Where the tables end; above is the segment in which a BIOS would be.
const TABLES_END: u64 = 0xF_0000;
/// The reset vector in real mode, F000:FFF0.
const RESET_VECTOR: u64 = 0xF_FFF0;

/// What a kernel finds that restarts "through the BIOS". Linux does so on every machine with hardware-reduced ACPI: it
/// prefers EFI to the reset register there, and without EFI jumps to the reset vector in real mode, where it would run
/// through empty memory for ever. `mov al, RESET_VALUE; mov dx, RESET_PORT; out dx, al; hlt; jmp` back to the `hlt`.
const fn reset_stub() -> [u8; 9] {
    let [low, high] = power::RESET_PORT.to_le_bytes();
    [0xb0, power::RESET_VALUE, 0xba, low, high, 0xee, 0xf4, 0xeb, 0xfd]
}

/// Builds all tables and writes them into guest memory, and a reset stub at the real-mode reset vector. Returns the
/// address of the RSDP.
///
/// # Errors
/// [`BootError::Acpi`] for a bad number of vCPUs.
pub fn build(ram: &Ram, config: &AcpiConfig) -> Result<u64, BootError> {
    if !(1..=CPUS_MAX).contains(&config.ncpus) {
        return Err(BootError::Acpi(format!(
            "{} vCPUs; use 1 to {CPUS_MAX}",
            config.ncpus
        )));
    }
    // The RSDP takes 36 bytes; every table starts at a multiple of 64.
    let mut next = RSDP_ADDRESS + 64;
    let mut place = |table: &[u8]| -> Result<u64, BootError> {
        let at = next;
        next = (at + table.len() as u64).next_multiple_of(64);
        if next > TABLES_END {
            return Err(BootError::Acpi("the tables do not fit into 64 KiB".into()));
        }
        put(ram.memory(), "an ACPI table", at, table)?;
        Ok(at)
    };
    let dsdt = place(&dsdt(config))?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(place(&bytes(&fadt(dsdt)))?);
    xsdt.add_entry(place(madt(config.ncpus).as_slice())?);
    if config.pci {
        let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE, OEM_REVISION);
        mcfg.add_ecam(layout::PCI_ECAM_START, 0, 0, 0);
        xsdt.add_entry(place(&bytes(&mcfg))?);
    }
    if config.watchdog {
        xsdt.add_entry(place(wdat::table().as_slice())?);
    }
    let xsdt = place(&bytes(&xsdt))?;
    put(
        ram.memory(),
        "the RSDP",
        RSDP_ADDRESS,
        &bytes(&Rsdp::new(OEM_ID, xsdt)),
    )?;
    put(ram.memory(), "the reset stub", RESET_VECTOR, &reset_stub())?;
    Ok(RSDP_ADDRESS)
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut out = Vec::new();
    table.to_aml_bytes(&mut out);
    out
}

fn port(address: u16) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        u64::from(address),
    )
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Wbinvd)
        // Set: no fixed power button and no fixed sleep button.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    fadt.iapc_boot_arch = (BOOT_ARCH_NO_VGA | BOOT_ARCH_NO_ASPM).into();
    fadt.century = CMOS_CENTURY;
    fadt.reset_reg = port(power::RESET_PORT);
    fadt.reset_value = power::RESET_VALUE;
    fadt.sleep_control_reg = port(power::SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(power::SLEEP_STATUS_PORT);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"STEADFST").into();
    fadt.finalize()
}

/// MADT (ACPI 6.5, section 5.2.12): one local APIC per vCPU, the I/O APIC, and LINT1 as NMI everywhere. No interrupt
/// source overrides: KVM's default routing has every ISA interrupt on the I/O APIC pin of the same number.
fn madt(ncpus: u32) -> Sdt {
    const PCAT_COMPAT: u32 = 1; // the machine has two 8259s as well
    let mut madt = Sdt::new(*b"APIC", 44, 5, OEM_ID, OEM_TABLE, OEM_REVISION);
    madt.write_u32(36, layout::LAPIC_START as u32);
    madt.write_u32(40, PCAT_COMPAT);
    for cpu in 0..ncpus.min(CPUS_MAX) {
        // Type 0: processor local APIC, enabled.
        let id = cpu as u8;
        madt.append_slice(&[0, 8, id, id, 1, 0, 0, 0]);
    }
    // Type 1: I/O APIC 0, interrupts from 0. Its id follows those of the local APICs only by custom.
    let mut ioapic = vec![1, 12, 0, 0];
    ioapic.extend((layout::IOAPIC_START as u32).to_le_bytes());
    ioapic.extend(0u32.to_le_bytes());
    madt.append_slice(&ioapic);
    // Type 4: local APIC NMI, all processors (0xff), flags conforming, LINT1.
    madt.append_slice(&[4, 6, 0xff, 0, 0, 1]);
    madt
}
