//! The DSDT: what is on the machine and cannot be found by probing.
//!
//! Processors, the PCI host bridge with its windows, ECAM as a reserved motherboard resource, COM1, the RTC,
//! pvpanic, the power button with the event device that rings it, and `\_S5`.

use super::{AcpiConfig, CPUS_MAX, OEM_ID, OEM_REVISION, OEM_TABLE};
use crate::devices::legacy::{power, pvpanic, rtc, serial};
use crate::memory::layout;
use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Device, EISAName, Equal, Field, FieldAccessType, FieldEntry,
    FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, Name, Notify, OpRegion,
    OpRegionSpace, Package, Path, ResourceTemplate, Store, ZERO,
};
use acpi_tables::sdt::Sdt;

/// ACPI "device is present, enabled, shown and works".
const STATUS_OK: u8 = 0xf;

/// The DSDT as bytes, with a valid checksum.
#[must_use]
pub fn dsdt(config: &AcpiConfig) -> Vec<u8> {
    let mut body = Vec::new();
    for cpu in 0..config.ncpus.min(CPUS_MAX) {
        processor(cpu, &mut body);
    }
    if config.pci {
        pci(&mut body);
    }
    if config.serial {
        com1(&mut body);
    }
    if config.pvpanic {
        simple(
            "\\_SB_.PEVT",
            &"QEMU0001",
            &IO::new(pvpanic::PORT, pvpanic::PORT, 1, 1),
            &mut body,
        );
    }
    clock(&mut body);
    power_button(&mut body);
    soft_off(&mut body);
    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM_ID, OEM_TABLE, OEM_REVISION);
    table.append_slice(&body);
    table.as_slice().to_vec()
}

/// A device with an id, a status and one resource.
fn simple(path: &str, hid: &dyn Aml, resource: &dyn Aml, out: &mut Vec<u8>) {
    Device::new(
        Path::new(path),
        vec![
            &Name::new("_HID".into(), hid),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_STA".into(), &STATUS_OK),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![resource])),
        ],
    )
    .to_aml_bytes(out);
}

/// A processor device; its `_UID` is that of the MADT.
fn processor(cpu: u32, out: &mut Vec<u8>) {
    Device::new(
        Path::new(&format!("\\_SB_.C{cpu:03}")),
        vec![
            &Name::new("_HID".into(), &"ACPI0007"),
            &Name::new("_UID".into(), &cpu),
            &Name::new("_STA".into(), &STATUS_OK),
        ],
    )
    .to_aml_bytes(out);
}

/// PCI host bridge, bus 0 only; devices use MSI-X, so there is no `_PRT`.
fn pci(out: &mut Vec<u8>) {
    let mmio_end = layout::PCI_MMIO_START + layout::PCI_MMIO_SIZE - 1;
    Device::new(
        "\\_SB_.PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_SEG".into(), &ZERO),
            &Name::new("_BBN".into(), &ZERO),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &AddressSpace::new_bus_number(0u16, 0u16),
                    &IO::new(0xcf8, 0xcf8, 1, 8),
                    &AddressSpace::new_io(0u16, 0xcf7, None),
                    &AddressSpace::new_io(0xd00u16, 0xffff, None),
                    &AddressSpace::new_memory(
                        AddressSpaceCacheable::NotCacheable,
                        true,
                        layout::PCI_MMIO_START as u32,
                        mmio_end as u32,
                        None,
                    ),
                ]),
            ),
        ],
    )
    .to_aml_bytes(out);
    simple(
        "\\_SB_.ECAM",
        &EISAName::new("PNP0C02"),
        &Memory32Fixed::new(true, layout::PCI_ECAM_START as u32, layout::PCI_ECAM_SIZE as u32),
        out,
    );
}

/// COM1. Without this device Linux would have no interrupt for it: hardware-reduced machines have no ISA interrupts.
fn com1(out: &mut Vec<u8>) {
    Device::new(
        "\\_SB_.COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &1u8),
            &Name::new("_DDN".into(), &"COM1"),
            &Name::new("_STA".into(), &STATUS_OK),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &IO::new(serial::COM1_PORT, serial::COM1_PORT, 1, serial::PORTS as u8),
                    &Interrupt::new(true, true, false, false, serial::COM1_IRQ),
                ]),
            ),
        ],
    )
    .to_aml_bytes(out);
}

/// The CMOS clock; no interrupt, so no alarms.
fn clock(out: &mut Vec<u8>) {
    simple(
        "\\_SB_.RTC0",
        &EISAName::new("PNP0B00"),
        &IO::new(rtc::PORT, rtc::PORT, 1, rtc::PORTS as u8),
        out,
    );
}

/// Power button, and the Generic Event Device (ACPI 6.5, section 5.6.9) that tells of it: `_EVT` reads the event
/// register, which clears it, and notifies the button.
fn power_button(out: &mut Vec<u8>) {
    Device::new(
        "\\_SB_.PWRB".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C0C")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_STA".into(), &STATUS_OK),
        ],
    )
    .to_aml_bytes(out);
    Device::new(
        "\\_SB_.GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_STA".into(), &STATUS_OK),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Interrupt::new(true, true, false, false, power::GED_IRQ)]),
            ),
            &OpRegion::new(
                "GEDR".into(),
                OpRegionSpace::SystemIO,
                &power::GED_EVENT_PORT,
                &1u8,
            ),
            &Field::new(
                "GEDR".into(),
                FieldAccessType::Byte,
                FieldLockRule::NoLock,
                FieldUpdateRule::WriteAsZeroes,
                vec![FieldEntry::Named(*b"GEVT", 8)],
            ),
            &Method::new(
                "_EVT".into(),
                1,
                true,
                vec![
                    &Store::new(&Local(0), &Path::new("GEVT")),
                    &And::new(&Local(1), &Local(0), &power::EVENT_POWER_BUTTON),
                    &If::new(
                        &Equal::new(&Local(1), &power::EVENT_POWER_BUTTON),
                        vec![&Notify::new(&Path::new("\\_SB_.PWRB"), &0x80u8)],
                    ),
                ],
            ),
        ],
    )
    .to_aml_bytes(out);
}

/// `\_S5`: the sleep type that turns the machine off.
fn soft_off(out: &mut Vec<u8>) {
    Name::new(
        "\\_S5_".into(),
        &Package::new(vec![&power::SLEEP_TYPE_OFF, &ZERO, &ZERO, &ZERO]),
    )
    .to_aml_bytes(out);
}
