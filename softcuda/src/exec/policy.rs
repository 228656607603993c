//! L2 cache policies: which eviction priority an access gives the lines that it touches (PTX ISA 9.7.9.2, 9.7.9.18).

/// In what order lines make room.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// `evict_first`: before all others.
    First,
    #[default]
    Normal,
    /// `evict_last`: after all others.
    Last,
    /// `evict_unchanged`: what the line had, if it is there.
    Unchanged,
}

/// A policy as `createpolicy.fractional` makes it. The number is opaque; the upper half is the one that public programs write as a
/// constant for a priority of all accesses (0x12f00000, 0x14f00000, 0x10000000). The lower half is the fraction as f32, or 0 for all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Policy(pub u64);

impl Policy {
    /// The upper half of a policy's number.
    pub fn high(primary: Priority, secondary: Priority) -> u32 {
        let number = |priority| match priority {
            Priority::Normal => 0,
            Priority::First => 2,
            Priority::Last => 4,
            Priority::Unchanged => 6,
        };
        let whole = if number(primary) == 0 { 0 } else { 0xf0_0000 };
        0x1000_0000 | number(primary) << 24 | whole | number(secondary) << 16
    }

    fn priority(self, shift: u32) -> Priority {
        match self.0 >> shift & 15 {
            2 => Priority::First,
            4 => Priority::Last,
            6 => Priority::Unchanged,
            _ => Priority::Normal,
        }
    }

    /// Of a line of this number. Which lines a fraction takes is not published; here they are spread over a page.
    pub fn of_line(self, line: u64) -> Priority {
        let fraction = f32::from_bits(self.0 as u32);
        let place = (line as u32 & 0x3fff).wrapping_mul(0x9e37_79b1) >> 8;
        if self.0 as u32 == 0 || (place as f32) < fraction * (1 << 24) as f32 {
            self.priority(56)
        } else {
            self.priority(48)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fraction_of_the_lines_has_the_first_priority() {
        let policy = |fraction: f32| {
            Policy(u64::from(Policy::high(Priority::Last, Priority::First)) << 32 | u64::from(fraction.to_bits()))
        };
        for (fraction, least, most) in [(1.0, 1000, 1000), (0.5, 480, 520), (0.125, 110, 140)] {
            let lines = (0..1000).map(|line| policy(fraction).of_line(line));
            let last = lines.inspect(|&p| assert_ne!(p, Priority::Normal)).filter(|&p| p == Priority::Last).count();
            assert!((least..=most).contains(&last), "{last} of 1000 lines at {fraction}");
        }
        assert_eq!(Policy(0x12f0_0000_0000_0000).of_line(5), Priority::First);
        assert_eq!(Policy(0x14f0_0000_0000_0000).of_line(5), Priority::Last);
        assert_eq!(Policy(0x1000_0000_0000_0000).of_line(5), Priority::Normal);
        assert_eq!(Policy::default().of_line(5), Priority::Normal);
    }
}
