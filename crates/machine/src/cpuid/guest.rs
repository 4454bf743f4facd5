//! The CPU that a guest has seen since it was powered on. On whatever host it goes on, it must see the same one.
//!
//! Of the template `host` the leaves are those of the host on which the guest was powered on, so another host cannot make them up: they
//! travel. Whether another host can stand in is told by [`GuestCpu::check`], before anything depends on it.

use super::features::find;
use super::topology::Place;
use super::{CpuFeatures, CpuidError, KvmCaps};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};

/// Leaves as the first vCPU sees them.
#[derive(Clone, Debug, PartialEq)]
pub struct GuestCpu(Vec<kvm_cpuid_entry2>);

// Integers only.
impl Eq for GuestCpu {}

/// Whose CPU it is, in messages.
const WHOSE: &str = "of the running guest";

/// Leaves that say how things are called and laid out, and those whose features [`CpuFeatures`] knows by name: 0 is vendor, 2 and 4 caches, 5
/// and 6 power, Bh and 1Fh topology, KVM's own; of AMD brand, caches, power, sizes and topology. In all others each bit is a promise.
const NO_PROMISE: [u32; 27] = [
    0,
    1,
    2,
    4,
    5,
    6,
    0xb,
    0x1f,
    0x4000_0000,
    0x4000_0001,
    0x4000_0010,
    0x8000_0000,
    0x8000_0001,
    0x8000_0002,
    0x8000_0003,
    0x8000_0004,
    0x8000_0005,
    0x8000_0006,
    0x8000_0007,
    0x8000_0008,
    0x8000_0019,
    0x8000_001a,
    0x8000_001d,
    0x8000_001e,
    0x15,
    0x16,
    3,
];

/// What a host with the leaves `have` lacks of this one.
fn lacks(have: &[kvm_cpuid_entry2], want: &kvm_cpuid_entry2) -> Option<String> {
    let (function, index) = (want.function, want.index);
    if NO_PROMISE.contains(&function) || (function, index) == (7, 0) {
        return None;
    }
    let there = find(have, function, index).copied().unwrap_or_default();
    let registers = |e: &kvm_cpuid_entry2| [e.eax, e.ebx, e.ecx, e.edx];
    let (have, want) = (registers(&there), registers(want));
    let short = match (function, index) {
        // Bits of states; sizes follow from them.
        (0xd, 0) => want[0] & !have[0] | want[3] & !have[3],
        (0xd, 1) => want[0] & !have[0] | want[2] & !have[2] | want[3] & !have[3],
        // A state that is there has one size and one place.
        (0xd, _) => u32::from(want[0] != 0 && want != have),
        // The size of a microcode patch is not promised.
        (0x8000_0021, _) => want[0] & !have[0] | want[2] & !have[2] | want[3] & !have[3],
        _ => want.iter().zip(have).fold(0, |all, (w, h)| all | w & !h),
    };
    (short != 0).then(|| format!("bits {short:#x} of CPUID leaf {function:x}h.{index}"))
}

/// Bytes of an encoded leaf: function, index, flags, four registers, little-endian.
const LEAF: usize = 28;

impl GuestCpu {
    /// From the leaves of the first vCPU.
    #[must_use]
    pub fn new(leaves: Vec<kvm_cpuid_entry2>) -> Self {
        Self(leaves)
    }

    /// The leaves of vCPU number `vcpu` of `ncpus`.
    #[must_use]
    pub fn leaves(&self, vcpu: u32, ncpus: u32) -> Vec<kvm_cpuid_entry2> {
        let place = Place { vcpu, ncpus };
        let mut leaves = self.0.clone();
        for e in &mut leaves {
            match e.function {
                1 => e.ebx = place.leaf1_ebx(),
                0xb | 0x1f => e.edx = vcpu,
                0x8000_001e => [e.eax, e.ebx, e.ecx, e.edx] = place.amd_ids(),
                _ => {}
            }
        }
        leaves
    }

    fn features(&self) -> Option<CpuFeatures> {
        let id = CpuId::from_entries(&self.0).ok()?;
        Some(CpuFeatures::of(&id, &Self::CAPS))
    }

    /// What is not in these leaves, and the same on all hosts.
    const CAPS: KvmCaps = KvmCaps {
        tsc_deadline: true,
        invariant_tsc: false,
        tsc_khz: None,
    };

    /// Names of the features that the guest sees.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.features().map_or_else(Vec::new, |f| f.names())
    }

    /// Checks that a host on which KVM supports `supported` can show this CPU.
    ///
    /// # Errors
    /// [`CpuidError::Missing`] names what it lacks; [`CpuidError::Vendors`].
    pub fn check(&self, supported: &CpuId) -> Result<(), CpuidError> {
        let want = self.features().ok_or(CpuidError::Leaves(self.0.len()))?;
        CpuFeatures::of(supported, &Self::CAPS).check_provides(&want, WHOSE)?;
        let have = supported.as_slice();
        let missing: Vec<String> = self.0.iter().filter_map(|e| lacks(have, e)).collect();
        match missing.is_empty() {
            true => Ok(()),
            false => Err(CpuidError::Missing {
                template: WHOSE,
                missing,
            }),
        }
    }

    /// For the wire.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let words = |e: &kvm_cpuid_entry2| [e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx];
        let all = self.0.iter().flat_map(words);
        all.flat_map(u32::to_le_bytes).collect()
    }

    /// From the wire; `None` if it is none.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let count = bytes.len() / LEAF;
        if !bytes.len().is_multiple_of(LEAF) || count == 0 || count > KVM_MAX_CPUID_ENTRIES {
            return None;
        }
        let leaf = |b: &[u8]| {
            let (words, _) = b.as_chunks::<4>();
            let word = |i: usize| words.get(i).map_or(0, |w| u32::from_le_bytes(*w));
            kvm_cpuid_entry2 {
                function: word(0),
                index: word(1),
                flags: word(2),
                eax: word(3),
                ebx: word(4),
                ecx: word(5),
                edx: word(6),
                ..kvm_cpuid_entry2::default()
            }
        };
        Some(Self(bytes.chunks_exact(LEAF).map(leaf).collect()))
    }
}
