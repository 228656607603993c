//! A recorded checkpoint: what it holds, and what its block computes.

use moe_kernels::Element;
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;

use crate::data;
use crate::support::compare::Storage;

/// `tests/data/families/<family>`.
pub struct Folder {
    model: Vec<u8>,
    golden: Vec<u8>,
    /// Names in the checkpoint begin with this.
    prefix: &'static str,
}

impl Folder {
    pub fn open(family: &str, prefix: &'static str) -> Folder {
        let folder = data::path("families").join(family);
        let read = |name: &str| std::fs::read(folder.join(name)).unwrap_or_else(|e| panic!("{family}/{name}: {e}"));
        Folder { model: read("model.safetensors"), golden: read("golden.safetensors"), prefix }
    }

    /// A parameter of the block.
    pub fn weight(&self, name: &str) -> Vec<f32> {
        floats(&self.model, &format!("{}{name}", self.prefix))
    }

    /// A parameter of each of `experts` experts, one after the other: `name` with `{}` for the number.
    pub fn stacked(&self, name: &str, experts: std::ops::Range<usize>) -> Vec<f32> {
        experts.flat_map(|expert| self.weight(&name.replace("{}", &expert.to_string()))).collect()
    }

    /// What was recorded.
    pub fn golden(&self, name: &str) -> Vec<f32> {
        floats(&self.golden, name)
    }

    /// The same, of integers.
    pub fn golden_ints(&self, name: &str) -> Vec<i32> {
        let file = SafeTensors::deserialize(&self.golden).unwrap();
        let tensor = file.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(tensor.dtype(), Dtype::I32, "{name}");
        tensor.data().chunks(4).map(|bytes| i32::from_le_bytes(bytes.try_into().unwrap())).collect()
    }
}

fn floats(file: &[u8], name: &str) -> Vec<f32> {
    let file = SafeTensors::deserialize(file).unwrap();
    let tensor = file.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
    let data = tensor.data();
    match tensor.dtype() {
        Dtype::F32 => data.chunks(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect(),
        Dtype::BF16 => {
            let value = |bytes: &[u8]| half::bf16::from_le_bytes(bytes.try_into().unwrap()).to_f32();
            data.chunks(2).map(value).collect()
        }
        other => panic!("{name}: {other:?}"),
    }
}

/// Rows of `gate` and of `up`, expert by expert: `[E, 2I, H]`.
pub fn gate_up(gate: &[f32], up: &[f32], experts: usize) -> Vec<f32> {
    let size = gate.len() / experts;
    gate.chunks(size).zip(up.chunks(size)).flat_map(|(gate, up)| gate.iter().chain(up).copied()).collect()
}

/// In another type.
pub fn stored<T: Storage>(values: &[f32]) -> Vec<T> {
    values.iter().map(|&value| <T as Element>::from_f32(value)).collect()
}
