//! What a model family has to say about its MoE blocks: where they are, what they compute, and which tensors hold them.

use moe_kernels::layer::LayerDesc;

use super::checkpoint::Checkpoint;
use super::config::Config;
use super::error::HfError;
use super::families::refuse_foreign_keys;

/// A model family. In templates `#` stands for a number, of a layer or of an expert.
pub struct Family {
    /// `model_type` in `config.json`.
    pub model_types: &'static [&'static str],
    /// Where its blocks are.
    pub stacks: &'static [Stack],
    /// Describes the block of a layer.
    pub block: fn(&Config, usize) -> Result<BlockSpec, HfError>,
}

/// A pile of layers, some of which have an MoE block.
pub struct Stack {
    /// What the names of a block's tensors begin with; several where wrappers of the model add their own.
    pub tensors: &'static [&'static str],
    /// Module paths that differ from that.
    pub modules: &'static [&'static str],
    /// Keys of the number of layers, the first that is there counts.
    pub layers: &'static [&'static str],
    /// Whether a layer has an MoE block rather than a dense one.
    pub sparse: fn(&Config, usize) -> Result<bool, HfError>,
}

/// What a block computes and which tensors hold it, by their names below the block's own.
pub struct BlockSpec {
    /// The layer; data types and the length of sequences are filled in by [`BlockSpec::desc`].
    pub layer: LayerDesc,
    /// Tensor `[E,H]`.
    pub router: &'static str,
    /// Tensor `[E]`, added to the logits.
    pub router_bias: Option<&'static str>,
    /// Tensor `[E]`, added to the scores for the choice.
    pub correction_bias: Option<&'static str>,
    /// The experts' matrices.
    pub experts: Experts,
    /// The shared expert's matrices, where the layer has one.
    pub shared: Option<Matrices>,
    /// The model's own code leaves the order of a token's experts open (`topk(sorted=False)`).
    pub unordered: bool,
}

/// How a checkpoint holds the experts.
#[derive(Clone, Copy)]
pub enum Experts {
    /// Tensors for each expert.
    Separate(Matrices),
    /// One tensor for all experts, in the layout that the layer's description gives.
    Packed {
        gate_up: &'static str,
        gate_up_bias: Option<&'static str>,
        down: &'static str,
        down_bias: Option<&'static str>,
    },
}

impl Experts {
    /// The names of the tensors of their matrices, in words.
    pub fn names(&self) -> String {
        match *self {
            Experts::Separate(Matrices { gate: Some(gate), up, down }) => [gate, up, down].join("`, `"),
            Experts::Separate(Matrices { gate: None, up, down }) => [up, down].join("`, `"),
            Experts::Packed { gate_up, down, .. } => [gate_up, down].join("`, `"),
        }
    }
}

/// Tensors of one gated or plain expert, each as `nn.Linear` holds it.
#[derive(Clone, Copy)]
pub struct Matrices {
    /// `[I,H]`, none for an expert without a gate.
    pub gate: Option<&'static str>,
    /// `[I,H]`.
    pub up: &'static str,
    /// `[H,I]`.
    pub down: &'static str,
}

impl BlockSpec {
    /// The router's tensor in a block whose tensors' names begin with `prefix`.
    fn router_below(&self, prefix: &str) -> String {
        format!("{prefix}.{}", self.router)
    }

    /// The layer for a batch that is one sequence of `tokens` tokens.
    pub fn desc(&self, tokens: usize) -> LayerDesc {
        let mut layer = self.layer;
        if let Some(capacity) = &mut layer.capacity {
            capacity.tokens_per_sequence = tokens.max(1);
        }
        layer
    }
}

/// A block that was found in a checkpoint.
pub struct Located {
    /// What the names of its tensors begin with.
    pub prefix: String,
    pub spec: BlockSpec,
}

impl Family {
    /// The block of a layer, once nothing in the configuration is known to change it in a way that is not computed.
    fn describe(&self, config: &Config, layer: usize) -> Result<BlockSpec, HfError> {
        let spec = (self.block)(config, layer)?;
        refuse_foreign_keys(config, &spec)?;
        Ok(spec)
    }

    /// The block that `wanted` names by its module path or by its tensors' prefix, else the first whose router is there.
    pub fn locate(&self, config: &Config, checkpoint: &Checkpoint, wanted: Option<&str>) -> Result<Located, HfError> {
        match wanted {
            Some(wanted) => self.locate_named(config, checkpoint, wanted),
            None => self.locate_first(config, checkpoint),
        }
    }

    fn locate_named(&self, config: &Config, checkpoint: &Checkpoint, wanted: &str) -> Result<Located, HfError> {
        let no_block = |reason: String| HfError::Block { name: wanted.to_owned(), reason };
        for stack in self.stacks {
            let templates = stack.tensors.iter().chain(stack.modules);
            let Some(layer) = templates.into_iter().find_map(|template| match_template(template, wanted)) else {
                continue;
            };
            if !(stack.sparse)(config, layer)? {
                return Err(no_block(format!("by config.json layer {layer} has a dense block")));
            }
            let spec = self.describe(config, layer)?;
            let prefix = find_prefix(stack, layer, |prefix| checkpoint.names(&spec.router_below(prefix)));
            // Loading will say which tensor is missing.
            let prefix = prefix.unwrap_or_else(|| fill(stack.tensors[0], layer));
            return Ok(Located { prefix, spec });
        }
        let known: Vec<&str> =
            self.stacks.iter().flat_map(|stack| stack.tensors.iter().chain(stack.modules)).copied().collect();
        Err(no_block(format!("blocks of this family are {}", known.join(", "))))
    }

    fn locate_first(&self, config: &Config, checkpoint: &Checkpoint) -> Result<Located, HfError> {
        // The router to tell of where none can be read: rather one whose shard is missing than one that never was.
        let (mut lost, mut first) = (None, None);
        for stack in self.stacks {
            for layer in 0..config.size_of(stack.layers)? {
                if !(stack.sparse)(config, layer)? {
                    continue;
                }
                let spec = self.describe(config, layer)?;
                let found = |wanted: fn(&Checkpoint, &str) -> bool| {
                    find_prefix(stack, layer, |prefix| wanted(checkpoint, &spec.router_below(prefix)))
                };
                if let Some(prefix) = found(Checkpoint::contains) {
                    return Ok(Located { prefix, spec });
                }
                lost = lost.or_else(|| Some(spec.router_below(&found(Checkpoint::names)?)));
                first.get_or_insert_with(|| spec.router_below(&fill(stack.tensors[0], layer)));
            }
        }
        Err(match lost.or(first) {
            Some(name) => checkpoint.missing(&name),
            None => HfError::Block { name: "any".into(), reason: "by config.json every layer is dense".into() },
        })
    }
}

/// The first of the names that a block can have which fits.
fn find_prefix(stack: &Stack, layer: usize, fits: impl Fn(&str) -> bool) -> Option<String> {
    let templates = stack.tensors.iter().chain(stack.modules);
    templates.map(|template| fill(template, layer)).find(|prefix| fits(prefix))
}

/// The template with its number.
pub fn fill(template: &str, number: usize) -> String {
    template.replace('#', &number.to_string())
}

fn match_template(template: &str, name: &str) -> Option<usize> {
    let (before, after) = template.split_once('#')?;
    let digits = name.strip_prefix(before)?.strip_suffix(after)?;
    digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok()).flatten()
}
