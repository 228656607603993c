//! What the device says it is: an A100, H100, H200 or L4 in everything that shapes a kernel or a launch, and in the rates
//! from which [`crate::profile`] computes its bounds.

mod models;
mod occupancy;
mod source;

use std::fmt;

pub use models::{A100, H100, H200, L4, MODELS};
pub use occupancy::{Limiter, Occupancy, SHARED_UNIT, occupancy};
pub use source::{Figure, Source};

/// Numbers of a GPU model, as NVIDIA publishes them or as others measured; [`Description::figures`] lists each with the document
/// it is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Description {
    /// Short name, as in `SOFTCUDA_DEVICE`.
    pub model: &'static str,
    pub compute_capability: (u32, u32),
    pub sm_count: u32,
    /// Shared memory of one multiprocessor in bytes.
    pub shared_per_sm: u32,
    /// Most shared memory a block may have after opting in, in bytes.
    pub shared_per_block_optin: u32,
    /// L2 cache in bytes.
    pub l2_bytes: u32,
    /// Clocks in kHz.
    pub clock_khz: u32,
    pub memory_clock_khz: u32,
    /// Memory bus in bits.
    pub bus_bits: u32,
    /// Device memory in bytes.
    pub memory_bytes: u64,
    /// Threads that a multiprocessor holds at once, at most.
    pub threads_per_sm: u32,
    /// Blocks that a multiprocessor holds at once, at most.
    pub blocks_per_sm: u32,
    /// L1 data cache and shared memory of a multiprocessor together, in bytes.
    pub l1_shared_bytes: u32,
    pub rates: Rates,
    /// Where the numbers are from, by the names that [`Description::figures`] gives them.
    pub sources: &'static [Source],
}

/// What the units of a GPU do in a clock. Rates of arithmetic are results of one multiprocessor; a warp instruction is 32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rates {
    /// Warp instructions that the schedulers of a multiprocessor issue.
    pub issue: u32,
    /// f32 add, multiply, multiply-add.
    pub float: u32,
    /// f16 add, multiply, multiply-add; two results for each lane of a packed instruction.
    pub half: u32,
    /// f64 add, multiply, multiply-add.
    pub double: u32,
    /// 32-bit integer add, multiply-add, logic, compare.
    pub integer: u32,
    /// Approximate reciprocal, square root, exponential, logarithm, sine, cosine.
    pub special: u32,
    /// Conversions between types of at most 32 bits.
    pub convert: u32,
    /// Warp shuffles.
    pub exchange: u32,
    /// Lanes of loads and stores.
    pub load_store: u32,
    /// Bytes that a multiprocessor's shared memory and L1 cache deliver.
    pub shared_bytes: u32,
    /// Bytes that the whole L2 cache was measured to deliver at most; `None` where it is not known.
    pub l2_bytes: Option<u32>,
    /// Bytes a second of device memory, in either direction.
    pub dram_bytes_per_second: u64,
    /// Clock in kHz at which tensor cores reach their published peak on types of at most 32 bits.
    pub tensor_clock_khz: u32,
    /// Dense multiply-adds of a multiprocessor's tensor cores by type of the factors; 0 where they do not take the type.
    pub tensor_f16: u32,
    pub tensor_bf16: u32,
    pub tensor_tf32: u32,
    pub tensor_f64: u32,
    pub tensor_int8: u32,
    pub tensor_fp8: u32,
    /// What products of `mma.sync`, but for f64, reach of the tensor rate, in thousandths.
    pub mma_sync_permille: u32,
    /// What the largest products of `wgmma` reach of it, in thousandths; 0 where there is no `wgmma`.
    pub wgmma_permille: u32,
}

/// Bytes of a sector, the unit in which caches are filled and memory is moved; see the Nsight Compute documentation,
/// "Metrics Decoder".
pub const SECTOR_BYTES: u32 = 32;
/// Bytes of a line of the L1 and L2 caches; same source.
pub const LINE_BYTES: u32 = 128;

/// Threads of a block, at most.
pub const MAX_THREADS_PER_BLOCK: u32 = 1024;
/// Extents of a block, at most.
pub const MAX_BLOCK: [u32; 3] = [1024, 1024, 64];
/// Extents of a grid, at most.
pub const MAX_GRID: [u32; 3] = [0x7fff_ffff, 65535, 65535];
/// Shared memory of a block without opting in, in bytes.
pub const SHARED_PER_BLOCK: u32 = 48 << 10;
/// Shared memory that the system takes of each block's, in bytes.
pub const SHARED_RESERVED: u32 = 1 << 10;
/// Registers of a multiprocessor, and of a block at most.
pub const REGISTERS: u32 = 65536;
pub const MAX_REGISTERS_PER_THREAD: u32 = 255;
pub const WARP_SIZE: u32 = 32;
/// Blocks of a cluster that every device of compute capability 9.0 can hold.
pub const MAX_PORTABLE_CLUSTER: u32 = 8;
/// The same with the function's consent to non-portable sizes.
pub const MAX_CLUSTER: u32 = 16;

/// An environment variable that does not say what it should.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{variable} must be {expected}, not `{found}`")]
pub struct SettingError {
    pub variable: &'static str,
    pub expected: &'static str,
    pub found: String,
}

/// Devices of a process, at most.
const MAX_DEVICES: usize = 64;

impl Description {
    /// The devices that `SOFTCUDA_DEVICES` asks for: so many of [`Description::from_environment`]'s, or one for each name of
    /// a list separated by commas; one without it.
    ///
    /// # Errors
    /// A variable says something else.
    pub fn all_from_environment() -> Result<Vec<Description>, SettingError> {
        let device = Description::from_environment()?;
        let variable = "SOFTCUDA_DEVICES";
        let Some(found) = std::env::var(variable).ok().filter(|value| !value.is_empty()) else {
            return Ok(vec![device]);
        };
        if let Ok(count) = found.parse::<usize>()
            && (1..=MAX_DEVICES).contains(&count)
        {
            return Ok(vec![device; count]);
        }
        let chosen_memory = std::env::var("SOFTCUDA_MEMORY_MIB").is_ok_and(|value| !value.is_empty());
        let named = found.split(',').take(MAX_DEVICES + 1).map(|name| {
            let mut named = Description::named(name)?;
            if chosen_memory {
                named.memory_bytes = device.memory_bytes;
            }
            Some(named)
        });
        match named.collect::<Option<Vec<_>>>() {
            Some(devices) if devices.len() <= MAX_DEVICES => Ok(devices),
            _ => {
                let expected = "a number from 1 to 64 or names of devices separated by commas";
                Err(SettingError { variable, expected, found })
            }
        }
    }

    /// The device that `SOFTCUDA_DEVICE` (`a100`, `h100`, the default, `h200` or `l4`) and `SOFTCUDA_MEMORY_MIB` ask for.
    ///
    /// # Errors
    /// Either variable has another value.
    pub fn from_environment() -> Result<Description, SettingError> {
        let read = |variable| std::env::var(variable).ok().filter(|value| !value.is_empty());
        let variable = "SOFTCUDA_DEVICE";
        let mut device = match read(variable) {
            None => H100,
            Some(name) => Description::named(&name).ok_or(SettingError {
                variable,
                expected: "`a100`, `h100`, `h200` or `l4`",
                found: name,
            })?,
        };
        let variable = "SOFTCUDA_MEMORY_MIB";
        if let Some(text) = read(variable) {
            let parsed = text.parse::<u64>().ok().filter(|mib| (1..=1 << 24).contains(mib));
            let mib = parsed.ok_or(SettingError { variable, expected: "a number of MiB, at least 1", found: text })?;
            device.memory_bytes = mib << 20;
        }
        Ok(device)
    }

    /// The device of this short name, as `SOFTCUDA_DEVICE` spells it.
    pub fn named(model: &str) -> Option<Description> {
        MODELS.into_iter().find(|device| device.model == model)
    }

    /// L1 cache that a multiprocessor has left while its blocks use `shared` bytes, the system's share of each included.
    ///
    /// Shared memory is carved out in steps; the smallest that suffices is taken. Steps: CUDA C++ Programming Guide,
    /// "Compute Capability 8.x" and "9.0", "Shared Memory".
    pub fn l1_bytes(&self, shared: u64) -> u32 {
        const STEPS_KIB: [u32; 10] = [0, 8, 16, 32, 64, 100, 132, 164, 196, 228];
        let fits = |step: &u32| u64::from(*step) >= shared && *step <= self.shared_per_sm;
        let carved = STEPS_KIB.map(|kib| kib << 10).into_iter().find(fits).unwrap_or(self.shared_per_sm);
        self.l1_shared_bytes - carved
    }

    /// The name that `cuDeviceGetName` gives: never one that hardware has.
    pub fn name(&self) -> String {
        format!("softcuda {} (software device)", self.model.to_uppercase())
    }

    /// `CUdevice_attribute` by number, `None` where CUDA 13 defines none.
    ///
    /// Limits are the modelled GPU's. What this driver does not implement (textures, surfaces, virtual memory management,
    /// interprocess handles) is reported as absent.
    pub fn attribute(&self, number: u32) -> Option<i32> {
        let hopper = self.compute_capability >= (9, 0);
        let (major, minor) = self.compute_capability;
        let value = match number {
            1 => MAX_THREADS_PER_BLOCK,
            2..=4 => MAX_BLOCK[number as usize - 2],
            5..=7 => MAX_GRID[number as usize - 5],
            8 => SHARED_PER_BLOCK,
            // TOTAL_CONSTANT_MEMORY
            9 => 64 << 10,
            10 => WARP_SIZE,
            // MAX_PITCH
            11 => 0x7fff_ffff,
            12 => REGISTERS,
            13 => self.clock_khz,
            // TEXTURE_ALIGNMENT
            14 => 512,
            // GPU_OVERLAP, MULTIPROCESSOR_COUNT, KERNEL_EXEC_TIMEOUT, INTEGRATED, CAN_MAP_HOST_MEMORY, COMPUTE_MODE
            15 => 1,
            16 => self.sm_count,
            17 | 18 => 0,
            19 => 1,
            20 => 0,
            // Textures and surfaces
            21..=29 | 42..=49 | 52..=74 | 77 => 0,
            // SURFACE_ALIGNMENT, CONCURRENT_KERNELS, ECC_ENABLED, PCI_BUS_ID, PCI_DEVICE_ID, TCC_DRIVER
            30 => 512,
            31 => 1,
            32..=35 => 0,
            36 => self.memory_clock_khz,
            37 => self.bus_bits,
            38 => self.l2_bytes,
            39 => self.threads_per_sm,
            // ASYNC_ENGINE_COUNT, UNIFIED_ADDRESSING, PCI_DOMAIN_ID, TEXTURE_PITCH_ALIGNMENT
            40 => 3,
            41 => 1,
            50 => 0,
            51 => 32,
            75 => major,
            76 => minor,
            // STREAM_PRIORITIES_SUPPORTED, GLOBAL_L1_CACHE_SUPPORTED, LOCAL_L1_CACHE_SUPPORTED
            78..=80 => 1,
            81 => self.shared_per_sm,
            82 => REGISTERS,
            // MANAGED_MEMORY, MULTI_GPU_BOARD, MULTI_GPU_BOARD_GROUP_ID, HOST_NATIVE_ATOMIC_SUPPORTED
            83 => 1,
            84..=86 => 0,
            // SINGLE_TO_DOUBLE_PRECISION_PERF_RATIO
            87 => self.rates.float / self.rates.double,
            // PAGEABLE_MEMORY_ACCESS, CONCURRENT_MANAGED_ACCESS, COMPUTE_PREEMPTION_SUPPORTED
            88 => 0,
            89 | 90 => 1,
            // CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM, and the first form of stream memory operations
            91 => 1,
            92..=94 => 0,
            // COOPERATIVE_LAUNCH, COOPERATIVE_MULTI_DEVICE_LAUNCH
            95 => 1,
            96 => 0,
            97 => self.shared_per_block_optin,
            // HOST_REGISTER_SUPPORTED
            99 => 1,
            // Flushing of remote writes, page tables, virtual memory management, shareable handles
            98 | 100..=105 => 0,
            106 => self.blocks_per_sm,
            // GENERIC_COMPRESSION, persisting L2, access policy window, GPU Direct
            107..=110 => 0,
            111 => SHARED_RESERVED,
            112..=114 => 0,
            // MEMORY_POOLS_SUPPORTED
            115 => 1,
            116..=119 => 0,
            // CLUSTER_LAUNCH
            120 => hopper.into(),
            // CAN_USE_64_BIT_STREAM_MEM_OPS, CAN_USE_STREAM_WAIT_VALUE_NOR
            122 | 123 => 1,
            121 | 124 | 125 => 0,
            // MEM_SYNC_DOMAIN_COUNT, TENSOR_MAP_ACCESS_SUPPORTED, HANDLE_TYPE_FABRIC, UNIFIED_FUNCTION_POINTERS
            126 => 1,
            127 => hopper.into(),
            128 | 129 => 0,
            // NUMA_CONFIG, NUMA_ID (-1: none), MULTICAST_SUPPORTED, MPS_ENABLED, HOST_NUMA_ID (-1: none)
            130 | 132 | 133 => 0,
            131 | 134 => return Some(-1),
            135..=161 => 0,
            _ => return None,
        };
        i32::try_from(value).ok()
    }
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = self.compute_capability;
        write!(f, "{}, compute capability {major}.{minor}", self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_tell_the_models_apart() {
        // COMPUTE_CAPABILITY_MAJOR, MULTIPROCESSOR_COUNT, MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, CLUSTER_LAUNCH
        for (number, a100, h100, l4) in
            [(75, 8, 9, 8), (16, 108, 132, 58), (97, 166_912, 232_448, 101_376), (120, 0, 1, 0), (39, 2048, 2048, 1536)]
        {
            let found = [A100, H100, L4].map(|device| device.attribute(number));
            assert_eq!(found, [Some(a100), Some(h100), Some(l4)], "{number}");
        }
        assert_eq!(MODELS.map(|device| device.attribute(87)), [Some(2), Some(2), Some(2), Some(64)]);
        assert_eq!(H100.attribute(0), None);
        assert_eq!(H100.attribute(500), None);
        assert!((1..=161).all(|number| A100.attribute(number).is_some()));
        assert!(A100.name().contains("softcuda"));
    }
}
