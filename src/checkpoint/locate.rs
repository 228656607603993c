//! Blocks of a checkpoint: found by the names of their routers' tensors.

use std::collections::BTreeSet;

use super::error::CheckpointError;
use super::family::Family;
use super::folder::Checkpoint;

/// Ways to the layers of a language model: alone, and in wrappers of several kinds.
const LAYERS: [&str; 13] = [
    "model.layers",
    "model.language_model.layers",
    "language_model.model.layers",
    "model.language_model.model.layers",
    "language_model.layers",
    "language.model.layers",
    "language_model.language_model.layers",
    "layers",
    "model.llm.layers",
    "backbone.layers",
    "thinker.model.layers",
    "model.text_model.layers",
    "language_model.backbone.layers",
];

/// What modules call a block, whatever its tensors are called.
const MODULES: [&str; 6] = ["mlp", "feed_forward", "block_sparse_moe", "mixer", "moe", "ffn"];

/// A block in most modules.
const MODULE_MLP: &str = ".#.mlp";

/// A block that was found in a checkpoint.
pub(super) struct Found {
    /// What the names of its tensors begin with.
    pub(super) prefix: String,
    /// The number of its layer.
    pub(super) layer: usize,
}

impl Family {
    /// Every block of the checkpoint, by layers in the order of the family's templates; also of those in shards that are not there.
    pub(super) fn find(&self, checkpoint: &Checkpoint) -> Vec<Found> {
        let mut found = Vec::new();
        for template in self.templates() {
            let router = format!("{template}.{}", self.router);
            let mut layers: BTreeSet<usize> = BTreeSet::new();
            if let Some((before, _)) = router.split_once('#') {
                layers.extend(checkpoint.names_below(before).filter_map(|name| match_template(&router, name)));
            }
            found.extend(layers.into_iter().map(|layer| Found { prefix: fill(&template, layer), layer }));
        }
        found
    }

    /// What the names of a block's tensors may begin with.
    fn templates(&self) -> Vec<String> {
        let mut templates = Vec::new();
        for template in self.blocks {
            match template.strip_prefix('*') {
                // Modules call the block `mlp`, and so do some programs' files.
                Some(rest) => {
                    let of = |rest: &str| LAYERS.map(|layers| format!("{layers}{rest}"));
                    templates.extend(of(rest));
                    if rest != MODULE_MLP {
                        templates.extend(of(MODULE_MLP));
                    }
                }
                None => templates.push(template.to_string()),
            }
        }
        templates
    }

    /// The block that `wanted` names by its module's path or by what its tensors' names begin with, else the first whose router can be read.
    pub(super) fn locate(&self, checkpoint: &Checkpoint, wanted: Option<&str>) -> Result<Found, CheckpointError> {
        let mut found = self.find(checkpoint);
        let names = |found: &[Found]| {
            let shown = found.iter().take(4).map(|block| block.prefix.as_str()).collect::<Vec<_>>().join(", ");
            match found.len() {
                0 => format!("it has no tensor `{}.{}`", self.blocks.join("` or `"), self.router),
                1..=4 => format!("there are {shown}"),
                more => format!("there are {shown} and {} more", more - 4),
            }
        };
        let place = match wanted {
            Some(wanted) => {
                let exact = found.iter().position(|block| block.prefix == wanted);
                let by_module = || {
                    let layer = layer_of_module(wanted)?;
                    let mut of_layer = found.iter().enumerate().filter(|(_, block)| block.layer == layer);
                    of_layer.next().filter(|_| of_layer.next().is_none()).map(|(place, _)| place)
                };
                exact.or_else(by_module)
            }
            None => {
                let can_be_read = |block: &Found| checkpoint.contains(&self.router_of(block));
                found.iter().position(can_be_read).or((!found.is_empty()).then_some(0))
            }
        };
        match place {
            Some(place) => Ok(found.swap_remove(place)),
            None => Err(CheckpointError::Block { name: wanted.unwrap_or("any").to_owned(), reason: names(&found) }),
        }
    }

    fn router_of(&self, block: &Found) -> String {
        full_name(&block.prefix, self.router)
    }
}

/// The number of the layer in a module's path, such as `model.layers.3.mlp`; none where it is the path of no such module.
fn layer_of_module(path: &str) -> Option<usize> {
    let layers = LAYERS.iter().flat_map(|layers| {
        let modules = MODULES.iter().map(move |module| format!("{layers}.#.{module}"));
        modules.chain([format!("{layers}.#")])
    });
    layers.into_iter().find_map(|template| match_template(&template, path))
}

/// The name of a tensor of a block; `^` stands for what the block is in.
pub(super) fn full_name(prefix: &str, name: &str) -> String {
    match name.strip_prefix('^') {
        None => format!("{prefix}.{name}"),
        Some(name) => match prefix.rsplit_once('.') {
            Some((parent, _)) => format!("{parent}.{name}"),
            None => name.to_owned(),
        },
    }
}

/// The template with its number.
pub(super) fn fill(template: &str, number: usize) -> String {
    template.replace('#', &number.to_string())
}

pub(super) fn match_template(template: &str, name: &str) -> Option<usize> {
    let (before, after) = template.split_once('#')?;
    let digits = name.strip_prefix(before)?.strip_suffix(after)?;
    let decimal = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    decimal.then(|| digits.parse().ok()).flatten()
}
