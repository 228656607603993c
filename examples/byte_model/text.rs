//! What is learned: a text, of which the last tenth is held out.

use std::fs;
use std::path::Path;

use super::Outcome;

/// William Shakespeare, *Coriolanus* (1623), the speeches: in the public domain.
const CORIOLANUS: &[u8] = include_bytes!("coriolanus.txt");

/// A text's bytes.
pub struct Text {
    bytes: Vec<u8>,
    /// Bytes of the part that is trained on.
    trained: usize,
    /// Bytes of a sequence.
    context: usize,
}

/// Sequences, one after the other, and the bytes that follow each of theirs.
pub struct Batch {
    pub bytes: Vec<u8>,
    pub next: Vec<u8>,
}

impl Text {
    /// The file's, or [`CORIOLANUS`], in sequences of `context` bytes.
    pub fn open(path: Option<&Path>, context: usize) -> Outcome<Text> {
        let named =
            |error: &dyn std::fmt::Display| format!("{}: {error}", path.unwrap_or(Path::new("the text")).display());
        let bytes = match path {
            Some(path) => fs::read(path).map_err(|error| named(&error))?,
            None => CORIOLANUS.to_vec(),
        };
        let trained = bytes.len() - bytes.len() / 10;
        if bytes.len() / 10 <= context {
            let least = 10 * (context + 1);
            return Err(named(&format_args!("expected at least {least} bytes, found {}", bytes.len())).into());
        }
        Ok(Text { bytes, trained, context })
    }

    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// `sequences` sequences from anywhere in the part that is trained on.
    pub fn batch(&self, sequences: usize, rng: &mut fastrand::Rng) -> Batch {
        let starts: Vec<usize> = (0..sequences).map(|_| rng.usize(..self.trained - self.context)).collect();
        self.sequences(&starts)
    }

    /// The held-out part in batches of at most `sequences` sequences, so many batches at most.
    pub fn held_out(&self, sequences: usize, batches: usize) -> impl Iterator<Item = Batch> {
        let starts: Vec<usize> = (self.trained..self.bytes.len() - self.context).step_by(self.context).collect();
        let batches: Vec<Batch> = starts.chunks(sequences).take(batches).map(|starts| self.sequences(starts)).collect();
        batches.into_iter()
    }

    fn sequences(&self, starts: &[usize]) -> Batch {
        let from = |shift: usize| starts.iter().flat_map(move |start| &self.bytes[start + shift..][..self.context]);
        Batch { bytes: from(0).copied().collect(), next: from(1).copied().collect() }
    }

    /// Entropy of the text's bytes by how often each occurs, in nats: the least loss of a model that does not look at what came before.
    pub fn unigram_entropy(&self) -> f64 {
        let mut counts = [0usize; 256];
        self.bytes.iter().for_each(|&byte| counts[usize::from(byte)] += 1);
        let shares = counts.into_iter().filter(|&count| count > 0).map(|count| count as f64 / self.bytes.len() as f64);
        -shares.map(|share| share * share.ln()).sum::<f64>()
    }
}
