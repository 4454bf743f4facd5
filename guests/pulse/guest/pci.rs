//! PCI bus 0 by configuration mechanism #1 (PCI 3.0, section 3.2.2.3.2), and the virtio capabilities of what is there
//! (virtio 1.2, section 4.1.4).

use crate::cpu::{inl, outl};
use crate::serial;
use crate::virtio::Device;

const VIRTIO: u32 = 0x1af4;

/// The first device of each type.
pub struct Devices {
    pub net: Option<Device>,
    pub block: Option<Device>,
    pub console: Option<Device>,
    pub rng: Option<Device>,
    pub balloon: Option<Device>,
    pub vsock: Option<Device>,
}

fn read(dev: u32, off: u32) -> u32 {
    outl(0xcf8, 0x8000_0000 | dev << 8 | off & 0xfc);
    inl(0xcfc)
}

fn write(dev: u32, off: u32, v: u32) {
    outl(0xcf8, 0x8000_0000 | dev << 8 | off & 0xfc);
    outl(0xcfc, v);
}

fn byte(dev: u32, off: u32) -> u32 {
    read(dev, off) >> ((off & 3) * 8) & 0xff
}

/// Address of a memory BAR, or `None` (with a message) if it cannot be used.
fn bar(dev: u32, n: u32) -> Option<u64> {
    if n > 5 {
        return None;
    }
    let lo = read(dev, 0x10 + n * 4);
    let addr = match lo & 7 {
        4 if n < 5 => u64::from(lo & !15) | u64::from(read(dev, 0x14 + n * 4)) << 32,
        0 => u64::from(lo & !15),
        _ => 0,
    };
    if addr == 0 || addr >= 1 << 32 {
        serial::text("PULSE ERROR a virtio BAR is unassigned, not memory, or above 4 GiB: ");
        serial::hex(addr);
        serial::text("\n");
        return None;
    }
    Some(addr)
}

fn probe(dev: u32, typ: u16) -> Option<Device> {
    let mut d = Device {
        typ,
        common: 0,
        notify: 0,
        notify_mult: 0,
        config: 0,
    };
    if read(dev, 4) >> 16 & 0x10 == 0 {
        return None;
    }
    let mut cap = byte(dev, 0x34) & 0xfc;
    for _ in 0..48 {
        if cap < 0x40 {
            break;
        }
        if byte(dev, cap) == 9 {
            let (cfg_type, bar_no, off) = (
                byte(dev, cap + 3),
                byte(dev, cap + 4),
                u64::from(read(dev, cap + 8)),
            );
            match cfg_type {
                1 if d.common == 0 => d.common = bar(dev, bar_no)? + off,
                2 if d.notify == 0 => {
                    d.notify = bar(dev, bar_no)? + off;
                    d.notify_mult = u64::from(read(dev, cap + 16));
                }
                4 if d.config == 0 => d.config = bar(dev, bar_no)? + off,
                _ => {}
            }
        }
        cap = byte(dev, cap + 1) & 0xfc;
    }
    if d.common == 0 || d.notify == 0 {
        return None;
    }
    // Memory space and bus mastering on, INTx off. The upper half is status, whose bits are cleared by writing 1.
    write(dev, 4, read(dev, 4) & 0xffff | 0x0406);
    Some(d)
}

/// Looks at every function of bus 0.
pub fn scan() -> Devices {
    let mut found = Devices {
        net: None,
        block: None,
        console: None,
        rng: None,
        balloon: None,
        vsock: None,
    };
    for slot in 0..32u32 {
        for function in 0..8u32 {
            let dev = slot << 3 | function;
            let id = read(dev, 0);
            if id & 0xffff == VIRTIO {
                // 0x1040 + type: modern; 0x1000..: transitional, which has the same capabilities.
                let typ = match id >> 16 {
                    n @ 0x1040..=0x107f => (n - 0x1040) as u16,
                    0x1000 => 1,
                    0x1001 => 2,
                    0x1002 => 5,
                    0x1003 => 3,
                    0x1005 => 4,
                    _ => 0,
                };
                let place = match typ {
                    1 => Some(&mut found.net),
                    2 => Some(&mut found.block),
                    3 => Some(&mut found.console),
                    4 => Some(&mut found.rng),
                    5 => Some(&mut found.balloon),
                    19 => Some(&mut found.vsock),
                    _ => None,
                };
                if let Some(place) = place {
                    if place.is_none() {
                        *place = probe(dev, typ);
                    }
                }
            }
            if function == 0 && (id == !0 || byte(dev, 0x0e) & 0x80 == 0) {
                break;
            }
        }
    }
    found
}
