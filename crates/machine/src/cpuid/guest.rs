//! The CPU that a guest has seen since it was powered on. On whatever host it goes on, it must see the same one.
//!
//! Of the template `host` the leaves are those of the host on which the guest was powered on, so another host cannot make them up: they
//! travel. Whether another host can stand in is told by [`GuestCpu::check`], before anything depends on it.

use super::topology::Place;
use super::{CpuFeatures, CpuidError, KvmCaps};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};

/// Leaves as the first vCPU sees them.
#[derive(Clone, Debug, PartialEq)]
pub struct GuestCpu(Vec<kvm_cpuid_entry2>);

// Integers only.
impl Eq for GuestCpu {}

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
        CpuFeatures::of(supported, &Self::CAPS).check_provides(&want, "of the running guest")
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
