//! A peer's grid as points: what runs, and what is not asked of this library and why.

/// One combination of parameters.
pub struct Point {
    /// Its parameters, as failures name them.
    pub name: String,
    /// Panics where the result is not what the peer documents.
    pub run: Box<dyn Fn() + Send + Sync>,
}

/// Points that one test of the peer's suite has.
pub struct Section {
    /// What the test is about.
    pub name: &'static str,
    /// What runs.
    pub points: Vec<Point>,
    /// How many points do not run, and why.
    pub refused: Vec<(usize, &'static str)>,
}

impl Section {
    pub fn new(name: &'static str) -> Section {
        Section { name, points: vec![], refused: vec![] }
    }

    /// A point that runs.
    pub fn point(&mut self, name: impl Into<String>, run: impl Fn() + Send + Sync + 'static) {
        self.points.push(Point { name: name.into(), run: Box::new(run) });
    }

    /// So many points of the peer's that do not run here.
    pub fn refuse(&mut self, count: usize, reason: &'static str) {
        if count > 0 {
            self.refused.push((count, reason));
        }
    }
}

/// A peer's test suite.
pub struct Peer {
    pub name: &'static str,
    /// Which of its test files the sections follow.
    pub suite: &'static str,
    pub sections: Vec<Section>,
}

impl Peer {
    pub fn points(&self) -> usize {
        self.sections.iter().map(|section| section.points.len()).sum()
    }

    /// Counts by reason, in the order in which reasons are first named.
    pub fn refused(&self) -> Vec<(usize, &'static str)> {
        let mut all: Vec<(usize, &'static str)> = vec![];
        for &(count, reason) in self.sections.iter().flat_map(|section| &section.refused) {
            match all.iter_mut().find(|(_, known)| *known == reason) {
                Some((sum, _)) => *sum += count,
                None => all.push((count, reason)),
            }
        }
        all
    }

    /// The peer's row of the table in `README.md`.
    pub fn row(&self) -> String {
        let refused: Vec<_> = self.refused().iter().map(|(count, reason)| format!("{count}: {reason}")).collect();
        let refused = if refused.is_empty() { "none".into() } else { refused.join("; ") };
        format!("| {} | {} | {} | {} |", self.name, self.suite, self.points(), refused)
    }
}

/// A size that only costs time where it is large: `most`, a multiple of 8, and what the size leaves when divided by 8. Smaller ones as they are.
pub fn scaled(size: usize, most: usize) -> usize {
    if size <= most { size } else { most + size % 8 }
}

/// Every pair, and by nesting every tuple.
pub fn product<A: Copy, B: Copy>(a: &[A], b: &[B]) -> Vec<(A, B)> {
    a.iter().flat_map(|&a| b.iter().map(move |&b| (a, b))).collect()
}
