//! Experts of one unit beside a dense MLP (Doge), back through one by one: [`crate::experts::unit_experts_backward`],
//! [`crate::routers::product_keys_backward`], and the MLP as a layer of one expert that all tokens choose.

use cudarc::driver::CudaSlice;

use super::core::{Core, experts_alone, of_products};
use super::parts::{Product, Queue, Tokens};
use super::{OPERATION, zeros};
use crate::checkpoint::run::typed;
use crate::checkpoint::store::DeviceBuffer;
use crate::checkpoint::weights::{BlockWeights, tensor};
use crate::experts::unit_experts::UnitExpertsDesc;
use crate::experts::unit_experts_backward::{self, UnitExpertsBackwardArgs, UnitExpertsBackwardDesc, workspace_bytes};
use crate::layer::{Choices, LayerDesc};
use crate::routers::product_keys::{self, ProductKeysArgs, ProductKeysDesc};
use crate::routers::product_keys_backward::{self, ProductKeysBackwardArgs, ProductKeysBackwardDesc};
use crate::routers::router::RouterDesc;
use crate::rules::KeySplit;
use crate::{Element, Error, In, Workspace};

/// Both passes.
pub(super) struct UnitExperts<T> {
    tokens: Tokens,
    router: RouterDesc,
    /// `[T, 2n]`, and their gradients.
    scores: [CudaSlice<f32>; 2],
    keys: ProductKeysDesc,
    /// `[T, k]`.
    ids: CudaSlice<i32>,
    /// `[T, k]`, and their gradients.
    weights: [CudaSlice<f32>; 2],
    experts: UnitExpertsBackwardDesc,
    workspace: Workspace,
    dense: Core<T>,
    /// `[T]` each: the one expert of the MLP, with the weight 1.
    all: (CudaSlice<i32>, CudaSlice<f32>),
}

impl<T: Element> UnitExperts<T> {
    pub(super) fn new(desc: &LayerDesc, keys: usize, tokens: usize, queue: Queue<'_>) -> Result<UnitExperts<T>, Error> {
        let stream = queue.stream;
        let &LayerDesc { dtype, hidden, intermediate, experts, top_k, mlp, .. } = desc;
        let floats = |width: usize| Ok::<_, Error>([zeros(stream, tokens * width)?, zeros(stream, tokens * width)?]);
        let units = UnitExpertsDesc::new(dtype, tokens, hidden, experts, top_k).activation(mlp.activation);
        let back = UnitExpertsBackwardDesc::new(units).accumulate(true);
        let alone = LayerDesc::new(dtype, hidden, intermediate, 1, 1).mlp(mlp);
        Ok(UnitExperts {
            tokens: Tokens::new(tokens, queue)?,
            router: RouterDesc::new(dtype, tokens, 2 * keys, hidden).weight(desc.router_dtype),
            scores: floats(2 * keys)?,
            // As the forward pass splits them.
            keys: ProductKeysDesc::new(tokens, keys, top_k).split(KeySplit::Batch),
            ids: zeros(stream, tokens * top_k)?,
            weights: floats(top_k)?,
            workspace: Workspace::new(stream, workspace_bytes(&back)?)?,
            experts: back,
            dense: Core::chosen(&alone, tokens, queue)?,
            all: (
                zeros(stream, tokens)?,
                stream.clone_htod(&vec![1.0; tokens.max(1)]).map_err(Error::driver(OPERATION))?,
            ),
        })
    }

    /// Both passes; the gradient of `x` is written.
    pub(super) fn run(
        &mut self,
        queue: Queue<'_>,
        weights: &BlockWeights<DeviceBuffer>,
        ([input, output], [of_input, of_output]): ([&DeviceBuffer; 2], [&mut CudaSlice<f32>; 2]),
        (x, dy): (In<'_, T>, In<'_, T>),
        (dx, of): (&mut CudaSlice<T>, &mut BlockWeights<CudaSlice<f32>>),
    ) -> Result<(), Error> {
        let Queue { kernels, stream } = queue;
        let missing = Error::Missing { operation: OPERATION, argument: "router", reason: "keys have scores" };
        let matrix = tensor(weights.router.as_ref().ok_or(missing)?)?;
        let ([scores, d_scores], [shares, d_shares]) = (&mut self.scores, &mut self.weights);
        super::apart::product(queue, &self.router, x, matrix, None, scores)?;
        let args = ProductKeysArgs::new(&*scores, &mut self.ids, &mut *shares);
        product_keys::forward(kernels, stream, &self.keys, args)?;

        let experts = experts_alone(&weights.gate_up, &weights.down)?;
        self.dense.forward_chosen(queue, &experts, x, Choices::new(&self.all.0, &self.all.1))?;
        let gradients = of_products(&mut of.gate_up, &mut of.down).x(&mut *dx);
        self.dense.backward(queue, &experts, (x, dy), gradients)?;

        let rows = [typed(input)?, typed(output)?];
        let args = UnitExpertsBackwardArgs::new(x, rows, &self.ids, &*shares, dy)
            .workspace(&mut self.workspace)
            .dx(&mut *dx)
            .d_weights(&mut *d_shares)
            .d_input(of_input)
            .d_output(of_output);
        unit_experts_backward::backward(kernels, stream, &self.experts, args)?;

        let args = ProductKeysBackwardArgs::new(&*scores, &self.ids, &*d_shares, &mut *d_scores);
        product_keys_backward::forward(kernels, stream, &ProductKeysBackwardDesc::new(self.keys), args)?;
        let product = Product::new(T::DTYPE, self.router.experts, self.router.hidden);
        if let Some(of_router) = &mut of.router {
            product.back_to_weight(queue, &self.tokens, ((&*d_scores).into(), x), of_router)?;
        }
        product.back_to_input(queue, &self.tokens, ((&*d_scores).into(), matrix), true, dx.into())
    }
}
