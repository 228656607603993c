//! Counters as text, to cross from the loaded driver to the program that asks: their layout may differ between the two.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::exec::{Counters, LineCounters, MemoryCounters, SharedCounters};

/// Counters by kernel name.
pub(crate) type Report = BTreeMap<String, Counters>;

fn memory(c: &MemoryCounters) -> [u64; 3] {
    [c.requests, c.sectors, c.ideal_sectors]
}

fn shared(c: &SharedCounters) -> [u64; 3] {
    [c.requests, c.wavefronts, c.ideal_wavefronts]
}

/// One record a line, tab-separated: `kernel` opens a kernel, the others are of the kernel opened last.
pub(crate) fn write(report: &Report) -> String {
    let mut text = String::new();
    let mut record = |key: &str, name: Option<&str>, numbers: &[u64]| {
        text.push_str(key);
        if let Some(field) = name {
            text.push('\t');
            text.push_str(field);
        }
        for number in numbers {
            // Writing to a string does not fail.
            let _ = write!(text, "\t{number}");
        }
        text.push('\n');
    };
    for (kernel, c) in report {
        record("kernel", Some(kernel), &[]);
        record("total", None, &[c.launches, c.blocks, c.working_blocks, c.warps, c.thread_instructions]);
        record("classes", None, &c.warp_instructions);
        record("global", None, &memory(&c.global));
        record("shared", None, &shared(&c.shared));
        for (shape, count) in &c.matrix {
            record("matrix", Some(shape), &[*count]);
        }
        for (name, count) in &c.opcodes {
            record("opcode", Some(name), &[*count]);
        }
        record("async", None, &[c.async_bytes, c.async_sectors, c.repeated_polls]);
        record("lines", None, &[c.lines.len() as u64]);
        for (index, line) in c.lines.iter().enumerate().filter(|(_, line)| **line != LineCounters::default()) {
            let head = [index as u64, line.warp_instructions, line.thread_instructions];
            record("line", None, &[&head[..], &memory(&line.global), &shared(&line.shared)].concat());
        }
    }
    text
}

/// Reads what [`write`] wrote; records that it does not know are skipped.
pub(crate) fn read(text: &str) -> Report {
    let mut report = Report::new();
    let mut kernel = String::new();
    for line in text.lines() {
        let mut fields = line.split('\t');
        let key = fields.next().unwrap_or_default();
        if key == "kernel" {
            kernel = fields.next().unwrap_or_default().to_owned();
        }
        let counters = report.entry(kernel.clone()).or_default();
        let shape = if matches!(key, "matrix" | "opcode") { fields.next().unwrap_or_default() } else { "" };
        let mut numbers = fields.map(|field| field.parse::<u64>().unwrap_or(0));
        let mut next = || numbers.next().unwrap_or(0);
        match key {
            "total" => {
                counters.launches = next();
                counters.blocks = next();
                counters.working_blocks = next();
                counters.warps = next();
                counters.thread_instructions = next();
            }
            "classes" => counters.warp_instructions.iter_mut().for_each(|count| *count = next()),
            "global" => counters.global = read_memory(&mut next),
            "shared" => counters.shared = read_shared(&mut next),
            "matrix" => {
                counters.matrix.insert(shape.to_owned(), next());
            }
            "opcode" => {
                counters.opcodes.insert(shape.to_owned(), next());
            }
            "async" => {
                counters.async_bytes = next();
                counters.async_sectors = next();
                counters.repeated_polls = next();
            }
            "lines" => counters.lines = vec![LineCounters::default(); next() as usize],
            "line" => {
                if let Some(line) = counters.lines.get_mut(next() as usize) {
                    line.warp_instructions = next();
                    line.thread_instructions = next();
                    line.global = read_memory(&mut next);
                    line.shared = read_shared(&mut next);
                }
            }
            _ => {}
        }
    }
    report
}

fn read_memory(next: &mut impl FnMut() -> u64) -> MemoryCounters {
    MemoryCounters { requests: next(), sectors: next(), ideal_sectors: next() }
}

fn read_shared(next: &mut impl FnMut() -> u64) -> SharedCounters {
    SharedCounters { requests: next(), wavefronts: next(), ideal_wavefronts: next() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_survive_the_crossing() {
        let mut counters = Counters { launches: 2, blocks: 3, warps: 4, thread_instructions: 5, ..Counters::default() };
        counters.warp_instructions.iter_mut().zip(10..).for_each(|(count, n)| *count = n);
        counters.global = MemoryCounters { requests: 1, sectors: 2, ideal_sectors: 3 };
        counters.shared = SharedCounters { requests: 4, wavefronts: 5, ideal_wavefronts: 6 };
        counters.matrix.insert("m16n8k16.f32.bf16.bf16.f32".into(), 77);
        counters.opcodes.insert("fma.rn.f32".into(), 78);
        counters.async_bytes = 79;
        counters.async_sectors = 81;
        counters.working_blocks = 82;
        counters.repeated_polls = 80;
        counters.lines = vec![LineCounters::default(); 4];
        counters.lines[2].shared.wavefronts = 9;
        counters.lines[2].warp_instructions = 8;
        let report: Report = [("a".into(), counters), ("b".into(), Counters::default())].into();
        assert_eq!(read(&write(&report)), report);
    }
}
