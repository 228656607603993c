//! The section of one kernel: its units, memory, instructions and lines.

use std::fmt::Write;

use super::parts::{Safe, colour, ratio, row, track};
use crate::device::SECTOR_BYTES;
use crate::profile::bounds::{Bound, count};
use crate::profile::record::{KernelProfile, LineProfile, RegisterSource};
use crate::profile::text::{Weight, by_count, bytes, percent, time};

/// Kernels with a section that is open at first.
const OPEN: usize = 4;
/// Lines in the table of hot ones, by each of its measures.
const HOT: usize = 6;

impl KernelProfile {
    pub(super) fn write_html(&self, out: &mut String, index: usize, warps_per_sm: u32) -> std::fmt::Result {
        let launches = if self.launches == 1 { "1 launch".into() } else { format!("{} launches", self.launches) };
        writeln!(
            out,
            "<section class=\"kernel\" id=\"k{index}\">\n<h2>{}</h2>\n<p class=\"soft\">{launches} on <code>{}</code>, modelled {}, limited by \
             <b style=\"color:{}\">{}</b></p>\n<details{}><summary>units, memory, instructions, lines</summary>\n\
             <div class=\"two\">",
            Safe(&self.name),
            Safe(&self.device),
            time(self.modelled_seconds),
            colour(&self.limited_by),
            Safe(&self.limited_by),
            if index < OPEN { " open" } else { "" }
        )?;
        self.write_units(out);
        self.write_memory(out);
        self.write_mix(out)?;
        self.write_facts(out, warps_per_sm)?;
        out.push_str("</div>\n");
        self.write_lines(out)?;
        out.push_str("</details>\n</section>\n");
        Ok(())
    }

    fn write_units(&self, out: &mut String) {
        out.push_str("<div>\n<h3>Least time of each unit</h3>\n");
        let most = self.bounds.iter().fold(0.0, |most: f64, bound| most.max(bound.seconds));
        for Bound { unit, seconds, detail } in self.bounds.iter().filter(|bound| bound.seconds > 0.0) {
            out.push_str(&row("row", unit, &track(ratio(*seconds, most), colour(unit)), &time(*seconds), detail));
        }
        let idle: Vec<&str> = self.bounds.iter().filter(|b| b.seconds <= 0.0).map(|b| b.unit.as_str()).collect();
        if !idle.is_empty() {
            out.push_str(&format!("<p class=\"soft idle\">Nothing to do: {}</p>\n", Safe(idle.join(", "))));
        }
        out.push_str("</div>\n");
    }

    /// Bytes on their way from what lanes ask for to device memory, and wavefronts of shared memory, each with its ideal.
    fn write_memory(&self, out: &mut String) {
        let (g, t, s) = (&self.work.global, &self.work.traffic, &self.work.shared);
        let sectors = |n: u64| n * u64::from(SECTOR_BYTES);
        let flow = [
            ("ideal", sectors(g.ideal_sectors), "#8a92a6", "bytes that the lanes ask for, in whole sectors"),
            ("moved", sectors(g.sectors), "#c98b2b", "sectors of all requests"),
            ("L1 hits", sectors(t.l1_hits), "#f2a541", "of the sectors that loads look up in L1"),
            ("L2 read", sectors(t.l2_read_sectors), "#58b0a8", "sectors that L2 is asked for"),
            ("L2 write", sectors(t.l2_write_sectors + t.l2_atomic_sectors), "#58b0a8", "stores and atomics"),
            ("DRAM read", t.dram_read_bytes, "#2a7f9e", "sectors that L2 misses"),
            (
                "DRAM write",
                t.dram_write_bytes,
                "#2a7f9e",
                "dirty sectors that made room, and with cold caches those left at the end",
            ),
        ];
        let most = flow.iter().map(|f| f.1).max().unwrap_or(0) as f64;
        out.push_str("<div>\n<h3>Global memory</h3>\n");
        for (name, amount, colour, title) in flow {
            let class = if amount > 0 { "row" } else { "row zero" };
            out.push_str(&row(class, name, &track(ratio(amount as f64, most), colour), &bytes(amount), title));
        }
        if s.requests > 0 {
            out.push_str("<h3 style=\"margin-top:1rem\">Shared memory, wavefronts</h3>\n");
            for (name, amount, colour) in
                [("no conflicts", s.ideal_wavefronts, "#8a92a6"), ("executed", s.wavefronts, "#f2a541")]
            {
                let bar = track(ratio(amount as f64, s.wavefronts as f64), colour);
                out.push_str(&row("row", name, &bar, &count(amount as f64), ""));
            }
        }
        out.push_str("</div>\n");
    }

    fn write_mix(&self, out: &mut String) -> std::fmt::Result {
        out.push_str("<div>\n<h3>Warp instructions by class</h3>\n<span class=\"track\" style=\"height:1.3rem\">");
        let all = self.work.warp_instructions as f64;
        for (class, n) in by_count(&self.work.classes) {
            let share = 100.0 * ratio(n as f64, all);
            write!(
                out,
                "<i style=\"width:{share:.3}%;background:{}\" title=\"{} {} ({share:.1} %)\"></i>",
                colour(class),
                Safe(class),
                count(n as f64)
            )?;
        }
        out.push_str("</span>\n<div class=\"legend\">");
        for (class, n) in by_count(&self.work.classes) {
            let share = 100.0 * ratio(n as f64, all);
            write!(out, "<span><i style=\"background:{}\"></i>{} {share:.1} %</span>", colour(class), Safe(class))?;
        }
        out.push_str("</div>\n<details><summary>by spelling</summary>\n<table>\n");
        for (name, n) in by_count(&self.work.opcodes) {
            writeln!(out, "<tr><td class=\"mono\">{}</td><td class=\"n\">{n}</td></tr>", Safe(name))?;
        }
        out.push_str("</table>\n</details>\n</div>\n");
        Ok(())
    }

    fn write_facts(&self, out: &mut String, warps_per_sm: u32) -> std::fmt::Result {
        let (w, o) = (&self.work, &self.occupancy);
        let source = match self.registers.source {
            RegisterSource::Ptxas => "as ptxas reports",
            RegisterSource::Estimate => "softcuda's estimate",
        };
        let bad = |part: u64, whole: u64| {
            let class = if part * 10 > whole { "bad" } else { "good" };
            format!("<span class=\"{class}\">{}</span>", percent(part, whole))
        };
        out.push_str("<div>\n<h3>Occupancy</h3>\n");
        let warps = format!("{} of {warps_per_sm} warps", o.warps_per_sm);
        out.push_str(&row("row", &warps, &track(o.fraction, "#6b5b95"), &format!("{:.0} %", 100.0 * o.fraction), ""));
        let mut facts = vec![
            ("limited by", format!("{}, {} blocks to a multiprocessor", o.limiter, o.blocks_per_sm)),
            ("registers", format!("{} a thread, {source}", self.registers.count)),
            ("active lanes", format!("{:.1} %", 100.0 * w.lane_use())),
            ("wasted sectors", bad(w.global.sectors.saturating_sub(w.global.ideal_sectors), w.global.sectors)),
            ("conflicts", bad(w.shared.wavefronts.saturating_sub(w.shared.ideal_wavefronts), w.shared.wavefronts)),
            ("L1 read hits", percent(w.traffic.l1_hits, w.traffic.l1_sectors)),
            ("L2 read hits", percent(w.traffic.l2_read_hits, w.traffic.l2_read_sectors)),
            ("async copies", bytes(w.async_bytes)),
            ("synchronise", format!("{} at barriers, {} waits", count(w.barriers as f64), count(w.waits as f64))),
        ];
        if w.working_blocks < w.blocks {
            let (working, all) = (count(w.working_blocks as f64), count(w.blocks as f64));
            facts.push(("blocks", format!("{working} of {all} work, the others leave at once")));
        }
        for (kind, ops) in &w.tensor {
            let (products, adds) = (count(ops.instructions as f64), count(ops.multiply_adds as f64));
            facts.push(("tensor", format!("{}: {products} products, {adds} multiply-adds", Safe(kind))));
        }
        if w.repeated_polls > 0 {
            facts.push(("polling", format!("{} rounds after the first are left out", count(w.repeated_polls as f64))));
        }
        if w.traffic.in_pieces {
            facts.push(("caches", "replayed in pieces: traffic may vary a little from run to run".into()));
        }
        out.push_str("<dl class=\"facts\" style=\"margin-top:.6rem\">");
        for (name, value) in facts {
            write!(out, "<dt>{name}</dt><dd>{value}</dd>")?;
        }
        out.push_str("</dl>\n</div>\n");
        Ok(())
    }

    fn write_lines(&self, out: &mut String) -> std::fmt::Result {
        let measures: [Weight; 5] = [
            LineProfile::wasted_sectors,
            LineProfile::conflict_wavefronts,
            |line| line.global.sectors,
            |line| line.shared.wavefronts,
            |line| line.warp_instructions,
        ];
        let mut hot: Vec<&LineProfile> = measures.iter().flat_map(|m| self.hottest(HOT, m)).collect();
        hot.sort_by_key(|line| line.line);
        hot.dedup_by_key(|line| line.line);
        out.push_str("<h3 style=\"margin-top:1.3rem\">Hot lines of the PTX</h3>\n");
        self.write_table(out, &hot)?;
        let all: Vec<&LineProfile> = self.lines.iter().collect();
        writeln!(out, "<details><summary>all {} lines that were executed</summary>", all.len())?;
        self.write_table(out, &all)?;
        out.push_str("</details>\n");
        Ok(())
    }

    fn write_table(&self, out: &mut String, lines: &[&LineProfile]) -> std::fmt::Result {
        let most = |weight: Weight| self.lines.iter().map(weight).max().unwrap_or(0) as f64;
        let columns: [(Weight, &str); 3] = [
            (|line| line.warp_instructions, "cool"),
            (LineProfile::wasted_sectors, "heat"),
            (LineProfile::conflict_wavefronts, "heat"),
        ];
        writeln!(
            out,
            "<div class=\"scroll\"><table>\n<tr><th class=\"n\">line</th><th class=\"n\">warp<br>instructions</th>\
             <th class=\"n\">sectors<br>/ ideal</th><th class=\"n\">wasted<br>sectors</th><th class=\"n\">wavefronts<br>\
             / ideal</th><th class=\"n\">conflict<br>wavefronts</th><th>PTX</th></tr>"
        )?;
        for line in lines {
            let cell = |(weight, class): (Weight, &str)| {
                let value = weight(line);
                if value == 0 {
                    return "<td class=\"n soft\">·</td>".to_owned();
                }
                let share = 100.0 * ratio(value as f64, most(weight));
                format!("<td class=\"n {class}\" style=\"--h:{share:.1}%\">{}</td>", count(value as f64))
            };
            let of = |found: u64, ideal: u64| match ideal {
                0 => "·".to_owned(),
                _ => format!("{} / {}", count(found as f64), count(ideal as f64)),
            };
            let [instructions, wasted, conflicts] = columns.map(cell);
            writeln!(
                out,
                "<tr><td class=\"n\">{}</td>{instructions}<td class=\"n\">{}</td>{wasted}<td class=\"n\">{}</td>{conflicts}\
                 <td class=\"ptx\">{}</td></tr>",
                line.line,
                of(line.global.sectors, line.global.ideal_sectors),
                of(line.shared.wavefronts, line.shared.ideal_wavefronts),
                Safe(&line.text)
            )?;
        }
        out.push_str("</table></div>\n");
        Ok(())
    }
}
