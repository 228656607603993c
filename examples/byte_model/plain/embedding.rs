//! What a byte and its place in the sequence begin as.

use super::Real;
use super::parameter::Parameter;

/// Values of a byte.
pub const BYTES: usize = 256;

/// `x[t] = table[byte[t]] + position[t % context]`.
pub struct Embedding {
    /// `[256, H]`.
    pub table: Parameter,
    /// `[context, H]`.
    pub position: Parameter,
    /// Of the last forward pass, and how many make a sequence.
    bytes: Vec<u8>,
    length: usize,
}

impl Embedding {
    pub fn new([context, hidden]: [usize; 2], rng: &mut fastrand::Rng) -> Embedding {
        let mut normal = |name, rows| Parameter::normal(name, &[rows, hidden], 0.5, rng);
        Embedding {
            table: normal("embedding", BYTES),
            position: normal("position", context),
            bytes: Vec::new(),
            length: 1,
        }
    }

    /// `[T, H]` of sequences of `length` bytes each, at most the context.
    pub fn forward(&mut self, bytes: &[u8], length: usize) -> Vec<Real> {
        let hidden = self.table.shape[1];
        (self.bytes, self.length) = (bytes.to_vec(), length);
        let row = |of: &'_ Parameter, index: usize| of.value[index * hidden..][..hidden].to_vec();
        let sum = |(at, &byte): (usize, &u8)| {
            let place = row(&self.position, at % length);
            row(&self.table, byte.into()).into_iter().zip(place).map(|(byte, place)| byte + place).collect::<Vec<_>>()
        };
        bytes.iter().enumerate().flat_map(sum).collect()
    }

    /// A row's gradient goes to the byte's row and to the place's.
    pub fn backward(&mut self, dx: &[Real]) {
        let hidden = self.table.shape[1];
        for (at, (&byte, dx)) in self.bytes.iter().zip(dx.chunks_exact(hidden)).enumerate() {
            for (of, row) in [(&mut self.table, usize::from(byte)), (&mut self.position, at % self.length)] {
                of.gradient[row * hidden..][..hidden].iter_mut().zip(dx).for_each(|(sum, value)| *sum += value);
            }
        }
    }
}
