//! The GPUs that can be modelled. Every number has a source in its model's list; a test demands it.
//!
//! Where a rate is not published as such it is computed from one that is, and the source says how. Where what is published cannot
//! be reached and measurements are public, the best of these is the rate.

use super::{Description, Rates, Source};

/// All models, by their names in `SOFTCUDA_DEVICE`.
pub const MODELS: [Description; 4] = [A100, H100, H200, L4];

const A100_PAPER: &str = "NVIDIA A100 Tensor Core GPU Architecture, white paper, V1.0";
const A100_SHEET: &str = "NVIDIA A100 Tensor Core GPU, data sheet, A100 80GB SXM";
const H100_PAPER: &str = "NVIDIA H100 Tensor Core GPU Architecture, white paper, V1.04";
const H200_SHEET: &str = "NVIDIA H200 Tensor Core GPU, data sheet, H200 SXM";
const ADA_PAPER: &str = "NVIDIA Ada GPU Architecture, white paper, V2.02";
const L4_SHEET: &str = "NVIDIA L4 Tensor Core GPU, data sheet, and product brief PB-11316-001";
const MEASURED: &str = "Luo et al., Benchmarking and Dissecting the Nvidia Hopper GPU Architecture, arXiv 2402.13499, and Dissecting the \
     NVIDIA Hopper Architecture through Microbenchmarking and Multiple Level Analysis, arXiv 2501.12084: measurements";
const GUIDE_LIMITS: &str = "CUDA C++ Programming Guide, Compute Capabilities, table of technical specifications";
const GUIDE_RATES: &str =
    "CUDA C++ Programming Guide, Maximize Instruction Throughput, table of results per clock and multiprocessor";

const fn source(figures: &'static str, document: &'static str, place: &'static str) -> Source {
    Source { figures, document, place }
}

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
    threads_per_sm: 2048,
    blocks_per_sm: 32,
    l1_shared_bytes: 192 << 10,
    rates: Rates {
        issue: 4,
        float: 64,
        half: 256,
        double: 32,
        integer: 64,
        special: 16,
        convert: 16,
        exchange: 32,
        load_store: 32,
        shared_bytes: 128,
        l2_bytes: Some(2008),
        dram_bytes_per_second: 2_039_000_000_000,
        tensor_clock_khz: 1_410_000,
        tensor_f16: 1024,
        tensor_bf16: 1024,
        tensor_tf32: 512,
        tensor_f64: 64,
        tensor_int8: 2048,
        tensor_fp8: 0,
        mma_sync_permille: 1000,
        wgmma_permille: 0,
    },
    sources: &[
        source(
            "compute_capability shared_per_sm shared_per_block_optin threads_per_sm blocks_per_sm",
            GUIDE_LIMITS,
            "8.0",
        ),
        source("sm_count l2_bytes clock_khz tensor_clock_khz bus_bits l1_shared_bytes", A100_PAPER, "table 1"),
        source("memory_bytes dram_bytes_per_second", A100_SHEET, "80 GB HBM2e, 2039 GB/s"),
        source("memory_clock_khz", A100_SHEET, "computed: 2039 GB/s over 5120 bits at two transfers a clock"),
        source("issue load_store", A100_PAPER, "figure 7: four schedulers, 32 load/store units"),
        source("float half double integer special convert exchange", GUIDE_RATES, "8.0"),
        source("shared_bytes", A100_PAPER, "Combined L1 Data Cache and Shared Memory: 128 bytes a clock, as V100"),
        source(
            "rate_l2_bytes",
            MEASURED,
            "1854 to 2008 bytes a clock on A100, by width of access; the white paper says 5120",
        ),
        source(
            "mma_sync_permille wgmma_permille",
            A100_PAPER,
            "the peaks of table 1 are those of mma.sync; wgmma is of 9.0",
        ),
        source(
            "tensor_f16 tensor_bf16 tensor_tf32 tensor_f64 tensor_int8 tensor_fp8",
            A100_PAPER,
            "table 2, and the peaks of table 1 over 108 multiprocessors at 1410 MHz",
        ),
    ],
};

/// NVIDIA H100, 80 GB, SXM5.
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
    threads_per_sm: 2048,
    blocks_per_sm: 32,
    l1_shared_bytes: 256 << 10,
    rates: Rates {
        issue: 4,
        float: 128,
        half: 256,
        double: 64,
        integer: 64,
        special: 16,
        convert: 64,
        exchange: 32,
        load_store: 32,
        shared_bytes: 128,
        l2_bytes: Some(4472),
        dram_bytes_per_second: 3_352_000_000_000,
        tensor_clock_khz: 1_830_000,
        tensor_f16: 2048,
        tensor_bf16: 2048,
        tensor_tf32: 1024,
        tensor_f64: 128,
        tensor_int8: 4096,
        tensor_fp8: 4096,
        mma_sync_permille: 649,
        wgmma_permille: 960,
    },
    sources: &[
        source(
            "compute_capability shared_per_sm shared_per_block_optin threads_per_sm blocks_per_sm",
            GUIDE_LIMITS,
            "9.0",
        ),
        source("sm_count l2_bytes bus_bits memory_bytes l1_shared_bytes", H100_PAPER, "table 3, H100 SXM5"),
        source("clock_khz tensor_clock_khz", H100_PAPER, "table 3: 1980 MHz, 1830 MHz for tensor cores but for FP64"),
        source("memory_clock_khz dram_bytes_per_second", H100_PAPER, "table 3: 2619 MHz DDR, 3352 GB/s"),
        source("issue load_store", H100_PAPER, "figure 7: four schedulers, 32 load/store units"),
        source("float half double integer special convert exchange", GUIDE_RATES, "9.0"),
        source("shared_bytes", A100_PAPER, "Combined L1 Data Cache and Shared Memory; no other is published for 9.0"),
        source("rate_l2_bytes", MEASURED, "3942 to 4472 bytes a clock on H800, by width of access"),
        source("mma_sync_permille", MEASURED, "H800: 490.7 of 756.5 TFLOP/s"),
        source("wgmma_permille", MEASURED, "H800: m64n256 on zeros; 88 % on random data"),
        source(
            "tensor_f16 tensor_bf16 tensor_tf32 tensor_f64 tensor_int8 tensor_fp8",
            H100_PAPER,
            "computed: dense peaks of table 3 over 132 multiprocessors at 1830 MHz, FP64 at 1980 MHz",
        ),
    ],
};

/// NVIDIA H200, 141 GB, SXM5: an H100 with six stacks of faster memory.
pub const H200: Description = Description {
    model: "h200",
    l2_bytes: 60 << 20,
    memory_clock_khz: 3_125_000,
    bus_bits: 6144,
    memory_bytes: 143_771 << 20,
    rates: Rates { dram_bytes_per_second: 4_800_000_000_000, ..H100.rates },
    sources: &[
        source(
            "compute_capability shared_per_sm shared_per_block_optin threads_per_sm blocks_per_sm",
            GUIDE_LIMITS,
            "9.0",
        ),
        source(
            "sm_count clock_khz tensor_clock_khz l1_shared_bytes",
            H100_PAPER,
            "table 3: the data sheet's peaks are H100's",
        ),
        source("l2_bytes", H100_PAPER, "full GH100: 60 MB with twelve controllers, all of which six stacks need"),
        source("bus_bits", H100_PAPER, "full GH100: six stacks, twelve 512-bit controllers"),
        source("memory_bytes", "nvidia-smi on H200, as in github.com/NVIDIA/cuda-samples/issues/311", "143771 MiB"),
        source("dram_bytes_per_second", H200_SHEET, "4.8 TB/s"),
        source("memory_clock_khz", H200_SHEET, "computed: 4.8 TB/s over 6144 bits at two transfers a clock"),
        source("issue load_store", H100_PAPER, "figure 7: four schedulers, 32 load/store units"),
        source("float half double integer special convert exchange", GUIDE_RATES, "9.0"),
        source("shared_bytes", A100_PAPER, "Combined L1 Data Cache and Shared Memory; no other is published for 9.0"),
        source("rate_l2_bytes", MEASURED, "3942 to 4472 bytes a clock on H800; nothing is public for H200"),
        source("mma_sync_permille", MEASURED, "H800: 490.7 of 756.5 TFLOP/s"),
        source("wgmma_permille", MEASURED, "H800: m64n256 on zeros; 88 % on random data"),
        source(
            "tensor_f16 tensor_bf16 tensor_tf32 tensor_f64 tensor_int8 tensor_fp8",
            H200_SHEET,
            "computed: dense peaks, half of those with sparsity, over 132 multiprocessors at 1830 MHz, FP64 at 1980 MHz",
        ),
    ],
    ..H100
};

/// NVIDIA L4, 24 GB.
pub const L4: Description = Description {
    model: "l4",
    compute_capability: (8, 9),
    sm_count: 58,
    shared_per_sm: 100 << 10,
    shared_per_block_optin: 99 << 10,
    l2_bytes: 48 << 20,
    clock_khz: 2_040_000,
    memory_clock_khz: 6_251_000,
    bus_bits: 192,
    memory_bytes: 24 << 30,
    threads_per_sm: 1536,
    blocks_per_sm: 24,
    l1_shared_bytes: 128 << 10,
    rates: Rates {
        issue: 4,
        float: 128,
        half: 128,
        double: 2,
        integer: 64,
        special: 16,
        convert: 16,
        exchange: 32,
        load_store: 16,
        shared_bytes: 128,
        l2_bytes: None,
        dram_bytes_per_second: 300_000_000_000,
        tensor_clock_khz: 2_040_000,
        tensor_f16: 512,
        tensor_bf16: 512,
        tensor_tf32: 256,
        tensor_f64: 2,
        tensor_int8: 1024,
        tensor_fp8: 1024,
        mma_sync_permille: 1000,
        wgmma_permille: 0,
    },
    sources: &[
        source(
            "compute_capability shared_per_sm shared_per_block_optin threads_per_sm blocks_per_sm",
            GUIDE_LIMITS,
            "8.9",
        ),
        source("sm_count", L4_SHEET, "7424 CUDA cores, 128 to a multiprocessor"),
        source("clock_khz tensor_clock_khz memory_clock_khz bus_bits memory_bytes", L4_SHEET, "product brief, table 1"),
        source("dram_bytes_per_second", L4_SHEET, "300 GB/s"),
        source("l2_bytes l1_shared_bytes", ADA_PAPER, "AD104: 48 MB (49152 KB) of L2, 128 KB of L1 a multiprocessor"),
        source(
            "issue load_store",
            ADA_PAPER,
            "figure of the AD10x multiprocessor: four schedulers, 16 load/store units",
        ),
        source("float half double integer special convert exchange", GUIDE_RATES, "8.9"),
        source("shared_bytes", A100_PAPER, "Combined L1 Data Cache and Shared Memory; no other is published for 8.9"),
        source("rate_l2_bytes", ADA_PAPER, "not published"),
        source("mma_sync_permille wgmma_permille", L4_SHEET, "the peaks are those of mma.sync; wgmma is of 9.0"),
        source(
            "tensor_f16 tensor_bf16 tensor_tf32 tensor_int8 tensor_fp8",
            L4_SHEET,
            "computed: dense peaks, half of those with sparsity, over 58 multiprocessors at 2040 MHz",
        ),
        source("tensor_f64", ADA_PAPER, "two FP64 units a multiprocessor, which also run FP64 tensor code"),
    ],
};
