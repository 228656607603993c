//! A profile as one HTML page that needs nothing else: no scripts, no fonts, no network.

mod kernel;
mod parts;

use std::fmt::Write;

use self::parts::{Safe, card, colour, ratio, track};
use super::bounds::count;
use super::limits::{LEFT_OUT, short_launches};
use super::record::{Device, LaunchProfile, Profile};
use super::text::{bytes, time};

const STYLE: &str = include_str!("page.css");

/// Launches in the table; all that are listed are in the plot.
const TABLE: usize = 200;

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
        self.write_left_out(out)?;
        let caches: Vec<String> = self.caches.iter().map(|c| format!("{}: {}", c.name(), c.words())).collect();
        writeln!(
            out,
            "<footer>\n<p>Every time on this page is modelled: the greatest of what each unit needs for the work that was \
             counted, at its rate. Counts of instructions, sectors and wavefronts are those of the PTX that ran, without repeated \
             rounds of loops that only wait for others. L2 and DRAM traffic come from a model of the caches, least recently used \
             lines replaced ({}).</p>\n\
             <p>softcuda {}, device description <code>{}</code>.</p>\n</footer>\n</main>\n</body>\n</html>",
            Safe(caches.join("; ")),
            Safe(&self.softcuda),
            Safe(&model)
        )
    }

    fn write_left_out(&self, out: &mut String) -> std::fmt::Result {
        out.push_str("<h2>Not in the modelled times</h2>\n<div class=\"panel\">\n<dl class=\"facts\">");
        for (name, what) in LEFT_OUT {
            write!(out, "<dt>{}</dt><dd>{}</dd>", Safe(name), Safe(what))?;
        }
        writeln!(out, "</dl>\n<p class=\"soft\">{}</p>\n</div>", Safe(short_launches(self)))
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
