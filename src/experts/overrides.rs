//! Times of products that a run on a GPU measured: where there are some, they choose the kernel in place of the [closed formula](super::cost).
//!
//! `benches/gpu_times` times each product by each kernel that computes it and writes the times with all others; `Overrides::from_json` (feature `overrides`) reads them back. They
//! are taken by an explicit call: [`Overrides::apply`] for a product, [`LayerDesc::overrides`](crate::layer::LayerDesc::overrides) for both of a layer.

use crate::experts::gemm::{self, GemmDesc, KernelSet, Rows};
use crate::registry::Gemm;
use crate::{DeviceInfo, Error};

/// A product's time by one kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Measurement {
    /// Compute capability of the device.
    pub compute_capability: (u32, u32),
    /// Name of the kernel: of its PTX entry, which says type, tile, form and layout.
    pub kernel: String,
    /// Matrices.
    pub experts: usize,
    /// Rows of all of them together.
    pub rows: usize,
    /// Columns of the result.
    pub n: usize,
    /// Depth.
    pub k: usize,
    /// Median time.
    pub nanoseconds: u64,
}

/// Measurements of products, of any devices.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    measurements: Vec<Measurement>,
}

/// Rows of a measurement and of a product that it speaks for differ by less than this factor.
const REACH: usize = 2;

impl Overrides {
    /// Of these measurements.
    pub fn new(measurements: Vec<Measurement>) -> Overrides {
        Overrides { measurements }
    }

    /// From the report of `benches/gpu_times`, its `products`. A report without any has none.
    ///
    /// # Errors
    /// [`Error::Invalid`] for what is no JSON, or a product without one of its fields.
    #[cfg(feature = "overrides")]
    pub fn from_json(report: &str) -> Result<Overrides, Error> {
        use serde_json::Value;
        let wrong = |expected: &str, got: String| Error::invalid("overrides", "report", expected, got);
        let report: Value = serde_json::from_str(report).map_err(|error| wrong("JSON", error.to_string()))?;
        let products = report["products"].as_array().map_or(&[][..], Vec::as_slice);
        let measurement = |product: &Value| {
            let number = |value: &Value| value.as_u64().and_then(|value| usize::try_from(value).ok());
            let [major, minor] = [0, 1].map(|i| product["compute_capability"][i].as_u64());
            let time = product["us"].as_f64().filter(|us| us.is_finite() && *us > 0.0)?;
            Some(Measurement {
                compute_capability: (u32::try_from(major?).ok()?, u32::try_from(minor?).ok()?),
                kernel: product["kernel"].as_str()?.to_owned(),
                experts: number(&product["experts"])?,
                rows: number(&product["rows"])?,
                n: number(&product["n"])?,
                k: number(&product["k"])?,
                nanoseconds: (time * 1e3) as u64,
            })
        };
        let fields = "kernel, compute_capability, experts, rows, n, k and us of each product";
        let read = |product| measurement(product).ok_or_else(|| wrong(fields, format!("{product}")));
        products.iter().map(read).collect::<Result<_, _>>().map(Overrides::new)
    }

    /// For the rest of the process, as descriptors hold it.
    pub fn leak(self) -> &'static Overrides {
        Box::leak(Box::new(self))
    }

    /// The descriptor with the set and the width of the kernel that was fastest, of those that were measured at this shape and can compute it; as it is where none
    /// was. Of several numbers of rows the nearest speaks, of at most twice and at least half the product's.
    ///
    /// # Errors
    /// Those of [`gemm::select`].
    pub fn apply(&self, desc: &GemmDesc, device: &DeviceInfo) -> Result<GemmDesc, Error> {
        let mut best: Option<(u64, GemmDesc)> = None;
        for candidate in candidates(desc, device)? {
            let kernel = gemm::select(&candidate, device)?.kernel.name();
            if let Some(time) = self.time(&kernel, desc, device)
                && best.is_none_or(|(least, _)| time < least)
            {
                best = Some((time, candidate));
            }
        }
        Ok(best.map_or(*desc, |(_, desc)| desc))
    }

    fn time(&self, kernel: &str, desc: &GemmDesc, device: &DeviceInfo) -> Option<u64> {
        let rows = desc.rows.count().max(1);
        // How far apart two numbers of rows are, as a quotient in thousandths.
        let distance = |other: usize| 1000 * rows.max(other) / rows.min(other).max(1);
        let fits = |at: &&Measurement| {
            at.compute_capability == device.compute_capability
                && at.kernel == kernel
                && [at.experts, at.n, at.k] == [desc.rows.experts(), desc.n, desc.k]
                && distance(at.rows) <= 1000 * REACH
        };
        let nearest = self.measurements.iter().filter(fits).min_by_key(|at| (distance(at.rows), at.nanoseconds));
        nearest.map(|at| at.nanoseconds)
    }
}

/// The descriptor in every form that leads to another kernel: what it asks for already stays.
///
/// # Errors
/// Those of [`gemm::select`].
pub fn candidates(desc: &GemmDesc, device: &DeviceInfo) -> Result<Vec<GemmDesc>, Error> {
    let mut all = vec![*desc];
    let mut names = vec![gemm::select(desc, device)?.kernel.name()];
    if desc.tile_n.is_none() {
        let height = |rows: &Rows| match rows {
            Rows::Grouped(shape) => Some(shape.tile_m),
            Rows::Dense(_) => None,
        };
        let tiles = Gemm::tiles(desc.dtype).iter().chain(Gemm::wide_tiles(desc.dtype));
        let widths = tiles.filter(|tile| height(&desc.rows).is_none_or(|rows| rows == tile.bm as usize));
        let narrow = widths.map(|tile| desc.kernels(KernelSet::Sm80).tile_n(Some(tile.bn as usize)));
        let sets = match desc.kernels {
            KernelSet::Fastest => narrow.chain([desc.kernels(KernelSet::Sm90a)]).collect(),
            KernelSet::Sm80 => narrow.collect(),
            KernelSet::Sm90a => Vec::new(),
        };
        for form in sets {
            // A set that does not run here is no candidate.
            if let Ok(selection) = gemm::select(&form, device)
                && !names.contains(&selection.kernel.name())
            {
                names.push(selection.kernel.name());
                all.push(form);
            }
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experts::dispatched::SlotShape;
    use crate::experts::tiles::max_tiles;
    use crate::rules::{Activation, Dtype, Glu, WeightDesc};
    use crate::runtime::device::{A100, H100};

    fn product(tokens: usize) -> GemmDesc {
        let shape = SlotShape::new(tokens, 128, Some(8), 8 * tokens, 128, max_tiles(8 * tokens, 128, 128));
        let weight = WeightDesc::new(Dtype::Bf16).glu(Glu::Split);
        GemmDesc::new(Dtype::Bf16, Rows::Grouped(shape), 768, 2048).weight(weight).activation(Activation::Silu)
    }

    /// A report with these kernels and times, as the bench writes it, of products of 4096 tokens.
    fn report(times: &[(&str, f64)], capability: &str) -> String {
        let product = |(kernel, us): &(&str, f64)| {
            format!(
                r#"{{"kernel": "{kernel}", "compute_capability": {capability}, "experts": 128, "rows": 32768, "n": 768, "k": 2048, "us": {us}}}"#
            )
        };
        format!(
            r#"{{"device": "made up", "times": [], "products": [{}]}}"#,
            times.iter().map(product).collect::<Vec<_>>().join(",")
        )
    }

    fn chosen(overrides: &Overrides, tokens: usize, device: &DeviceInfo) -> String {
        gemm::select(&overrides.apply(&product(tokens), device).unwrap(), device).unwrap().kernel.name()
    }

    const NARROW: &str = "gemm_bf16_128x128x64_glu_nk";
    const WIDE: &str = "gemm_bf16_128x256x64_glu_nk";
    const HOPPER: &str = "gemm_bf16_128x256x64_glu_nk_sm90a";

    #[test]
    fn measured_beats_modelled() {
        assert_eq!([&A100, &H100].map(|device| chosen(&Overrides::default(), 4096, device)), [WIDE, HOPPER]);
        let of = |times: &[(&str, f64)], capability| Overrides::from_json(&report(times, capability)).unwrap();
        let ampere = of(&[(NARROW, 90.0), (WIDE, 90.5)], "[8, 0]");
        assert_eq!(chosen(&ampere, 4096, &A100), NARROW);
        assert_eq!(chosen(&ampere, 4096, &H100), HOPPER, "times of another device");
        let hopper = of(&[(HOPPER, 70.0), (WIDE, 60.0), (NARROW, 65.0)], "[9, 0]");
        assert_eq!(chosen(&hopper, 4096, &H100), WIDE);
        // Nearest rows speak, within a factor of two.
        assert_eq!([2048, 8192].map(|tokens| chosen(&hopper, tokens, &H100)), [WIDE, WIDE]);
        assert_eq!(chosen(&hopper, 16384, &H100), HOPPER);
        // What was asked for stays.
        let forced = product(4096).kernels(KernelSet::Sm90a);
        assert_eq!(hopper.apply(&forced, &H100).unwrap(), forced);
    }

    #[test]
    fn every_kernel_of_a_product_is_a_candidate_once() {
        let names = |device: &DeviceInfo| {
            let all = candidates(&product(4096), device).unwrap();
            let mut names: Vec<_> = all.iter().map(|desc| gemm::select(desc, device).unwrap().kernel.name()).collect();
            names.sort();
            names
        };
        assert_eq!(names(&A100), [NARROW, WIDE]);
        assert_eq!(names(&H100), [NARROW, WIDE, HOPPER]);
    }

    #[test]
    fn reports_that_are_none() {
        for wrong in ["", "{", r#"{"products": [{"kernel": "gemm"}]}"#, &report(&[(WIDE, 0.0)], "[8, 0]")] {
            assert_eq!(Overrides::from_json(wrong).unwrap_err().argument(), Some("report"), "{wrong}");
        }
        assert_eq!(Overrides::from_json("{}").unwrap(), Overrides::default());
    }
}
