//! What a processor answers to CPUID: the host's, less what a guest shall not have, plus its place.
//!
//! Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E; Linux `Documentation/virt/kvm/x86/cpuid.rst`.
//! One package, whose cores have one thread each.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::vm::KvmError;

/// Features, leaf 1, ECX.
const VMX: u32 = 1 << 5;
const PERFORMANCE_CAPABILITIES: u32 = 1 << 15;
const X2APIC: u32 = 1 << 21;
const DEADLINE_TIMER: u32 = 1 << 24;
/// Follows CR4; KVM keeps it.
const OSXSAVE: u32 = 1 << 27;
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: the package may have more than one logical processor.
const MULTIPLE: u32 = 1 << 28;

/// Features, leaf 0x8000_0001, ECX.
const CORES_ARE_LEGACY: u32 = 1 << 1;
const SVM: u32 = 1 << 2;
const AMD_PERFORMANCE_COUNTERS: u32 = 1 << 23 | 1 << 24 | 1 << 28;

/// Levels of leaf 0xB, ECX bits 15 to 8.
const LEVEL_THREAD: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;

/// KVM's leaves, and the one that tells frequencies (VMware's; QEMU and FreeBSD know it).
const HYPERVISOR_LEAVES: u32 = 0x4000_0000;
const FREQUENCIES: u32 = 0x4000_0010;
/// KVM's local APIC timers count nanoseconds.
const APIC_KHZ: u32 = 1_000_000;

const TOPOLOGY: u32 = 0xB;

/// What all processors of a machine have in common.
#[derive(Debug, Clone, Copy)]
pub struct Processors {
    /// How many there are.
    pub count: u8,
    /// What their time stamp counters count at.
    pub tsc_khz: u32,
    pub deadline_timer: bool,
}

impl Processors {
    /// Bits of a local APIC id that tell cores apart.
    fn core_bits(self) -> u32 {
        u8::BITS - (self.count - 1).leading_zeros()
    }

    /// How many ids that makes, less one: the form in which caches and packages state it.
    fn last_id(self) -> u32 {
        (1 << self.core_bits()) - 1
    }
}

/// Address bits that a guest's memory and devices may take.
pub fn address_bits(supported: &CpuId) -> u8 {
    const ASSUMED: u8 = 36;
    supported
        .as_slice()
        .iter()
        .find(|entry| entry.function == 0x8000_0008)
        .map_or(ASSUMED, |entry| {
            // Bits 23 to 16 say what a guest has, where it differs from the host.
            let [host, _, guest, _] = entry.eax.to_le_bytes();
            if guest == 0 { host } else { guest }
        })
}

/// The answers of processor `id`.
///
/// # Errors
/// When there are more than KVM takes.
pub fn of_processor(supported: &CpuId, processors: Processors, id: u8) -> Result<CpuId, KvmError> {
    let amd = is_amd(supported);
    let mut entries: Vec<_> = supported
        .as_slice()
        .iter()
        .filter(|entry| !is_replaced(entry.function))
        .map(|entry| adapted(*entry, processors, id, amd))
        .collect();
    entries.extend(topology(processors, id));
    entries.push(kvm_cpuid_entry2 {
        function: FREQUENCIES,
        eax: processors.tsc_khz,
        ebx: APIC_KHZ,
        ..Default::default()
    });
    CpuId::from_entries(&entries).map_err(|source| KvmError::List("CPUID entries", source))
}

fn is_amd(supported: &CpuId) -> bool {
    supported.as_slice().iter().any(|entry| {
        let vendor = [entry.ebx, entry.edx, entry.ecx].map(u32::to_le_bytes);
        entry.function == 0
            && [&b"AuthenticAMD"[..], b"HygonGenuine"].contains(&vendor.concat().as_slice())
    })
}

/// Topology is told in one way only; performance counters, nested and encrypted VMs not at all.
fn is_replaced(function: u32) -> bool {
    const PERFORMANCE: [u32; 2] = [0xA, 0x8000_0022];
    const NESTED: u32 = 0x8000_000A;
    const ENCRYPTED: [u32; 3] = [0x12, 0x21, 0x8000_001F];
    const OTHER_TOPOLOGY: [u32; 2] = [0x1F, 0x8000_0026];
    function == TOPOLOGY
        || function == FREQUENCIES
        || function == NESTED
        || PERFORMANCE.contains(&function)
        || ENCRYPTED.contains(&function)
        || OTHER_TOPOLOGY.contains(&function)
}

fn adapted(
    mut entry: kvm_cpuid_entry2,
    processors: Processors,
    id: u8,
    amd: bool,
) -> kvm_cpuid_entry2 {
    let several = processors.count > 1;
    let id = u32::from(id);
    match entry.function {
        0 => entry.eax = entry.eax.max(TOPOLOGY),
        1 => {
            // The brand index and the cache line size stay.
            entry.ebx = entry.ebx & 0xFFFF | (processors.last_id() + 1) << 16 | id << 24;
            entry.ecx &= !(VMX | PERFORMANCE_CAPABILITIES | OSXSAVE);
            entry.ecx |= X2APIC | HYPERVISOR;
            set(&mut entry.ecx, DEADLINE_TIMER, processors.deadline_timer);
            set(&mut entry.edx, MULTIPLE, several);
        }
        4 | 0x8000_001D => share_caches(&mut entry, processors),
        HYPERVISOR_LEAVES => entry.eax = FREQUENCIES,
        0x8000_0001 => {
            entry.ecx &= !(SVM | AMD_PERFORMANCE_COUNTERS);
            set(&mut entry.ecx, CORES_ARE_LEGACY, amd && several);
        }
        0x8000_0008 if amd => {
            entry.ecx = u32::from(processors.count - 1) | processors.core_bits() << 12;
        }
        // One thread per core, one node.
        0x8000_001E => (entry.eax, entry.ebx, entry.ecx) = (id, id & 0xFF, 0),
        _ => {}
    }
    entry
}

fn set(register: &mut u32, bit: u32, on: bool) {
    if on {
        *register |= bit;
    } else {
        *register &= !bit;
    }
}

/// Cores have the first two levels for themselves and share the third.
fn share_caches(entry: &mut kvm_cpuid_entry2, processors: Processors) {
    let (kind, level) = (entry.eax & 0x1F, entry.eax >> 5 & 0x7);
    if kind == 0 {
        return;
    }
    let sharing = if level >= 3 { processors.last_id() } else { 0 };
    entry.eax = entry.eax & 0x3FFF | sharing << 14;
    if entry.function == 4 {
        entry.eax |= processors.last_id().min(0x3F) << 26;
    }
}

/// Leaf 0xB: a level of threads, a level of cores, and the end of the list.
fn topology(processors: Processors, id: u8) -> [kvm_cpuid_entry2; 3] {
    let level = |index: u32, bits: u32, count: u32, level: u32| kvm_cpuid_entry2 {
        function: TOPOLOGY,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: bits,
        ebx: count,
        ecx: level | index,
        edx: u32::from(id),
        ..Default::default()
    };
    [
        level(0, 0, 1, LEVEL_THREAD),
        level(
            1,
            processors.core_bits(),
            processors.count.into(),
            LEVEL_CORE,
        ),
        level(2, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    const FOUR: Processors = Processors {
        count: 4,
        tsc_khz: 2_500_000,
        deadline_timer: true,
    };

    fn entry(function: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn vendor(name: &[u8; 12]) -> kvm_cpuid_entry2 {
        let part = |at: usize| u32::from_le_bytes(name[at..at + 4].try_into().unwrap());
        entry(0, [0xD, part(0), part(8), part(4)])
    }

    fn answer(of: &CpuId, function: u32) -> Vec<[u32; 4]> {
        of.as_slice()
            .iter()
            .filter(|entry| entry.function == function)
            .map(|entry| [entry.eax, entry.ebx, entry.ecx, entry.edx])
            .collect()
    }

    fn adapt(entries: &[kvm_cpuid_entry2], processors: Processors, id: u8) -> CpuId {
        of_processor(&CpuId::from_entries(entries).unwrap(), processors, id).unwrap()
    }

    #[test]
    fn a_processor_knows_its_place() {
        let host = [
            entry(1, [0, 0x0900_0800, VMX | OSXSAVE, 0]),
            entry(0x1F, [5, 32, 0x201, 9]),
            entry(0xB, [5, 32, 0x201, 9]),
        ];

        let cpuid = adapt(&host, FOUR, 3);

        let [_, ebx, ecx, edx] = answer(&cpuid, 1)[0];
        assert_eq!(ebx, 0x0304_0800);
        assert_eq!(ecx, X2APIC | DEADLINE_TIMER | HYPERVISOR);
        assert_eq!(edx, MULTIPLE);
        assert_eq!(
            answer(&cpuid, 0xB),
            [[0, 1, 0x100, 3], [2, 4, 0x201, 3], [0, 0, 2, 3]]
        );
        assert!(answer(&cpuid, 0x1F).is_empty());
    }

    #[test]
    fn counts_that_are_no_power_of_two_take_the_next_bits() {
        let bits = |count| Processors { count, ..FOUR }.core_bits();

        assert_eq!([1, 2, 3, 4, 5, 64].map(bits), [0, 1, 2, 2, 3, 6]);
    }

    #[test]
    fn no_guest_is_offered_nested_virtualisation_or_counters() {
        let host = [
            vendor(b"AuthenticAMD"),
            entry(0xA, [0x0730_0404, 0, 0, 0x603]),
            entry(0x8000_0001, [0, 0, SVM | AMD_PERFORMANCE_COUNTERS, 0]),
            entry(0x8000_000A, [1, 16, 0, 0xFF]),
            entry(0x8000_0022, [1, 6, 0, 0]),
        ];

        let cpuid = adapt(&host, FOUR, 0);

        assert_eq!(answer(&cpuid, 0x8000_0001), [[0, 0, CORES_ARE_LEGACY, 0]]);
        for gone in [0xA, 0x8000_000A, 0x8000_0022] {
            assert!(answer(&cpuid, gone).is_empty());
        }
    }

    #[test]
    fn an_amd_processor_tells_its_cores_in_amds_leaves() {
        let host = [
            vendor(b"AuthenticAMD"),
            entry(0x8000_0008, [0x3028, 0, 0x7007, 0]),
            entry(0x8000_001E, [9, 0x0103, 0x100, 0]),
        ];

        let cpuid = adapt(&host, FOUR, 2);

        assert_eq!(answer(&cpuid, 0x8000_0008), [[0x3028, 0, 0x2003, 0]]);
        assert_eq!(answer(&cpuid, 0x8000_001E), [[2, 2, 0, 0]]);
    }

    #[test]
    fn an_intel_processor_keeps_what_amd_uses_for_cores() {
        let host = [
            vendor(b"GenuineIntel"),
            entry(0x8000_0008, [0x3028, 0, 0, 0]),
        ];

        let cpuid = adapt(&host, FOUR, 2);

        assert_eq!(answer(&cpuid, 0x8000_0008), [[0x3028, 0, 0, 0]]);
    }

    #[test]
    fn only_the_last_level_of_caches_is_shared() {
        let cache = |level: u32| entry(4, [0xFFFF_C000 | level << 5 | 1, 0, 0, 0]);

        let cpuid = adapt(&[cache(1), cache(3), entry(4, [0; 4])], FOUR, 0);

        let leaves = answer(&cpuid, 4);
        assert_eq!(leaves[0][0], 3 << 26 | 1 << 5 | 1);
        assert_eq!(leaves[1][0], 3 << 26 | 3 << 14 | 3 << 5 | 1);
        assert_eq!(leaves[2][0], 0);
    }

    #[test]
    fn frequencies_are_told() {
        let cpuid = adapt(&[entry(HYPERVISOR_LEAVES, [0x4000_0001, 1, 2, 3])], FOUR, 0);

        assert_eq!(answer(&cpuid, HYPERVISOR_LEAVES), [[FREQUENCIES, 1, 2, 3]]);
        assert_eq!(answer(&cpuid, FREQUENCIES), [[2_500_000, 1_000_000, 0, 0]]);
    }

    #[test]
    fn address_bits_are_the_guests_where_they_differ() {
        let bits = |eax| {
            let host = CpuId::from_entries(&[entry(0x8000_0008, [eax, 0, 0, 0])]).unwrap();
            address_bits(&host)
        };

        assert_eq!((bits(0x0000_3028), bits(0x0030_3934)), (40, 48));
        assert_eq!(address_bits(&CpuId::from_entries(&[]).unwrap()), 36);
    }
}
