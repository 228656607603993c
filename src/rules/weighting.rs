//! What the weights of a token's choices scale.

/// What the weights of the choices scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Weighting {
    /// Each expert's output, before it is rounded: almost every model.
    Output,
    /// Each expert's input, in the first product; outputs are added as they are (Llama 4).
    Input,
    /// What the activation yields.
    Activation,
}
