//! The numbers of a description one by one, with their sources.

use super::Description;

/// A document, what it says where, and the figures that are from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Source {
    /// Names of figures, separated by spaces.
    pub figures: &'static str,
    pub document: &'static str,
    /// Table, figure or section, or how the number is computed.
    pub place: &'static str,
}

/// One number of a [`Description`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Figure {
    pub name: &'static str,
    /// With its unit; "unknown" where there is none.
    pub value: String,
    pub source: &'static Source,
}

impl Description {
    /// Every number with its unit and source.
    pub fn figures(&self) -> Vec<Figure> {
        let r = &self.rates;
        let (major, minor) = self.compute_capability;
        let clock = |khz: u32| format!("{} MHz", khz / 1000);
        let kib = |bytes: u32| format!("{} KiB", bytes >> 10);
        let each = |results: u32| format!("{results} per clock and SM");
        let fma = |count: u32| match count {
            0 => "none".into(),
            n => format!("{n} multiply-adds per clock and SM"),
        };
        let share = |permille: u32| match permille {
            0 => "none".into(),
            n => format!("{:.1} % of the tensor rate", f64::from(n) / 10.0),
        };
        let list = [
            ("compute_capability", format!("{major}.{minor}")),
            ("sm_count", format!("{} SMs", self.sm_count)),
            ("clock_khz", clock(self.clock_khz)),
            ("tensor_clock_khz", clock(r.tensor_clock_khz)),
            ("threads_per_sm", format!("{} threads", self.threads_per_sm)),
            ("blocks_per_sm", format!("{} blocks", self.blocks_per_sm)),
            ("shared_per_sm", kib(self.shared_per_sm)),
            ("shared_per_block_optin", kib(self.shared_per_block_optin)),
            ("l1_shared_bytes", kib(self.l1_shared_bytes)),
            ("l2_bytes", format!("{} MiB", self.l2_bytes >> 20)),
            ("memory_bytes", format!("{} MiB", self.memory_bytes >> 20)),
            ("memory_clock_khz", clock(self.memory_clock_khz)),
            ("bus_bits", format!("{} bits", self.bus_bits)),
            ("issue", format!("{} warp instructions per clock and SM", r.issue)),
            ("float", each(r.float)),
            ("half", each(r.half)),
            ("double", each(r.double)),
            ("integer", each(r.integer)),
            ("special", each(r.special)),
            ("convert", each(r.convert)),
            ("exchange", each(r.exchange)),
            ("load_store", format!("{} lanes per clock and SM", r.load_store)),
            ("shared_bytes", format!("{} bytes per clock and SM", r.shared_bytes)),
            ("rate_l2_bytes", r.l2_bytes.map_or("unknown".into(), |bytes| format!("{bytes} bytes per clock"))),
            ("dram_bytes_per_second", format!("{} GB/s", r.dram_bytes_per_second / 1_000_000_000)),
            ("tensor_f16", fma(r.tensor_f16)),
            ("tensor_bf16", fma(r.tensor_bf16)),
            ("tensor_tf32", fma(r.tensor_tf32)),
            ("tensor_f64", fma(r.tensor_f64)),
            ("tensor_int8", fma(r.tensor_int8)),
            ("tensor_fp8", fma(r.tensor_fp8)),
            ("mma_sync_permille", share(r.mma_sync_permille)),
            ("wgmma_permille", share(r.wgmma_permille)),
        ];
        let found =
            list.into_iter().filter_map(|(name, value)| Some(Figure { name, value, source: self.source(name)? }));
        found.collect()
    }

    /// Where a figure is from.
    pub fn source(&self, figure: &str) -> Option<&'static Source> {
        self.sources.iter().find(|source| source.figures.split(' ').any(|name| name == figure))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{A100, MODELS};

    /// Peaks that the documents give, from the rates of the description.
    #[test]
    fn rates_give_the_published_peaks() {
        let tera = |device: &super::Description, khz: u32, rate: u32| {
            2.0 * f64::from(device.sm_count) * f64::from(khz) * 1e3 * f64::from(rate) / 1e12
        };
        // FP32, FP64, dense FP16 and TF32 tensor; in TFLOP/s, from the data sheets and white papers.
        let published = [
            [19.5, 9.7, 312.0, 156.0],
            [66.9, 33.5, 989.4, 494.7],
            [66.9, 33.5, 989.4, 494.7],
            [30.3, 0.47, 121.0, 60.5],
        ];
        for (device, peaks) in MODELS.iter().zip(published) {
            let (r, clock) = (&device.rates, device.clock_khz);
            let computed = [
                tera(device, clock, r.float),
                tera(device, clock, r.double),
                tera(device, r.tensor_clock_khz, r.tensor_f16),
                tera(device, r.tensor_clock_khz, r.tensor_tf32),
            ];
            for (computed, published) in computed.into_iter().zip(peaks) {
                assert!((computed / published - 1.0).abs() < 0.01, "{}: {computed} for {published}", device.model);
            }
            // Two transfers a clock on the bus; the L4's clock is that of its data rate's half too.
            let bandwidth = f64::from(device.bus_bits) / 8.0 * f64::from(device.memory_clock_khz) * 2e3;
            assert!((bandwidth / r.dram_bytes_per_second as f64 - 1.0).abs() < 0.01, "{}: {bandwidth}", device.model);
        }
    }

    #[test]
    fn every_number_has_exactly_one_source_and_every_source_a_number() {
        let names: Vec<&str> = A100.figures().iter().map(|figure| figure.name).collect();
        for device in MODELS {
            let cited: Vec<&str> = device.sources.iter().flat_map(|source| source.figures.split(' ')).collect();
            assert_eq!(device.figures().len(), cited.len(), "{}", device.model);
            for name in &names {
                assert_eq!(cited.iter().filter(|cited| cited == &name).count(), 1, "{name} of {}", device.model);
            }
        }
        // As many names as the two structs have numbers.
        assert_eq!(names.len(), 33);
    }
}
