//! A profile as text, with bars, for a terminal.

use std::fmt::Write;

use super::bounds::count;
use super::limits::{LEFT_OUT, short_launches};
use super::record::{KernelProfile, LaunchProfile, LineProfile, Profile, RegisterSource};

/// Columns of a full bar.
const BAR: usize = 30;
/// Hot lines that are shown of a kernel.
const HOT: usize = 5;

/// What lines are ordered by.
pub(super) type Weight = fn(&LineProfile) -> u64;

/// `fraction` of a bar, in eighths of a column.
fn bar(fraction: f64) -> String {
    let eighths = (fraction.clamp(0.0, 1.0) * 8.0 * BAR as f64).round() as usize;
    let mut text = "█".repeat(eighths / 8);
    text.push_str(["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"][eighths % 8]);
    let missing = BAR - text.chars().count();
    text.push_str(&"·".repeat(missing));
    text
}

/// Seconds in a unit that suits them, with three digits or more.
pub(super) fn time(seconds: f64) -> String {
    let (number, unit) = match seconds {
        0.0 => return "0".into(),
        s if s < 1e-6 => (s * 1e9, "ns"),
        s if s < 1e-3 => (s * 1e6, "µs"),
        s if s < 1.0 => (s * 1e3, "ms"),
        s => (s, "s"),
    };
    let digits = 2 - number.log10().floor().clamp(0.0, 2.0) as usize;
    format!("{number:.digits$} {unit}")
}

/// Bytes in a unit that suits them.
pub(super) fn bytes(bytes: u64) -> String {
    match bytes {
        b if b < 1 << 10 => format!("{b} B"),
        b if b < 1 << 20 => format!("{:.1} KiB", b as f64 / 1024.0),
        b if b < 1 << 30 => format!("{:.1} MiB", b as f64 / (1 << 20) as f64),
        b => format!("{:.1} GiB", b as f64 / (1 << 30) as f64),
    }
}

/// `part` of `whole` in percent.
pub(super) fn percent(part: u64, whole: u64) -> String {
    if whole == 0 { "–".into() } else { format!("{:.1} %", 100.0 * part as f64 / whole as f64) }
}

impl Profile {
    /// As text of some 100 columns: every kernel with its bounds, counters and hot lines.
    pub fn to_text(&self) -> String {
        let mut out = String::new();
        // Writing to a string does not fail.
        let _ = self.write_text(&mut out);
        out
    }

    fn write_text(&self, out: &mut String) -> std::fmt::Result {
        writeln!(out, "softcuda {}: profile on the model of {}", self.softcuda, self.models())?;
        writeln!(out, "{}", self.notice)?;
        let total = self.modelled_seconds();
        writeln!(out, "{} launches, at least {} if run one after another", self.launch_count, time(total))?;
        for caches in &self.caches {
            writeln!(out, "caches {}: {}", caches.name(), caches.words())?;
        }
        for kernel in &self.kernels {
            writeln!(out)?;
            kernel.write_text(out, total, self.warps_per_sm(&kernel.device))?;
        }
        writeln!(out, "\nNot in the modelled times:")?;
        for (name, what) in LEFT_OUT {
            writeln!(out, "  {name}: {what}")?;
        }
        writeln!(out, "{}", short_launches(self))?;
        Ok(())
    }
}

/// One line: what the launch did, and what it would take at least.
impl std::fmt::Display for LaunchProfile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let w = &self.work;
        write!(f, "{}: {} warp instructions", self.kernel, count(w.warp_instructions as f64))?;
        for (kind, ops) in &w.tensor {
            write!(f, ", {} {kind} multiply-adds", count(ops.multiply_adds as f64))?;
        }
        let (g, s) = (&w.global, &w.shared);
        write!(f, ", {} sectors (ideal {})", count(g.sectors as f64), count(g.ideal_sectors as f64))?;
        if s.requests > 0 {
            write!(f, ", {} wavefronts (ideal {})", count(s.wavefronts as f64), count(s.ideal_wavefronts as f64))?;
        }
        let (l2, dram) = (bytes(w.traffic.l2_bytes()), bytes(w.traffic.dram_bytes()));
        let occupancy = 100.0 * self.occupancy.fraction;
        write!(f, ", L2 {l2}, DRAM {dram}, occupancy {occupancy:.0} %; ")?;
        write!(f, "modelled: at least {}, limited by {}", time(self.modelled_seconds), self.limited_by)
    }
}

impl KernelProfile {
    fn write_text(&self, out: &mut String, total: f64, warps_per_sm: u32) -> std::fmt::Result {
        let w = &self.work;
        let share = if total > 0.0 { 100.0 * self.modelled_seconds / total } else { 0.0 };
        writeln!(out, "{} on {}", self.name, self.device)?;
        writeln!(
            out,
            "  {} launches, at least {} ({share:.1} % of all), limited by {}",
            self.launches,
            time(self.modelled_seconds),
            self.limited_by
        )?;
        let most = self.bounds.iter().fold(0.0, |most: f64, bound| most.max(bound.seconds));
        for bound in self.bounds.iter().filter(|bound| bound.seconds > 0.0) {
            let fraction = bound.seconds / most;
            writeln!(
                out,
                "  {:14} {} {:>10} {:>6.1} %  {}",
                bound.unit,
                bar(fraction),
                time(bound.seconds),
                100.0 * fraction,
                bound.detail
            )?;
        }
        let o = &self.occupancy;
        let registers = match self.registers.source {
            RegisterSource::Ptxas => "registers (ptxas)",
            RegisterSource::Estimate => "registers (estimate)",
        };
        writeln!(
            out,
            "  occupancy      {} {:>6.1} %  {} blocks, {} of {warps_per_sm} warps per SM, limited by {}; {} {registers}",
            bar(o.fraction),
            100.0 * o.fraction,
            o.blocks_per_sm,
            o.warps_per_sm,
            o.limiter,
            self.registers.count
        )?;
        let classes: Vec<String> =
            by_count(&w.classes).map(|(name, n)| format!("{name} {}", count(n as f64))).collect();
        writeln!(
            out,
            "  instructions   {} of warps, {:.1} % of lanes active: {}",
            count(w.warp_instructions as f64),
            100.0 * w.lane_use(),
            classes.join(", ")
        )?;
        if w.working_blocks < w.blocks {
            let (working, all) = (count(w.working_blocks as f64), count(w.blocks as f64));
            writeln!(out, "  blocks         {working} of {all} work, the others leave at once")?;
        }
        for (kind, ops) in &w.tensor {
            let (products, adds) = (count(ops.instructions as f64), count(ops.multiply_adds as f64));
            writeln!(out, "  tensor         {kind}: {products} products, {adds} multiply-adds")?;
        }
        let g = &w.global;
        writeln!(
            out,
            "  global         {} requests, {} sectors, ideal {}: {} wasted",
            g.requests,
            g.sectors,
            g.ideal_sectors,
            percent(g.sectors.saturating_sub(g.ideal_sectors), g.sectors)
        )?;
        let t = &w.traffic;
        writeln!(
            out,
            "  caches         L1 hits {}; L2 {}, read hits {}; DRAM {} read, {} written{}",
            percent(t.l1_hits, t.l1_sectors),
            bytes(t.l2_bytes()),
            percent(t.l2_read_hits, t.l2_read_sectors),
            bytes(t.dram_read_bytes),
            bytes(t.dram_write_bytes),
            if t.in_pieces { " (replayed in pieces)" } else { "" }
        )?;
        let s = &w.shared;
        writeln!(
            out,
            "  shared         {} requests, {} wavefronts, ideal {}: {} from conflicts; {} copied asynchronously",
            s.requests,
            s.wavefronts,
            s.ideal_wavefronts,
            percent(s.wavefronts.saturating_sub(s.ideal_wavefronts), s.wavefronts),
            bytes(w.async_bytes)
        )?;
        let polls = match w.repeated_polls {
            0 => String::new(),
            n => format!("; {} rounds of polling left out", count(n as f64)),
        };
        writeln!(out, "  synchronise    {} at barriers, {} waits{polls}", w.barriers, w.waits)?;
        let lists: [(&str, Weight); 2] = [
            ("conflicts, in wavefronts beyond the ideal", LineProfile::conflict_wavefronts),
            ("wasted sectors", LineProfile::wasted_sectors),
        ];
        for (title, weight) in lists {
            let hot = self.hottest(HOT, weight);
            if !hot.is_empty() {
                writeln!(out, "  {title}:")?;
            }
            for line in hot {
                writeln!(out, "    {:>12}  line {:>4}  {}", weight(line), line.line, line.text)?;
            }
        }
        Ok(())
    }

    /// The lines that weigh most, heaviest first, without those that weigh nothing.
    pub fn hottest(&self, most: usize, weight: impl Fn(&LineProfile) -> u64) -> Vec<&LineProfile> {
        let mut lines: Vec<&LineProfile> = self.lines.iter().filter(|line| weight(line) > 0).collect();
        lines.sort_by_key(|line| std::cmp::Reverse(weight(line)));
        lines.truncate(most);
        lines
    }
}

/// Names with their counts, greatest first.
pub(super) fn by_count(map: &std::collections::BTreeMap<String, u64>) -> impl Iterator<Item = (&str, u64)> {
    let mut list: Vec<(&str, u64)> = map.iter().map(|(name, &n)| (name.as_str(), n)).collect();
    list.sort_by_key(|&(_, n)| std::cmp::Reverse(n));
    list.into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_and_units() {
        assert_eq!(bar(1.0), "█".repeat(BAR));
        assert_eq!(bar(0.0), "·".repeat(BAR));
        assert!(bar(0.5 + 1.0 / (8 * BAR) as f64).starts_with(&("█".repeat(BAR / 2) + "▏·")));
        let times = [1.5e-6, 0.0, 40.404e-9, 0.123456, 1234.0].map(time);
        assert_eq!(times, ["1.50 µs", "0", "40.4 ns", "123 ms", "1234 s"]);
        assert_eq!([1023, 1 << 10, 3 << 19, 5 << 30].map(bytes), ["1023 B", "1.0 KiB", "1.5 MiB", "5.0 GiB"]);
        assert_eq!((percent(1, 8), percent(0, 0)), ("12.5 %".into(), "–".into()));
    }
}
