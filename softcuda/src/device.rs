//! What the device says it is: an A100 or an H100 in everything that shapes a kernel or a launch.

use std::fmt;

/// Numbers of a GPU model, as NVIDIA publishes them in the CUDA programming guide's table of technical specifications and
/// in the architecture white papers.
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
}

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
pub const MAX_THREADS_PER_SM: u32 = 2048;
pub const MAX_BLOCKS_PER_SM: u32 = 32;
pub const WARP_SIZE: u32 = 32;
/// Blocks of a cluster that every device of compute capability 9.0 can hold.
pub const MAX_PORTABLE_CLUSTER: u32 = 8;
/// The same with the function's consent to non-portable sizes.
pub const MAX_CLUSTER: u32 = 16;

/// NVIDIA A100, 80 GB, SXM.
pub const A100: Description = Description {
    model: "a100",
    compute_capability: (8, 0),
    sm_count: 108,
    shared_per_sm: 164 << 10,
    shared_per_block_optin: 163 << 10,
    l2_bytes: 40 << 20,
    clock_khz: 1_410_000,
    memory_clock_khz: 1_593_000,
    bus_bits: 5120,
    memory_bytes: 80 << 30,
};

/// NVIDIA H100, 80 GB, SXM.
pub const H100: Description = Description {
    model: "h100",
    compute_capability: (9, 0),
    sm_count: 132,
    shared_per_sm: 228 << 10,
    shared_per_block_optin: 227 << 10,
    l2_bytes: 50 << 20,
    clock_khz: 1_980_000,
    memory_clock_khz: 2_619_000,
    bus_bits: 5120,
    memory_bytes: 80 << 30,
};

/// An environment variable that does not say what it should.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{variable} must be {expected}, not `{found}`")]
pub struct SettingError {
    pub variable: &'static str,
    pub expected: &'static str,
    pub found: String,
}

impl Description {
    /// The device that `SOFTCUDA_DEVICE` (`a100` or `h100`, the default) and `SOFTCUDA_MEMORY_MIB` ask for.
    ///
    /// # Errors
    /// Either variable has another value.
    pub fn from_environment() -> Result<Description, SettingError> {
        let read = |variable| std::env::var(variable).ok().filter(|value| !value.is_empty());
        let variable = "SOFTCUDA_DEVICE";
        let mut device = match read(variable) {
            None => H100,
            Some(name) => [A100, H100].into_iter().find(|device| device.model == name).ok_or(SettingError {
                variable,
                expected: "`a100` or `h100`",
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

    /// The name that `cuDeviceGetName` gives: never one that hardware has.
    pub fn name(&self) -> String {
        format!("softcuda {} (software device)", self.model.to_uppercase())
    }

    /// `CUdevice_attribute` by number, `None` where CUDA 13 defines none.
    ///
    /// Limits are the modelled GPU's. What this driver does not implement (textures, surfaces, virtual memory management,
    /// interprocess handles, stream memory operations, tensor maps) is reported as absent.
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
            39 => MAX_THREADS_PER_SM,
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
            87 => 2,
            // PAGEABLE_MEMORY_ACCESS, CONCURRENT_MANAGED_ACCESS, COMPUTE_PREEMPTION_SUPPORTED
            88 => 0,
            89 | 90 => 1,
            // CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM and stream memory operations
            91..=94 => 0,
            // COOPERATIVE_LAUNCH, COOPERATIVE_MULTI_DEVICE_LAUNCH
            95 => 1,
            96 => 0,
            97 => self.shared_per_block_optin,
            // Flushing of remote writes, host registration, page tables, virtual memory management, shareable handles
            98..=105 => 0,
            106 => MAX_BLOCKS_PER_SM,
            // GENERIC_COMPRESSION, persisting L2, access policy window, GPU Direct
            107..=110 => 0,
            111 => SHARED_RESERVED,
            112..=114 => 0,
            // MEMORY_POOLS_SUPPORTED
            115 => 1,
            116..=119 => 0,
            // CLUSTER_LAUNCH
            120 => hopper.into(),
            121..=125 => 0,
            // MEM_SYNC_DOMAIN_COUNT, TENSOR_MAP_ACCESS_SUPPORTED, HANDLE_TYPE_FABRIC, UNIFIED_FUNCTION_POINTERS
            126 => 1,
            127..=129 => 0,
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
        for (number, a100, h100) in [(75, 8, 9), (16, 108, 132), (97, 166_912, 232_448), (120, 0, 1)] {
            assert_eq!((A100.attribute(number), H100.attribute(number)), (Some(a100), Some(h100)), "{number}");
        }
        assert_eq!(H100.attribute(0), None);
        assert_eq!(H100.attribute(500), None);
        assert!((1..=161).all(|number| A100.attribute(number).is_some()));
        assert!(A100.name().contains("softcuda"));
    }
}
