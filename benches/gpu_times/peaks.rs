//! What devices can do at most, by the name that the driver gives.

/// A device's ceilings.
#[derive(Clone, Copy, Debug)]
pub struct Peaks {
    /// bf16 with f32 sums, dense, in 10^12 operations a second.
    pub tflops: f64,
    /// Device memory, in 10^9 bytes a second.
    pub gbs: f64,
}

/// The first entry whose words are all in the name counts. From NVIDIA's data sheets and architecture papers; rates without sparsity.
const TABLE: &[(&[&str], Peaks)] = &[
    (&["H100", "PCIe"], Peaks { tflops: 756.0, gbs: 2039.0 }),
    (&["H100", "NVL"], Peaks { tflops: 835.0, gbs: 3938.0 }),
    (&["H100", "HBM3"], Peaks { tflops: 989.4, gbs: 3352.0 }),
    (&["H200", "NVL"], Peaks { tflops: 835.5, gbs: 4800.0 }),
    (&["H200"], Peaks { tflops: 989.4, gbs: 4800.0 }),
    (&["GH200", "480GB"], Peaks { tflops: 989.4, gbs: 4023.0 }),
    (&["H800", "PCIe"], Peaks { tflops: 756.0, gbs: 2039.0 }),
    (&["H800"], Peaks { tflops: 989.4, gbs: 3352.0 }),
    (&["H20"], Peaks { tflops: 148.0, gbs: 4000.0 }),
    (&["A100", "SXM4", "80GB"], Peaks { tflops: 312.0, gbs: 2039.0 }),
    (&["A100", "80GB", "PCIe"], Peaks { tflops: 312.0, gbs: 1935.0 }),
    (&["A100", "40GB"], Peaks { tflops: 312.0, gbs: 1555.0 }),
    (&["L40S"], Peaks { tflops: 362.0, gbs: 864.0 }),
    (&["L4"], Peaks { tflops: 121.0, gbs: 300.0 }),
    (&["A10"], Peaks { tflops: 125.0, gbs: 600.0 }),
    (&["RTX", "4090"], Peaks { tflops: 165.2, gbs: 1008.0 }),
    (&["RTX", "3090"], Peaks { tflops: 71.0, gbs: 936.0 }),
    (&["B200"], Peaks { tflops: 2250.0, gbs: 8000.0 }),
];

/// The ceilings of a device; none for one that is not in the table.
pub fn of(name: &str) -> Option<Peaks> {
    let words: Vec<&str> = name.split([' ', '-']).collect();
    TABLE.iter().find(|(all, _)| all.iter().all(|word| words.contains(word))).map(|&(_, peaks)| peaks)
}
