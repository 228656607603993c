//! Registers as `ptxas` reports them, which say more than any estimate.

use std::collections::BTreeMap;

/// Registers by kernel in the output of `ptxas -v`, or in lines of a kernel's name and a number.
///
/// Of a kernel that occurs more than once, as it does when several architectures are compiled, the last one counts.
pub fn parse_registers(text: &str) -> BTreeMap<String, u32> {
    let mut found = BTreeMap::new();
    let mut kernel = None;
    for line in text.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            kernel = rest.split_once('\'').map(|(name, _)| name.to_owned());
        } else if let Some((_, rest)) = line.split_once("Used ") {
            let count = rest.split_once(" registers").and_then(|(count, _)| count.parse().ok());
            if let (Some(name), Some(count)) = (kernel.take(), count) {
                found.insert(name, count);
            }
        } else if let [name, count] = line.split_whitespace().collect::<Vec<_>>()[..]
            && let Ok(count) = count.parse()
        {
            found.insert(name.to_owned(), count);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ptxas_prints_and_plain_lines() {
        let text = "ptxas info    : 0 bytes gmem\n\
            ptxas info    : Compiling entry function 'gemm' for 'sm_80'\n\
            ptxas info    : Function properties for gemm\n\
            \x20   0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
            ptxas info    : Used 206 registers, used 1 barriers, 400 bytes cmem[0]\n\
            ptxas info    : Compiling entry function 'gate' for 'sm_80'\n\
            ptxas info    : Used 32 registers, 380 bytes cmem[0]\n\
            combine 40\n\
            not a line of registers\n";
        let expected = [("combine", 40), ("gate", 32), ("gemm", 206)].map(|(name, count)| (name.to_owned(), count));
        assert_eq!(parse_registers(text), expected.into());
    }
}
