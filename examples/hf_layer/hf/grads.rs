//! Recorded gradients, and a checkpoint's tensors in the form of the model's own modules.
//!
//! Autograd's names are those of the modules in memory. Most checkpoints hold other tensors: one for each expert where the module has one for
//! all, gate and up together or apart, in other orders.

use std::path::Path;

use moe_kernels::checkpoint::{ByName, CheckpointError, TensorFile, Values};

use super::error::HfError;

/// `golden_grads.safetensors` of a checkpoint folder.
pub struct GoldenGradients {
    file: TensorFile,
}

/// A recorded gradient.
pub struct Recorded {
    /// As the file has it: `dx`, `d.` before a parameter's name, or `d_in.` before an input's.
    pub name: String,
    /// Its extents.
    pub shape: Vec<usize>,
    /// Its elements.
    pub values: Vec<f64>,
}

impl GoldenGradients {
    pub const NAME: &str = "golden_grads.safetensors";

    pub fn open(folder: &Path) -> Result<GoldenGradients, HfError> {
        Ok(GoldenGradients { file: TensorFile::open(&folder.join(Self::NAME))? })
    }

    /// `dy [T,H]`, for the rows of `golden.safetensors`.
    pub fn dy(&self, tokens: usize, hidden: usize) -> Result<Vec<f32>, HfError> {
        Ok(self.file.read_shaped("dy", &[tokens, hidden])?.values()?.into_owned())
    }

    /// All others, by name.
    pub fn recorded(&self) -> Result<Vec<Recorded>, HfError> {
        let read = |name: &String| {
            let tensor = self.file.read(name)?;
            let values = tensor.values::<f32>()?.iter().map(|&value| value.into()).collect();
            Ok::<_, CheckpointError>(Recorded { name: name.to_owned(), shape: tensor.shape().to_vec(), values })
        };
        let names = self.file.names();
        let mut all = names.iter().filter(|name| *name != "dy").map(read).collect::<Result<Vec<_>, _>>()?;
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }
}

/// How a module's tensor is made of a checkpoint's. Names are below the block's own, `^` stands for what the block is in.
enum Form {
    /// The tensor itself, by another name.
    Whole(&'static str),
    /// Rows and columns change places.
    Turned(&'static str),
    /// For each expert `#`, or once, these one below the other; experts' numbers begin with this many times those of the module's tensor.
    Each(&'static [&'static str], usize),
    /// Of tensors for all experts, each expert's one below the other.
    Beside(&'static [&'static str]),
    /// Rows that alternate, the first halves' first.
    Sorted(&'static str),
    /// Every other row, from this one on.
    Every(&'static str, usize),
}

use Form::{Beside, Each, Every, Sorted, Turned, Whole};

/// A module's tensors, and the forms in which checkpoints may have them.
const FORMS: &[(&str, &[Form])] = &[
    (
        "experts.gate_up_proj",
        &[
            Each(&["experts.#.gate_proj.weight", "experts.#.up_proj.weight"], 0),
            Each(&["experts.#.w1.weight", "experts.#.w3.weight"], 0),
            Whole("input_linear.weight"),
            Whole("experts.fc1.weight"),
            Sorted("experts.w13_weight"),
            Beside(&["gate_proj.weight", "up_proj.weight"]),
        ],
    ),
    (
        "experts.down_proj",
        &[
            Each(&["experts.#.down_proj.weight"], 0),
            Each(&["experts.#.w2.weight"], 0),
            Whole("output_linear.weight"),
            Whole("experts.fc2.weight"),
            Whole("experts.w2_weight"),
            Whole("down_proj.weight"),
        ],
    ),
    ("experts.up_proj", &[Each(&["experts.#.up_proj.weight"], 0)]),
    ("router.weight", &[Whole("gate.weight"), Whole("router.layer.weight")]),
    (
        "shared_experts.gate_proj.weight",
        &[
            Whole("shared_experts.w1.weight"),
            Whole("shared_experts.linear_gate.weight"),
            Whole("^share_expert.gate_proj.weight"),
            Whole("shared_expert.gate_proj.weight"),
        ],
    ),
    (
        "shared_experts.up_proj.weight",
        &[
            Whole("shared_experts.w3.weight"),
            Whole("^share_expert.up_proj.weight"),
            Whole("shared_expert.up_proj.weight"),
        ],
    ),
    (
        "shared_experts.down_proj.weight",
        &[
            Whole("shared_experts.w2.weight"),
            Whole("^share_expert.down_proj.weight"),
            Whole("shared_expert.down_proj.weight"),
        ],
    ),
    (
        "shared_experts.gate_up_proj.weight",
        &[Each(&["shared_experts.gate_proj.weight", "shared_experts.up_proj.weight"], 0)],
    ),
    ("shared_experts.gate_proj", &[Every("shared_experts.shared_w13_weight", 0)]),
    ("shared_experts.up_proj", &[Every("shared_experts.shared_w13_weight", 1)]),
    ("shared_experts.down_proj", &[Whole("shared_experts.shared_w2_weight")]),
    ("text_moe.gate.weight", &[Turned("gate.weight")]),
    ("text_moe.experts.gate_up_proj", &[Each(&["experts.#.gate_proj.weight", "experts.#.up_proj.weight"], 0)]),
    ("text_moe.experts.down_proj", &[Each(&["experts.#.down_proj.weight"], 0)]),
    ("vision_moe.gate.weight", &[Turned("gate.weight_1")]),
    ("vision_moe.experts.gate_up_proj", &[Each(&["experts.#.gate_proj.weight", "experts.#.up_proj.weight"], 1)]),
    ("vision_moe.experts.down_proj", &[Each(&["experts.#.down_proj.weight"], 1)]),
];

/// The gradient of a module's parameter `name` of these extents, from those of the checkpoint's tensors, whose names begin with `prefix`; none
/// where none of these has it. An expert's tensor that nothing reads has zeros.
pub fn of_module(name: &str, shape: &[usize], prefix: &str, tensors: &ByName<f64>) -> Option<Vec<f64>> {
    let full = |name: &str| match name.strip_prefix('^') {
        None => format!("{prefix}.{name}"),
        Some(name) => format!("{}.{name}", prefix.rsplit_once('.').map_or("", |(parent, _)| parent)),
    };
    let find = |name: &str| tensors.get(&full(name));
    let elements: usize = shape.iter().product();
    let fits = |values: Vec<f64>| (values.len() == elements).then_some(values);
    if let Some(tensor) = find(name).filter(|tensor| tensor.shape == shape) {
        return Some(tensor.values.clone());
    }
    let forms = FORMS.iter().filter(|(known, _)| *known == name).flat_map(|(_, forms)| *forms);
    forms.into_iter().find_map(|form| match *form {
        Whole(name) => find(name).filter(|tensor| tensor.shape == shape).map(|tensor| tensor.values.clone()),
        Turned(name) => find(name).map(turned).and_then(fits),
        Sorted(name) => {
            let rows = find(name).map(rows)?;
            fits(by_expert(&rows, shape[1]).flat_map(|rows| [every(rows, 0), every(rows, 1)].concat()).collect())
        }
        Every(name, first) => {
            let rows = find(name).map(rows)?;
            fits(by_expert(&rows, 2 * shape[1]).flat_map(|rows| every(rows, first)).collect())
        }
        Beside(names) => {
            let parts = names.iter().map(|name| find(name)).collect::<Option<Vec<_>>>()?;
            let size = |part: &Values<f64>| part.values.len() / shape[0];
            let of = |e: usize| parts.iter().flat_map(move |part| &part.values[e * size(part)..(e + 1) * size(part)]);
            fits((0..shape[0]).flat_map(of).copied().collect())
        }
        Each(names, bank) => {
            let experts = if names[0].contains('#') { shape[0] } else { 1 };
            let numbered = |name: &str, e: usize| find(&name.replace('#', &(bank * experts + e).to_string()));
            names.iter().try_for_each(|name| numbered(name, 0).map(|_| ()))?;
            let size = elements / experts / names.len();
            let of = |(e, name): (usize, &&str)| numbered(name, e).map_or(vec![0.0; size], |t| t.values.clone());
            fits((0..experts).flat_map(|e| names.iter().map(move |name| (e, name))).flat_map(of).collect())
        }
    })
}

/// The rows along the last extent.
fn rows(tensor: &Values<f64>) -> Vec<&[f64]> {
    tensor.values.chunks(tensor.shape.last().copied().unwrap_or(1).max(1)).collect()
}

fn by_expert<'a, 'b>(rows: &'b [&'a [f64]], count: usize) -> std::slice::Chunks<'b, &'a [f64]> {
    rows.chunks(count.max(1))
}

/// Every other row from `first` on.
fn every(rows: &[&[f64]], first: usize) -> Vec<f64> {
    rows.iter().skip(first).step_by(2).flat_map(|row| row.iter().copied()).collect()
}

fn turned(matrix: &Values<f64>) -> Vec<f64> {
    let columns = matrix.shape.last().copied().unwrap_or(1);
    (0..columns).flat_map(|c| matrix.values.iter().skip(c).step_by(columns.max(1)).copied()).collect()
}
