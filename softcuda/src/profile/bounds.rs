//! How long each unit of a device needs at least for a launch's work. The longest of these times is the modelled time.
//!
//! A bound is work over rate, with refinements. Work of the multiprocessors is as long as on the one that has the most blocks, all
//! blocks taken as equal that write outside themselves: blocks that leave at once make no wave. Tensor cores run at the clock
//! at which their peak is published, and products at what they were measured to reach of it ([`super::product`]). What asynchronous
//! copies move between global and shared memory passes the multiprocessor's SRAM once, on shared memory's side. Latencies, the
//! launch itself, dependences between units and everything that keeps them from their peak are not modelled, so that a real
//! GPU takes longer. Instructions are those of the PTX: `ptxas` makes several machine instructions of some and none of others.

use serde::{Deserialize, Serialize};

use super::product::Product;
use super::work::Work;
use crate::device::{Description, LINE_BYTES, SECTOR_BYTES};
use crate::exec::InstructionClass as Class;

/// What one unit needs at least.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Bound {
    /// Short name of the unit.
    pub unit: String,
    /// Seconds.
    pub seconds: f64,
    /// Work and rate in words, e.g. `4096 wavefronts at 1 per clock and SM`.
    pub detail: String,
}

/// The units of `device`, in a fixed order; those whose rate is not known are left out.
pub fn bounds(device: &Description, work: &Work) -> Vec<Bound> {
    let rates = &device.rates;
    let clock = f64::from(device.clock_khz) * 1e3;
    let sms = f64::from(device.sm_count);
    // Work of the fullest multiprocessor over the average.
    let blocks = work.working_blocks.max(1) as f64;
    let fullest = (blocks / sms).ceil() * sms / blocks;
    let mut list = Vec::new();
    let mut on_sm = |unit: &str, amount: f64, what: &str, rate: f64, clock: f64| {
        let seconds = if rate > 0.0 { amount * fullest / (rate * sms * clock) } else { 0.0 };
        let detail = format!("{} {what} at {} per clock and SM", count(amount), count(rate));
        list.push(Bound { unit: unit.into(), seconds, detail });
    };
    let class = |class: Class| work.class(class) as f64;
    let lanes = |class: Class| 32.0 * work.class(class) as f64;
    on_sm("issue", work.warp_instructions as f64, "warp instructions", rates.issue.into(), clock);
    for (unit, kind, rate) in [
        ("f32", Class::Float, rates.float),
        // Rates of f16 are those of packed instructions, two results to a lane.
        ("f16", Class::Half, rates.half / 2),
        ("f64", Class::Double, rates.double),
        ("integer", Class::Integer, rates.integer),
        ("special", Class::Special, rates.special),
        ("convert", Class::Convert, rates.convert),
        ("exchange", Class::Exchange, rates.exchange),
    ] {
        on_sm(unit, lanes(kind), "lanes", rate.into(), clock);
    }
    let memory = [
        Class::GlobalLoad,
        Class::GlobalStore,
        Class::SharedLoad,
        Class::SharedStore,
        Class::OtherMemory,
        Class::Atomic,
        Class::AsyncCopy,
        Class::MatrixMove,
    ];
    let instructions: f64 = memory.into_iter().map(class).sum();
    on_sm("load/store", 32.0 * instructions, "lanes", rates.load_store.into(), clock);
    let wavefront = f64::from(LINE_BYTES);
    let through_l1 = work.global.sectors.saturating_sub(work.async_sectors) as f64 * f64::from(SECTOR_BYTES);
    let passes = work.shared.wavefronts as f64 + through_l1 / wavefront;
    on_sm("shared and L1", passes, "passes of 128 bytes", f64::from(rates.shared_bytes) / wavefront, clock);
    let tensor_clock = f64::from(rates.tensor_clock_khz) * 1e3;
    let (mut seconds, mut parts) = (0.0, Vec::new());
    for (name, &instructions) in &work.matrix {
        let Some(product) = Product::parse(name) else { continue };
        let amount = instructions as f64 * product.multiply_adds as f64;
        let Some(rate) = product.rate(rates) else {
            parts.push(format!("{} multiply-adds of {name} at an unknown rate", count(amount)));
            continue;
        };
        let clock = if product.kind == "f64" { clock } else { tensor_clock };
        seconds += amount * fullest / (rate * sms * clock);
        parts.push(format!("{} multiply-adds of {name} at {rate:.0} per clock and SM", count(amount)));
    }
    let detail = if parts.is_empty() { "no matrix instructions".into() } else { parts.join(", ") };
    list.push(Bound { unit: "tensor".into(), seconds, detail });
    if let Some(rate) = rates.l2_bytes {
        let bytes = work.traffic.l2_bytes() as f64;
        let detail = format!("{} bytes at {rate} per clock", count(bytes));
        list.push(Bound { unit: "L2".into(), seconds: bytes / (f64::from(rate) * clock), detail });
    }
    let (bytes, rate) = (work.traffic.dram_bytes() as f64, rates.dram_bytes_per_second as f64);
    let detail = format!("{} bytes at {} GB/s", count(bytes), rate / 1e9);
    list.push(Bound { unit: "DRAM".into(), seconds: bytes / rate, detail });
    list
}

/// The greatest of the bounds in seconds, and its unit.
pub fn greatest(bounds: &[Bound]) -> (f64, String) {
    let most = bounds.iter().max_by(|a, b| a.seconds.total_cmp(&b.seconds));
    most.map_or((0.0, "nothing".into()), |bound| (bound.seconds, bound.unit.clone()))
}

/// A number that is as short as three digits after the point allow.
pub fn count(number: f64) -> String {
    let scaled = |divisor: f64, suffix: &str| {
        let text = format!("{:.3}", number / divisor);
        format!("{}{suffix}", text.trim_end_matches('0').trim_end_matches('.'))
    };
    match number.abs() {
        n if n < 1e5 => scaled(1.0, ""),
        n if n < 1e8 => scaled(1e6, " M"),
        n if n < 1e11 => scaled(1e9, " G"),
        _ => scaled(1e12, " T"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{A100, H100, L4};
    use crate::exec::Counters;
    use crate::profile::Traffic;

    fn seconds(list: &[Bound], unit: &str) -> f64 {
        list.iter().find(|bound| bound.unit == unit).unwrap().seconds
    }

    #[test]
    fn a_copy_is_bound_by_memory_and_a_product_by_tensor_cores() {
        let traffic = Traffic { dram_read_bytes: 1 << 30, dram_write_bytes: 1 << 30, ..Traffic::default() };
        let list = bounds(&H100, &Work::new(&Counters { blocks: 132 * 8, ..Counters::default() }, traffic));
        let (most, unit) = greatest(&list);
        assert_eq!((unit.as_str(), most), ("DRAM", (2u64 << 30) as f64 / 3.352e12));
        // 4096 cubed in bf16 at H100's published peak.
        let products = 4096u64.pow(3) / (16 * 8 * 16);
        let at_peak = |name: &str, products: u64| {
            let matrix = [(name.to_string(), products)].into();
            let counters = Counters { blocks: 132, matrix, ..Counters::default() };
            let list = bounds(&H100, &Work::new(&counters, Traffic::default()));
            assert_eq!(greatest(&list).1, "tensor");
            2.0 * 4096f64.powi(3) / 989.4e12 / seconds(&list, "tensor")
        };
        assert!((at_peak("m16n8k16.f32.bf16.bf16.f32", products) - 0.649).abs() < 1e-3);
        assert!((at_peak("wgmma.m64n256k16.f32.bf16.bf16.ss", products / 128) - 0.96).abs() < 1e-3);
        assert!((at_peak("wgmma.m64n8k16.f32.bf16.bf16.ss", products / 4) - 0.96 * 4.0 / 18.0).abs() < 1e-3);
    }

    #[test]
    fn what_is_copied_asynchronously_passes_once() {
        // Two copies of 512 bytes to shared memory, 4 wavefronts each, and a load of 128 bytes: 9 passes, not 17.
        let mut counters = Counters { blocks: 132, async_bytes: 1024, async_sectors: 32, ..Counters::default() };
        counters.shared.wavefronts = 8;
        counters.global.sectors = 36;
        let list = bounds(&H100, &Work::new(&counters, Traffic::default()));
        assert!((seconds(&list, "shared and L1") / (9.0 / 132.0 / 1.98e9) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn blocks_that_leave_at_once_are_no_wave() {
        // 1000 blocks, of which 133 work: two on one of 132 multiprocessors, whatever the others did.
        let mut counters = Counters { blocks: 1000, working_blocks: 133, ..Counters::default() };
        counters.warp_instructions[Class::Float as usize] = 133 * 1000;
        let list = bounds(&H100, &Work::new(&counters, Traffic::default()));
        assert!((seconds(&list, "issue") / (2000.0 / 4.0 / 1.98e9) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn l2_delivers_what_was_measured() {
        // A million sectors at the most bytes a clock that were measured.
        let traffic = Traffic { l2_read_sectors: 1_000_000, ..Traffic::default() };
        let work = Work::new(&Counters::default(), traffic);
        for (device, bytes, hertz) in [(A100, 2008.0, 1.41e9), (H100, 4472.0, 1.98e9)] {
            assert!((seconds(&bounds(&device, &work), "L2") / (32e6 / bytes / hertz) - 1.0).abs() < 1e-12);
        }
    }

    #[test]
    fn the_fullest_multiprocessor_sets_the_pace() {
        let mut counters = Counters { blocks: 109, ..Counters::default() };
        counters.warp_instructions[Class::Float as usize] = 109 * 1000;
        let list = bounds(&A100, &Work::new(&counters, Traffic::default()));
        // Two blocks on one of 108: 2000 instructions of 32 lanes on 64 units at 1410 MHz.
        assert!((seconds(&list, "f32") / (2000.0 * 32.0 / 64.0 / 1.41e9) - 1.0).abs() < 1e-12);
        assert!((seconds(&list, "issue") / (2000.0 / 4.0 / 1.41e9) - 1.0).abs() < 1e-12);
        assert_eq!(seconds(&list, "f64"), 0.0);
    }

    #[test]
    fn what_is_not_known_bounds_nothing() {
        assert!(bounds(&L4, &Work::default()).iter().all(|bound| bound.unit != "L2"));
        assert!(bounds(&H100, &Work::default()).iter().any(|bound| bound.unit == "L2"));
    }
}
