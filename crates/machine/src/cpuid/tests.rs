//! Unit tests of CPUID.

use super::features::{find, is_amd};
use super::*;
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::Kvm;

const CAPS: KvmCaps = KvmCaps {
    tsc_deadline: true,
    invariant_tsc: false,
    tsc_khz: None,
};

const INTEL: [u8; 12] = *b"GenuineIntel";
const AMD: [u8; 12] = *b"AuthenticAMD";

/// A host that has every feature bit, a lot of leaves, and its own ideas of everything else.
fn host(vendor: [u8; 12], noise: u32) -> CpuId {
    let word = |i: usize| u32::from_le_bytes(vendor[i..i + 4].try_into().unwrap());
    let mut e = vec![
        leaf(0, [0x20 + noise, word(0), word(8), word(4)]),
        leaf(1, [0xb06f2 + noise, noise, !0, !0]),
        leaf(2, [noise; 4]),
        leaf(6, [!0, noise, 0, 0]),
        leaf(0xa, [!0; 4]),
        leaf(0x15, [noise; 4]),
        subleaf(7, 0, [2, !0, !0, !0]),
        subleaf(7, 1, [!0, 0, 0, 0]),
        subleaf(0xb, 0, [noise; 4]),
        subleaf(0xb, 1, [noise; 4]),
        subleaf(0xd, 0, [0x602e7, 0x9000, 0x9000 + noise, 0]),
        subleaf(0xd, 1, [0x1f, noise, 0x1800, 0]),
        subleaf(0xd, 2, [256, 576, 0, 0]),
        subleaf(0xd, 5, [64, 0x440, 0, 0]),
        subleaf(0xd, 6, [512, 0x480, 0, 0]),
        subleaf(0xd, 7, [1024, 0x680, 0, 0]),
        subleaf(0xd, 9, [8, 0xa80, 0, 0]),
        subleaf(0xd, 11, [16, 0, 1, 0]),
        subleaf(0xd, 18, [8192, 0xb00, 2, 0]),
        leaf(0x4000_0000, [0x4000_0001, 0, 0, 0]),
        leaf(0x4000_0001, [!0, 0, 0, !0]),
        leaf(0x8000_0000, [0x8000_0028, 0, 0, 0]),
        leaf(0x8000_0001, [0, noise, !0, !0]),
        leaf(0x8000_0007, [0, 0, 0, !0]),
        leaf(0x8000_0008, [0x3030, !0, 0x7000 + noise, 0]),
        leaf(0x8000_000a, [!0; 4]),
        leaf(0x8000_001e, [noise; 4]),
        leaf(0x8000_0021, [!0, 0, 0, 0]),
        leaf(0x8000_0026, [!0; 4]),
    ];
    for f in 0x8000_0002..=0x8000_0004 {
        e.push(leaf(f, [0x4853_4f48 + noise; 4]));
    }
    CpuId::from_entries(&e).unwrap()
}

fn bytes(id: &CpuId) -> Vec<[u32; 7]> {
    id.as_slice()
        .iter()
        .map(|e| [e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx])
        .collect()
}

fn get(id: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
    *find(id.as_slice(), function, index).unwrap_or_else(|| panic!("no leaf {function:#x}.{index}"))
}

#[test]
fn a_baseline_is_the_same_on_every_host_of_a_vendor() {
    for vendor in [INTEL, AMD] {
        let pool = CpuFeatures::of(&host(vendor, 0), &CAPS)
            .intersect(&CpuFeatures::of(&host(vendor, 7), &CAPS))
            .unwrap();
        for template in [Template::V2, Template::V3, Template::Pool(Box::new(pool))] {
            for vcpu in [0, 3] {
                let a = build(&host(vendor, 0), &template, vcpu, 4, &CAPS).unwrap();
                let b = build(&host(vendor, 7), &template, vcpu, 4, &CAPS).unwrap();
                assert_eq!(bytes(&a), bytes(&b), "{}", template.name());
                assert!(a.as_slice().len() <= 80);
            }
        }
    }
}

#[test]
fn no_template_shows_what_cannot_be_saved() {
    for vendor in [INTEL, AMD] {
        let h = host(vendor, 0);
        let pool = Template::Pool(Box::new(CpuFeatures::of(&h, &CAPS)));
        for template in [Template::Host, Template::V2, Template::V3, pool] {
            let id = build(&h, &template, 0, 2, &CAPS).unwrap();
            let one = get(&id, 1, 0);
            assert_eq!(one.ecx & (1 << 5 | 1 << 3 | 1 << 15), 0, "VMX, MONITOR, PDCM");
            assert_ne!(one.ecx & 1 << 31, 0, "hypervisor");
            let ext = get(&id, 0x8000_0001, 0);
            assert_eq!(
                ext.ecx & (1 << 2 | 1 << 10 | 1 << 23),
                0,
                "SVM, IBS, PERFCTR_CORE"
            );
            let kvm = get(&id, 0x4000_0001, 0).eax;
            assert_eq!(
                kvm & (1 << 4 | 1 << 5 | 1 << 9 | 1 << 14),
                0,
                "async PF, steal time, TLB flush"
            );
            assert_ne!(kvm & 1 << 3, 0, "kvmclock");
            assert_eq!(get(&id, 0x8000_0007, 0).edx & 1 << 8, 0, "invariant TSC");
            let seven = get(&id, 7, 0);
            assert_eq!(
                (seven.ecx & 1 << 7, seven.edx & (1 << 20 | 1 << 24)),
                (0, 0),
                "CET, AMX"
            );
            for hidden in [0xa, 0x15, 0x8000_000a, 0x8000_0026] {
                assert!(find(id.as_slice(), hidden, 0).is_none(), "{hidden:#x}");
            }
            if let Some(d) = find(id.as_slice(), 0xd, 0) {
                assert_eq!(d.eax & 3 << 17, 0);
            }
            assert!(find(id.as_slice(), 0xd, 11).is_none() && find(id.as_slice(), 0xd, 18).is_none());
        }
    }
}

#[test]
fn topology_counts_cores_and_no_leaf_is_given_twice() {
    for vendor in [INTEL, AMD] {
        let h = host(vendor, 3);
        let pool = Template::Pool(Box::new(CpuFeatures::of(&h, &CAPS)));
        for template in [Template::Host, Template::V3, pool] {
            for (ncpus, shift) in [(1, 0), (2, 1), (3, 2), (4, 2), (64, 6)] {
                let vcpu = ncpus - 1;
                let id = build(&h, &template, vcpu, ncpus, &CAPS).unwrap();
                let one = get(&id, 1, 0);
                assert_eq!((one.ebx >> 24, one.ebx >> 16 & 0xff), (vcpu, ncpus));
                assert_eq!(one.edx >> 28 & 1, u32::from(ncpus > 1));
                let (thread, core) = (get(&id, 0xb, 0), get(&id, 0xb, 1));
                assert_eq!((thread.eax, thread.ebx, thread.edx), (0, 1, vcpu));
                assert_eq!((core.eax, core.ebx, core.edx), (shift, ncpus, vcpu));
                if is_amd(&vendor) {
                    assert_eq!(get(&id, 0x8000_0008, 0).ecx, shift << 12 | (ncpus - 1));
                }
                let mut keys: Vec<_> = id.as_slice().iter().map(|e| (e.function, e.index)).collect();
                keys.sort_unstable();
                let before = keys.len();
                keys.dedup();
                assert_eq!(keys.len(), before, "a leaf twice");
            }
        }
    }
}

#[test]
fn what_is_missing_is_named() {
    let mut entries = host(INTEL, 0).as_slice().to_vec();
    for e in &mut entries {
        match (e.function, e.index) {
            (1, _) => e.ecx &= !(1 << 20), // SSE4.2
            (7, 0) => e.ebx &= !(1 << 5),  // AVX2
            _ => {}
        }
    }
    let h = CpuId::from_entries(&entries).unwrap();
    let Err(CpuidError::Missing { template, missing }) = build(&h, &Template::V3, 0, 1, &CAPS) else {
        panic!("not refused");
    };
    assert_eq!(
        (template, missing),
        ("x86-64-v3", vec!["sse4_2".to_owned(), "avx2".to_owned()])
    );
    let err = build(&h, &Template::V2, 0, 1, &CAPS).unwrap_err().to_string();
    assert!(err.contains("sse4_2") && err.contains("x86-64-v2"), "{err}");
    let no_timer = KvmCaps::default();
    let err = build(&host(INTEL, 0), &Template::V2, 0, 1, &no_timer)
        .unwrap_err()
        .to_string();
    assert!(err.contains("tsc_deadline"), "{err}");
    let amd = CpuFeatures::of(&host(AMD, 0), &CAPS);
    assert!(matches!(
        build(&h, &Template::Pool(Box::new(amd)), 0, 1, &CAPS),
        Err(CpuidError::Vendors(..))
    ));
    let err = "core2duo".parse::<Template>().unwrap_err().to_string();
    assert!(TEMPLATE_NAMES.iter().all(|n| err.contains(n)), "{err}");
    for name in TEMPLATE_NAMES {
        assert_eq!(name.parse::<Template>().unwrap().name(), name);
    }
    for (vcpu, ncpus) in [(0, 0), (1, 1), (0, 65)] {
        assert!(matches!(
            build(&h, &Template::Host, vcpu, ncpus, &CAPS),
            Err(CpuidError::Vcpu { .. })
        ));
    }
}

#[test]
fn intersection_drops_what_depends_on_the_dropped() {
    let a = CpuFeatures::of(&host(INTEL, 0), &CAPS);
    let mut entries = host(INTEL, 0).as_slice().to_vec();
    for e in &mut entries {
        if (e.function, e.index) == (0xd, 2) {
            e.ebx = 640; // another place for AVX state: cannot be shared
        }
        if e.function == 0x8000_0008 {
            e.eax = 0x302a;
        }
    }
    let b = CpuFeatures::of(&CpuId::from_entries(&entries).unwrap(), &CAPS);
    let both = a.intersect(&b).unwrap();
    assert_eq!(both, b.intersect(&a).unwrap());
    assert_eq!(both.phys_bits(), 42);
    let names = both.names();
    for gone in ["avx", "avx2", "fma", "avx512f", "avx_vnni", "vaes"] {
        assert!(!names.iter().any(|n| n == gone), "{gone}");
    }
    assert!(names.iter().any(|n| n == "pku"));
    assert!(a.check_provides(&both, "pool").is_ok() && b.check_provides(&both, "pool").is_ok());
    assert!(matches!(
        b.check_provides(&a, "pool"),
        Err(CpuidError::Missing { .. })
    ));
    let wire = postcard::to_stdvec(&both).unwrap();
    assert_eq!(postcard::from_bytes::<CpuFeatures>(&wire).unwrap(), both);
}

#[test]
fn the_clock_leaves_follow_the_caps() {
    let caps = KvmCaps {
        tsc_khz: Some(2_500_000),
        invariant_tsc: true,
        ..CAPS
    };
    for template in [Template::Host, Template::V2] {
        let id = build(&host(AMD, 0), &template, 0, 1, &caps).unwrap();
        assert_eq!(get(&id, 0x4000_0000, 0).eax, 0x4000_0010);
        assert_eq!(get(&id, 0x4000_0010, 0).eax, 2_500_000);
        assert_ne!(get(&id, 0x8000_0007, 0).edx & 1 << 8, 0);
    }
}

#[test]
fn the_baselines_hide_the_brand() {
    let id = build(&host(INTEL, 0), &Template::V3, 0, 1, &CAPS).unwrap();
    let text: Vec<u8> = (0x8000_0002..=0x8000_0004)
        .map(|f| get(&id, f, 0))
        .flat_map(|e| [e.eax, e.ebx, e.ecx, e.edx])
        .flat_map(u32::to_le_bytes)
        .collect();
    assert_eq!(
        String::from_utf8_lossy(&text).trim_end_matches('\0'),
        "Steadfast x86-64-v3"
    );
}

#[test]
fn verdicts_follow_the_module_that_is_loaded() {
    let h = host(INTEL, 0);
    let view = |hardware_module, pvm_module, cpu_flag| HostView {
        hardware_module,
        pvm_module,
        cpu_flag,
    };
    assert_eq!(linux_64_verdict(&h, view(true, false, Some(true))), Ok(()));
    assert_eq!(
        linux_64_verdict(&h, view(false, false, None)),
        Ok(()),
        "a container without /sys"
    );
    for bad in [
        view(false, true, Some(true)),
        view(false, true, None),
        view(false, false, Some(false)),
    ] {
        assert!(matches!(
            linux_64_verdict(&h, bad),
            Err(WhyNot::NoHardware { .. })
        ));
    }
    let mut entries = h.as_slice().to_vec();
    entries.retain(|e| e.function != 0x8000_0001);
    assert_eq!(
        linux_64_verdict(
            &CpuId::from_entries(&entries).unwrap(),
            view(true, false, Some(true))
        ),
        Err(WhyNot::Features(vec!["syscall", "lm"]))
    );
}

/// On a real KVM: the host template is accepted, and the verdict agrees with what modules are loaded.
#[test]
fn kvm_takes_the_host_template() {
    let Ok(kvm) = Kvm::new() else {
        eprintln!("SKIPPED: no /dev/kvm that can be opened; CPUID was not given to a vCPU");
        return;
    };
    let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
    let vm = kvm.create_vm().unwrap();
    vm.create_irq_chip().unwrap();
    let features = CpuFeatures::of(&supported, &CAPS);
    let pool = Template::Pool(Box::new(features));
    for (vcpu, template) in [(0, Template::Host), (1, pool)] {
        let id = build(&supported, &template, vcpu, 2, &CAPS).unwrap();
        let fd = vm.create_vcpu(u64::from(vcpu)).unwrap();
        fd.set_cpuid2(&id).unwrap();
    }
    for template in [Template::V2, Template::V3] {
        match build(&supported, &template, 0, 2, &CAPS) {
            Ok(id) => {
                let fd = kvm.create_vm().unwrap().create_vcpu(0).unwrap();
                fd.set_cpuid2(&id).unwrap();
            }
            Err(e) => eprintln!("{e}"),
        }
    }
    let here = HostView::here();
    let verdict = can_run_linux_64(&supported);
    eprintln!("{here:?}: {verdict:?}");
    assert_eq!(
        verdict.is_err(),
        !here.hardware_module && (here.pvm_module || here.cpu_flag == Some(false))
    );
}

#[test]
fn a_guests_cpu_goes_to_any_host_that_has_it() {
    for (vendor, other) in [(INTEL, AMD), (AMD, INTEL)] {
        for template in [Template::Host, Template::V2] {
            let of = |v| build(&host(vendor, 3), &template, v, 4, &CAPS).unwrap();
            let cpu = GuestCpu::new(of(0).as_slice().to_vec());
            for v in 0..4 {
                let there = CpuId::from_entries(&cpu.leaves(v, 4)).unwrap();
                assert_eq!(bytes(&there), bytes(&of(v)), "vCPU {v}");
            }
            assert_eq!(GuestCpu::decode(&cpu.encode()).as_ref(), Some(&cpu));
            // Other leaves, the same features.
            cpu.check(&host(vendor, 9)).unwrap();
            assert!(matches!(cpu.check(&host(other, 3)), Err(CpuidError::Vendors(..))));
            let mut less = host(vendor, 3);
            for e in less.as_mut_slice().iter_mut().filter(|e| e.function == 1) {
                e.ecx &= !(1 << 20);
            }
            let why = cpu.check(&less).unwrap_err().to_string();
            assert!(
                why.contains("the running guest") && why.contains("sse4_2") && !why.contains("sse4_1"),
                "{why}"
            );
            assert!(cpu.names().contains(&"sse4_2".to_owned()));
        }
    }
    let leaf = [0; 28];
    assert!(GuestCpu::decode(&leaf).is_some());
    assert_eq!(GuestCpu::decode(&leaf[..27]), None);
    assert_eq!(GuestCpu::decode(&[]), None);
    assert_eq!(GuestCpu::decode(&vec![0; 28 * (KVM_MAX_CPUID_ENTRIES + 1)]), None);
}

/// What no name stands for counts as well: a bit of any other leaf that promises something, and the size of a state.
#[test]
fn a_host_must_have_what_has_no_name() {
    let supported = host(INTEL, 3);
    let leaves = build(&supported, &Template::Host, 0, 1, &CAPS).unwrap();
    let with = |more: kvm_cpuid_entry2| {
        let mut leaves: Vec<_> = leaves
            .as_slice()
            .iter()
            .filter(|e| (e.function, e.index) != (more.function, more.index))
            .copied()
            .collect();
        leaves.push(more);
        GuestCpu::new(leaves).check(&supported)
    };
    for (more, place) in [
        (subleaf(7, 1, [0, 0, 0, 1 << 4]), "7h.1"),
        (subleaf(7, 2, [0, 0, 0, 1]), "7h.2"),
        (subleaf(0x24, 0, [0, 1 << 16, 0, 0]), "24h.0"),
        (subleaf(0xd, 0, [1 << 19, 0, 0, 0]), "dh.0"),
        (subleaf(0xd, 19, [128, 960, 0, 0]), "dh.19"),
    ] {
        let why = with(more).unwrap_err().to_string();
        assert!(why.contains(place), "{place}: {why}");
    }
    // Names, caches and sizes promise nothing.
    for more in [leaf(0x8000_0002, [1; 4]), subleaf(4, 0, [1; 4]), leaf(2, [5; 4])] {
        with(more).unwrap();
    }
}
