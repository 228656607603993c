//! Which tensors of the files a loaded buffer is made of: the way back from a gradient, which lies as its weight does, to the tensors' own names.

use std::collections::BTreeMap;

use super::error::CheckpointError;
use super::store::Store;
use super::tensors::FileTensor;
use crate::Dtype;

/// A run of values that a buffer and a tensor have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Run {
    tensor: String,
    /// Extents of the whole tensor.
    shape: Vec<usize>,
    /// First element in the tensor.
    from: usize,
    /// First element in the buffer.
    at: usize,
    elements: usize,
    /// The buffer has the tensor's rows as columns.
    turned: bool,
}

/// Where a buffer's values are from, as a loaded block has buffers ([`super::Block::places`]).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Places {
    length: usize,
    runs: Vec<Run>,
}

/// A tensor and its extents.
#[derive(Clone, Debug, PartialEq)]
pub struct Values<V> {
    /// Its extents.
    pub shape: Vec<usize>,
    /// Its elements.
    pub values: Vec<V>,
}

/// Tensors by the names that they have in a checkpoint.
pub type ByName<V> = BTreeMap<String, Values<V>>;

impl Places {
    /// Elements of the buffer.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Names of the tensors that it is made of.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.runs.iter().map(|run| run.tensor.as_str())
    }

    /// Puts the values of a buffer that lies as this one does into the tensors that they belong to. A tensor of which several buffers have parts has
    /// zeros where none has been put.
    pub fn put_back<V: Copy + Default>(&self, buffer: &[V], tensors: &mut ByName<V>) {
        for run in &self.runs {
            let tensor = tensors.entry(run.tensor.clone()).or_insert_with(|| Values {
                shape: run.shape.clone(),
                values: vec![V::default(); run.shape.iter().product()],
            });
            let values = &buffer[run.at..run.at + run.elements];
            match (run.turned, run.shape.as_slice()) {
                (true, &[rows, columns]) => {
                    for (i, value) in tensor.values.iter_mut().enumerate() {
                        *value = values[i % columns * rows + i / columns];
                    }
                }
                _ => tensor.values[run.from..run.from + run.elements].copy_from_slice(values),
            }
        }
    }
}

/// Writes nothing and notes what would have been written where.
pub(super) struct ToPlaces;

impl ToPlaces {
    fn add(buffer: &mut Places, at: usize, values: &FileTensor<'_>, turned: bool) {
        let ((shape, from), elements) = (values.whole(), values.elements());
        let (tensor, shape) = (values.name().to_owned(), shape.to_vec());
        buffer.runs.push(Run { tensor, shape, from, at, elements, turned });
    }
}

impl Store for ToPlaces {
    type Buffer = Places;

    fn buffer(&mut self, _: Dtype, length: usize) -> Result<Places, CheckpointError> {
        Ok(Places { length, runs: Vec::new() })
    }

    fn put(&mut self, buffer: &mut Places, at: usize, values: &FileTensor<'_>) -> Result<(), CheckpointError> {
        ToPlaces::add(buffer, at, values, false);
        Ok(())
    }

    fn integers(&mut self, values: &FileTensor<'_>) -> Result<Places, CheckpointError> {
        let mut buffer = Places { length: values.elements(), runs: Vec::new() };
        ToPlaces::add(&mut buffer, 0, values, false);
        Ok(buffer)
    }

    fn turned(&mut self, _: Dtype, values: &FileTensor<'_>, _: &[f32]) -> Result<Places, CheckpointError> {
        let mut buffer = Places { length: values.elements(), runs: Vec::new() };
        ToPlaces::add(&mut buffer, 0, values, true);
        Ok(buffer)
    }

    fn numbers(&mut self, values: &[i32]) -> Result<Places, CheckpointError> {
        Ok(Places { length: values.len(), runs: Vec::new() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_and_turned_matrices() {
        let run = |tensor: &str, shape: &[usize], from, at, elements, turned| Run {
            tensor: tensor.to_owned(),
            shape: shape.to_vec(),
            from,
            at,
            elements,
            turned,
        };
        let places = Places {
            length: 10,
            runs: vec![
                run("a", &[2, 2], 2, 0, 2, false),
                run("b", &[2], 0, 2, 2, false),
                run("turned", &[2, 3], 0, 4, 6, true),
            ],
        };
        let mut tensors = ByName::new();
        places.put_back(&[1, 2, 3, 4, 10, 20, 11, 21, 12, 22], &mut tensors);
        assert_eq!(tensors["a"].values, [0, 0, 1, 2]);
        assert_eq!(tensors["b"], Values { shape: vec![2], values: vec![3, 4] });
        assert_eq!(tensors["turned"].values, [10, 11, 12, 20, 21, 22]);
    }
}
