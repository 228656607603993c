//! A profile as one HTML page that needs nothing else: no scripts, no fonts, no network.

use std::fmt::{Display, Write};

use super::bounds::{Bound, count};
use super::record::{Device, KernelProfile, LaunchProfile, LineProfile, Profile, RegisterSource};
use super::text::{Weight, by_count, bytes, percent, time};
use crate::device::SECTOR_BYTES;

const STYLE: &str = include_str!("page.css");

/// Kernels with a section that is open at first.
const OPEN: usize = 4;
/// Launches in the table; all that are listed are in the plot.
const TABLE: usize = 200;
/// Lines in the table of hot ones, by each of its measures.
const HOT: usize = 6;

/// Text for HTML, also inside attributes.
struct Safe<T>(T);

impl<T: Display> Display for Safe<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for c in self.0.to_string().chars() {
            match c {
                '&' => f.write_str("&amp;")?,
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '"' => f.write_str("&quot;")?,
                '\'' => f.write_str("&#39;")?,
                c => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

/// The colour of a unit or an instruction class, the same everywhere.
fn colour(name: &str) -> &'static str {
    match name {
        "tensor" | "matrix" => "#d1495b",
        "DRAM" => "#2a7f9e",
        "L2" => "#58b0a8",
        "shared and L1" | "shared load" => "#f2a541",
        "shared store" => "#f6c177",
        "load/store" | "matrix move" => "#c98b2b",
        "async copy" => "#8f6a1f",
        "issue" | "control" => "#8a92a6",
        "f32" => "#4c78a8",
        "f16" => "#7ba3cf",
        "f64" => "#2f4f7f",
        "integer" => "#5a9e5a",
        "special" => "#a56eb5",
        "convert" => "#c9a2d4",
        "exchange" => "#9d755d",
        "global load" => "#2a7f9e",
        "global store" => "#79b8cf",
        "atomic" => "#0f5c73",
        "synchronise" => "#6b5b95",
        "move" => "#b8bec9",
        _ => "#a0a0a0",
    }
}

/// A bar that is `fraction` full.
fn track(fraction: f64, colour: &str) -> String {
    // What is not nothing shows.
    let width = if fraction > 0.0 { (100.0 * fraction).clamp(0.4, 100.0) } else { 0.0 };
    format!("<span class=\"track\"><i style=\"width:{width:.2}%;background:{colour}\"></i></span>")
}

/// A bar with a name before and a value after it; `title` shows on pointing.
fn row(class: &str, name: &str, bar: &str, value: &str, title: &str) -> String {
    format!(
        "<div class=\"{class}\" title=\"{}\"><span>{}</span>{bar}<span>{}</span></div>\n",
        Safe(title),
        Safe(name),
        Safe(value)
    )
}

fn card(value: impl Display, name: &str) -> String {
    format!("<div class=\"card\"><b>{}</b><span>{}</span></div>\n", Safe(value), Safe(name))
}

fn ratio(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}

impl Profile {
    /// As a self-contained page.
    pub fn to_html(&self) -> String {
        let mut out = String::new();
        // Writing to a string does not fail.
        let _ = self.write_html(&mut out);
        out
    }

    fn write_html(&self, out: &mut String) -> std::fmt::Result {
        let model = self.models();
        writeln!(
            out,
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <title>Profile on the model of {0} – softcuda</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n\
             <h1>Profile on the model of <code>{0}</code></h1>\n<p class=\"soft\">softcuda {1}, device description \
             <code>{0}</code></p>\n<p class=\"notice\"><b>Model.</b> {2}</p>",
            Safe(&model),
            Safe(&self.softcuda),
            Safe(&self.notice)
        )?;
        let total = self.modelled_seconds();
        out.push_str("<div class=\"cards\">\n");
        out.push_str(&card(self.launch_count, "launches"));
        out.push_str(&card(self.kernels.len(), "kernels"));
        out.push_str(&card(time(total), "modelled, one after another"));
        let dram: u64 = self.kernels.iter().map(|k| k.work.traffic.dram_bytes()).sum();
        out.push_str(&card(bytes(dram), "to and from device memory"));
        let instructions: u64 = self.kernels.iter().map(|k| k.work.warp_instructions).sum();
        out.push_str(&card(count(instructions as f64), "warp instructions"));
        out.push_str("</div>\n");
        self.write_kernels(out, total)?;
        self.write_timeline(out)?;
        for (index, kernel) in self.kernels.iter().enumerate() {
            kernel.write_html(out, index, self.warps_per_sm(&kernel.device))?;
        }
        self.write_launches(out)?;
        self.write_devices(out)?;
        writeln!(
            out,
            "<footer>\n<p>Every time on this page is modelled: the greatest of what each unit needs for the work that was \
             counted, at its published rate. Latencies, launch overhead, dependences between units and the instructions that \
             <code>ptxas</code> would make are not modelled; a GPU takes longer. Counts of instructions, sectors and \
             wavefronts are those of the PTX that ran, without repeated rounds of loops that only wait for others. L2 and DRAM traffic come from a model of the caches: cold at the \
             start of each launch, least recently used lines replaced, dirty data written back at the end.</p>\n\
             <p>softcuda {}, device description <code>{}</code>.</p>\n</footer>\n</main>\n</body>\n</html>",
            Safe(&self.softcuda),
            Safe(&model)
        )
    }

    fn write_kernels(&self, out: &mut String, total: f64) -> std::fmt::Result {
        out.push_str("<h2>Modelled time by kernel</h2>\n<div class=\"panel\">\n");
        let most = self.kernels.first().map_or(0.0, |k| k.modelled_seconds);
        for (index, k) in self.kernels.iter().enumerate() {
            let share = 100.0 * ratio(k.modelled_seconds, total);
            writeln!(
                out,
                "<div class=\"row wide\" title=\"{}\"><a class=\"mono\" href=\"#k{index}\">{}</a>{}<span>{}</span></div>",
                Safe(format!("{}: {} launches, {share:.1} %, limited by {}", k.name, k.launches, k.limited_by)),
                Safe(&k.name),
                track(ratio(k.modelled_seconds, most), colour(&k.limited_by)),
                Safe(time(k.modelled_seconds))
            )?;
        }
        self.write_legend(out)?;
        out.push_str("</div>\n");
        Ok(())
    }

    /// The units that limit any kernel or launch.
    fn write_legend(&self, out: &mut String) -> std::fmt::Result {
        let mut units: Vec<&str> = self.kernels.iter().map(|k| k.limited_by.as_str()).collect();
        units.extend(self.launches.iter().map(|l| l.limited_by.as_str()));
        units.sort_unstable();
        units.dedup();
        out.push_str("<div class=\"legend\"><span>limited by</span>");
        for unit in units {
            write!(out, "<span><i style=\"background:{}\"></i>{}</span>", colour(unit), Safe(unit))?;
        }
        out.push_str("</div>\n");
        Ok(())
    }

    /// Launches in order, each as wide as its modelled time.
    fn write_timeline(&self, out: &mut String) -> std::fmt::Result {
        let total: f64 = self.launches.iter().map(|l| l.modelled_seconds).sum();
        if total <= 0.0 {
            return Ok(());
        }
        writeln!(
            out,
            "<h2>Launches in order</h2>\n<div class=\"panel\">\n\
             <svg class=\"timeline\" viewBox=\"0 0 1000 40\" preserveAspectRatio=\"none\" role=\"img\" \
             aria-label=\"Launches in order, each as wide as its modelled time\">"
        )?;
        let (mut x, mut drawn) = (0.0, 0.0);
        for l in &self.launches {
            let width = 1000.0 * l.modelled_seconds / total;
            x += width;
            // What is narrower than a pixel is left to its neighbour.
            if x - drawn < 0.4 {
                continue;
            }
            let gap = if x - drawn > 3.0 { 0.8 } else { 0.0 };
            writeln!(
                out,
                "<rect x=\"{drawn:.2}\" y=\"0\" width=\"{:.2}\" height=\"40\" fill=\"{}\"><title>{}</title></rect>",
                x - drawn - gap,
                colour(&l.limited_by),
                Safe(format!("{}: {}, {}, limited by {}", l.index, l.kernel, time(l.modelled_seconds), l.limited_by))
            )?;
            drawn = x;
        }
        let left = self.launch_count - self.launches.len() as u64;
        let more = if left > 0 { format!("; {left} more are only in the sums by kernel") } else { String::new() };
        writeln!(
            out,
            "</svg>\n<p class=\"soft\">Width is modelled time, colour the unit that limits{more}.</p>\n</div>"
        )
    }

    fn write_launches(&self, out: &mut String) -> std::fmt::Result {
        writeln!(
            out,
            "<h2>Launches</h2>\n<div class=\"panel scroll\">\n<table>\n<tr><th class=\"n\">#</th><th>kernel</th>\
             <th>device</th><th>grid</th><th>block</th><th class=\"n\">shared</th><th class=\"n\">occupancy</th><th class=\"n\">L2</th>\
             <th class=\"n\">DRAM</th><th class=\"n\">modelled</th><th>limited by</th></tr>"
        )?;
        self.launches.iter().take(TABLE).try_for_each(|l| l.write_row(out))?;
        out.push_str("</table>\n");
        if self.launch_count as usize > TABLE {
            writeln!(out, "<p class=\"soft\">The first {TABLE} of {} launches.</p>", self.launch_count)?;
        }
        out.push_str("</div>\n");
        Ok(())
    }

    fn write_devices(&self, out: &mut String) -> std::fmt::Result {
        self.devices.iter().try_for_each(|device| device.write_html(out))
    }
}

impl Device {
    fn write_html(&self, out: &mut String) -> std::fmt::Result {
        writeln!(
            out,
            "<details>\n<summary>Device description <code>{}</code>: every number with its source</summary>\n\
             <div class=\"panel scroll\">\n<table>\n<tr><th>figure</th><th>value</th><th>source</th></tr>",
            Safe(&self.model)
        )?;
        for f in &self.figures {
            writeln!(
                out,
                "<tr><td class=\"mono\">{}</td><td>{}</td><td>{} <span class=\"soft\">– {}</span></td></tr>",
                Safe(&f.name),
                Safe(&f.value),
                Safe(&f.document),
                Safe(&f.place)
            )?;
        }
        out.push_str("</table>\n</div>\n</details>\n");
        Ok(())
    }
}

impl LaunchProfile {
    fn write_row(&self, out: &mut String) -> std::fmt::Result {
        let extents = |e: [u32; 3]| match e {
            [x, 1, 1] => x.to_string(),
            [x, y, 1] => format!("{x} × {y}"),
            [x, y, z] => format!("{x} × {y} × {z}"),
        };
        let shared = u64::from(self.static_shared_bytes) + u64::from(self.dynamic_shared_bytes);
        writeln!(
            out,
            "<tr><td class=\"n\">{}</td><td class=\"mono\">{}</td><td>{}</td><td>{}</td><td>{}</td>\
             <td class=\"n\">{}</td><td class=\"n\">{:.0} %</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td>{}</td></tr>",
            self.index,
            Safe(&self.kernel),
            Safe(&self.device),
            extents(self.grid),
            extents(self.block),
            bytes(shared),
            100.0 * self.occupancy.fraction,
            bytes(self.work.traffic.l2_bytes()),
            bytes(self.work.traffic.dram_bytes()),
            time(self.modelled_seconds),
            Safe(&self.limited_by)
        )
    }
}

impl KernelProfile {
    fn write_html(&self, out: &mut String, index: usize, warps_per_sm: u32) -> std::fmt::Result {
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
            ("DRAM write", t.dram_write_bytes, "#2a7f9e", "dirty sectors, those left at the end included"),
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
