//! Times as a table and as JSON.

use std::path::Path;

use moe_kernels::experts::gemm::GemmDesc;
use serde_json::{Value, json};

use crate::clock::Timing;
use crate::peaks::Peaks;
use crate::work::{Batch, Work};

/// Everything measured in one run.
pub struct Report {
    peaks: Option<Peaks>,
    l2_bytes: f64,
    head: Value,
    times: Vec<Value>,
    products: Vec<Value>,
    skipped: Vec<String>,
}

impl Report {
    /// `head`: what is to be known of device and build.
    pub fn new(head: Value, peaks: Option<Peaks>, l2_bytes: f64) -> Report {
        println!(
            "{:<28} {:<15} {:>10} {:>9} {:>9} {:>7} {:>5}",
            "shape/tokens", "operation", "us", "TFLOP/s", "GB/s", "floor", "L2"
        );
        Report { peaks, l2_bytes, head, times: Vec::new(), products: Vec::new(), skipped: Vec::new() }
    }

    /// Whether these are times of the software device.
    pub fn of_software(&self) -> bool {
        self.head["software_device"] == true
    }

    /// One operation. `resident`: distinct bytes that the passes of a graph touch.
    pub fn add(&mut self, name: &str, batch: &Batch, operation: &str, time: Timing, work: Work, resident: f64) {
        let (shape, tokens) = (&batch.shape, batch.tokens);
        let (tflops, gbs) = (work.flops / time.us / 1e6, work.bytes() / time.us / 1e3);
        // No pass is faster than its bytes at the memory's rate, nor than its operations at the tensor cores'.
        let floor = self.peaks.map(|peaks| (work.bytes() / peaks.gbs / 1e3).max(work.flops / peaks.tflops / 1e6));
        let share = floor.map(|floor| floor / time.us);
        let l2 = if resident >= 2.0 * self.l2_bytes { "cold" } else { "warm" };
        let percent = share.map_or("-".to_owned(), |share| format!("{:.1} %", 100.0 * share));
        println!("{name:<28} {operation:<15} {:>10.2} {tflops:>9.1} {gbs:>9.0} {percent:>7} {l2:>5}", time.us);
        self.times.push(json!({
            "name": name, "model": shape.model, "experts": shape.experts, "top_k": shape.top_k, "hidden": shape.hidden,
            "intermediate": shape.intermediate, "tokens": tokens, "operation": operation,
            "us": time.us, "range_us": time.range, "passes": time.passes, "replays": time.replays,
            "bytes": work.bytes(), "flops": work.flops, "tflops": tflops, "gbs": gbs,
            "floor_us": floor, "share_of_floor": share, "distinct_bytes": resident, "l2": l2,
        }));
    }

    /// A product by one kernel.
    pub fn add_product(&mut self, name: &str, product: &GemmDesc, kernel: &str, capability: (u32, u32), time: Timing) {
        println!("{name:<28} {kernel:<42} {:>10.2}", time.us);
        self.products.push(json!({
            "kernel": kernel, "compute_capability": [capability.0, capability.1], "experts": product.rows.experts(),
            "rows": product.rows.count(), "n": product.n, "k": product.k, "us": time.us, "range_us": time.range,
        }));
    }

    pub fn skip(&mut self, name: &str, reason: &str) {
        println!("{name:<28} skipped: {reason}");
        self.skipped.push(format!("{name}: {reason}"));
    }

    /// Shapes that were not timed.
    pub fn skipped(&self) -> usize {
        self.skipped.len()
    }

    /// Writes all there is so far, in one piece.
    pub fn write(&self, path: &Path) -> std::io::Result<()> {
        let mut whole = self.head.clone();
        whole["times"] = json!(self.times);
        whole["products"] = json!(self.products);
        whole["skipped"] = json!(self.skipped);
        crate::whole_file::write(path, format!("{whole:#}\n").as_bytes())
    }
}
