//! Matrix products by their names: what they compute, what they read of shared memory, and how long they keep the tensor cores.
//!
//! **`mma.sync`** takes its work over the tensor rate, times what it was measured to reach of that: 0.649 on Hopper, where only
//! `wgmma` feeds the tensor cores fully.
//!
//! **`wgmma`** takes the longer of two: its work over the tensor rate, and what it reads of shared memory (B, and A unless that is in
//! registers) over the bytes that shared memory delivers; divided by the share of the tensor rate that the largest shape was
//! measured to reach, 0.96. For 16-bit factors, m64nNk16 is N / 2 clocks of work, and 16 + N / 4 clocks of shared memory with A in
//! it, so that N = 8, 16, 32 reach 21, 38, 64 % of the tensor rate; 21, 38, 63 % were measured. From N = 64 on work is longer.
//! What is between the measured sizes follows from the same two lines.

use crate::device::Rates;

/// One matrix instruction of a warp or a warpgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Product {
    /// Type of the factors: `f16`, `bf16`, `tf32`, `f64`, `int8`, `fp8`, or as spelled.
    pub kind: String,
    pub multiply_adds: u64,
    /// Whether it is a warpgroup's.
    pub warpgroup: bool,
    /// Bytes of shared memory that the instruction itself reads.
    pub shared_bytes: u64,
}

impl Product {
    /// From a name of [`Counters::matrix`](crate::exec::Counters::matrix).
    pub fn parse(name: &str) -> Option<Product> {
        let warpgroup = name.starts_with("wgmma.");
        let mut parts = name.strip_prefix("wgmma.").unwrap_or(name).split('.');
        let [m, n, k] = shape(parts.next()?)?;
        // Types stand in the order d, a, b, c.
        let types: Vec<&str> = parts.collect();
        let factor = *types.get(1)?;
        let (kind, bytes) = match factor {
            "s8" | "u8" => ("int8", 1),
            "e4m3" | "e5m2" => ("fp8", 1),
            "tf32" => ("tf32", 4),
            "f64" => ("f64", 8),
            other => (other, 2),
        };
        let rows = if types.last() == Some(&"rs") { n } else { m + n };
        let shared_bytes = if warpgroup { rows * k * bytes } else { 0 };
        Some(Product { kind: kind.into(), multiply_adds: m * n * k, warpgroup, shared_bytes })
    }

    /// Multiply-adds a clock at which a multiprocessor's tensor cores do such products and nothing else; `None` if not known.
    pub fn rate(&self, rates: &Rates) -> Option<f64> {
        let peak = f64::from(peak(rates, &self.kind));
        if peak == 0.0 {
            return None;
        }
        let work = self.multiply_adds as f64;
        let share = |permille: u32| f64::from(permille) / 1000.0;
        Some(if self.warpgroup {
            let operands = self.shared_bytes as f64 / f64::from(rates.shared_bytes);
            work / (work / peak).max(operands) * share(rates.wgmma_permille)
        } else if self.kind == "f64" {
            // No other instruction takes f64, and nothing was measured: the published peak is this instruction's.
            peak
        } else {
            peak * share(rates.mma_sync_permille)
        })
    }
}

/// Multiply-adds a clock of a multiprocessor's tensor cores; 0 where they do not take the type.
fn peak(rates: &Rates, kind: &str) -> u32 {
    match kind {
        "f16" => rates.tensor_f16,
        "bf16" => rates.tensor_bf16,
        "tf32" => rates.tensor_tf32,
        "f64" => rates.tensor_f64,
        "int8" => rates.tensor_int8,
        "fp8" => rates.tensor_fp8,
        _ => 0,
    }
}

/// m, n and k of `m16n8k16`.
fn shape(text: &str) -> Option<[u64; 3]> {
    let (m, rest) = text.strip_prefix('m')?.split_once('n')?;
    let (n, k) = rest.split_once('k')?;
    Some([m.parse().ok()?, n.parse().ok()?, k.parse().ok()?])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{A100, H100, L4};

    #[test]
    fn products_by_their_names() {
        for (name, kind, multiply_adds, warpgroup, shared_bytes) in [
            ("m16n8k16.f32.bf16.bf16.f32", "bf16", 2048, false, 0),
            ("m16n8k32.s32.u8.s8.s32", "int8", 4096, false, 0),
            ("m8n8k4.f64.f64.f64.f64", "f64", 256, false, 0),
            // 64 and 128 rows of 32 bytes; 128 and 256 alone.
            ("wgmma.m64n128k16.f32.f16.f16.ss", "f16", 131_072, true, 192 * 32),
            ("wgmma.m64n128k8.f32.tf32.tf32.rs", "tf32", 65_536, true, 128 * 32),
            ("wgmma.m64n256k32.f32.e4m3.e5m2.rs", "fp8", 524_288, true, 256 * 32),
        ] {
            let want = Product { kind: kind.into(), multiply_adds, warpgroup, shared_bytes };
            assert_eq!(Product::parse(name), Some(want), "{name}");
        }
        for other in ["wgmma.fence.sync.aligned", "m16n8", "fma.rn.f32"] {
            assert_eq!(Product::parse(other), None, "{other}");
        }
    }

    fn share(device: &crate::device::Description, name: &str) -> f64 {
        let product = Product::parse(name).unwrap();
        product.rate(&device.rates).unwrap() / f64::from(peak(&device.rates, &product.kind))
    }

    #[test]
    fn hopper_reaches_what_was_measured() {
        // In thousandths of the tensor rate.
        let near = |name: &str, permille: f64, within: f64| {
            let found = 1000.0 * share(&H100, name);
            assert!((found - permille).abs() <= within, "{name}: {found}, not {permille}");
        };
        near("m16n8k16.f32.bf16.bf16.f32", 490.7 / 756.5 * 1000.0, 0.5);
        near("m16n8k32.s32.s8.s8.s32", 649.0, 1e-9);
        near("m8n8k4.f64.f64.f64.f64", 1000.0, 1e-9);
        // Measured, with A in shared memory.
        for (n, permille) in [(8, 210.0), (16, 380.0), (32, 630.0), (256, 960.0)] {
            near(&format!("wgmma.m64n{n}k16.f32.bf16.bf16.ss"), permille, 10.0);
        }
        // By hand: 12 clocks of work in 22 of shared memory, 24 in 28; equal at 64; in registers the work alone.
        near("wgmma.m64n24k16.f32.f16.f16.ss", 960.0 * 12.0 / 22.0, 1e-9);
        near("wgmma.m64n48k16.f32.f16.f16.ss", 960.0 * 24.0 / 28.0, 1e-9);
        near("wgmma.m64n64k16.f32.f16.f16.ss", 960.0, 1e-9);
        near("wgmma.m64n8k16.f32.f16.f16.rs", 960.0, 1e-9);
        // As many bytes and clocks in every type.
        near("wgmma.m64n8k8.f32.tf32.tf32.ss", 960.0 * 4.0 / 18.0, 1e-9);
        near("wgmma.m64n8k32.f32.e4m3.e4m3.ss", 960.0 * 4.0 / 18.0, 1e-9);
    }

    #[test]
    fn before_hopper_mma_sync_is_the_tensor_cores_instruction() {
        for device in [A100, L4] {
            assert_eq!(share(&device, "m16n8k16.f32.bf16.bf16.f32"), 1.0, "{}", device.model);
        }
        assert_eq!(Product::parse("m16n8k32.f32.e4m3.e4m3.f32").unwrap().rate(&A100.rates), None);
    }
}
