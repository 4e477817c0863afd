"""A mixture of experts in the place of the MLP: a router gives each token its few experts, and no token is dropped.

    p = softmax(router(x))      float32
    y = sum_u w_u down_u(act(gate_u(x)) * up_u(x))      u the experts of largest p; w_u = p_u, or p_u / sum_u p_u
      + sigmoid(share(x)) shared(x)                     where the family has an expert that sees every token

DeepSeek's shared expert has no share, its w_u have a factor, and its u may be limited to few groups of experts.

Tokens are sorted by their experts and multiplied in groups (`kernels.experts`): M = N T U rows, with U experts of a
token. No array has an axis of tokens, one of experts and one of D or F, except where there is no grouped product (CPU).
On a mesh each device sorts the tokens of its own rows and multiplies by its part of F of every expert; along the axis
`expert` each device has some of the experts, and tokens are sent to those of theirs (`dispatch`).
An adapter of the experts is two more grouped products, through its rank: x A_e, and that by scale B_e, of each row's e.
Some families have biases, and gate and up in one matrix, or another gating of the two (`activations.GATINGS`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from fpo_jax import sharding
from fpo_jax.kernels.experts import grouped_product
from fpo_jax.kernels.lm_head import spec as specs
from fpo_jax.models import activations, config, dispatch, layers, routing


class Linear(NamedTuple):
    """One matrix of each expert, and what it adds."""

    matrix: jax.Array  # [E, inputs, outputs] in the dtype of the tokens; of gate and up together [E, D, 2, F]
    bias: jax.Array | None = None  # [E, outputs] in its own dtype, in which its gradient is summed; None = nothing
    a: jax.Array | None = None  # [E, inputs, r] of an adapter, in the dtype of the tokens; None = none
    b: jax.Array | None = None  # [E, r, outputs] of the same, with its scale


class MixtureMLP(nnx.Module):
    """A router, E gated experts, and where the family has one an expert for all tokens."""

    router: nnx.Param
    down: nnx.Param

    def __init__(self, config: config.ModelConfig):
        family = config.of_family
        self.activation = config.activation
        self.gating = family.gating or config.activation
        self.inwards = ("gate_up",) if "gate_up" in family.matrices else ("gate", "up")
        self.experts_per_token = config.experts_per_token
        self.normalizes = config.normalize_top_k and not family.unnormalized_top_k
        self.groups, self.scale = (config.expert_groups, config.groups_per_token), config.routed_scale
        self.has_shared = "shared_gate" in family.matrices
        self.has_share = "shared_share" in family.matrices

    def __call__(self, x_NTD: Float[jax.Array, "N T D"], context: layers.Context) -> Float[jax.Array, "N T D"]:
        """Apply the experts."""
        chosen_NTU, weights_NTU = self._routed(x_NTD, context)
        *inwards, down = (self._linear(name, x_NTD.dtype, context.adapter) for name in (*self.inwards, "down"))
        out_NTD = apply_experts(
            x_NTD, chosen_NTU, weights_NTU, tuple(inwards), down, activation=self.gating, layout=context.layout
        )
        return out_NTD + self._shared(x_NTD, context) if self.has_shared else out_NTD

    def _linear(self, name: str, dtype: jnp.dtype, adapter: config.Adapter | None) -> Linear:
        bias = getattr(self, f"{name}_bias", None)
        linear = Linear(getattr(self, name)[...].astype(dtype), None if bias is None else bias[...])
        if adapter is None or not hasattr(self, f"{name}_lora_a"):
            return linear
        a, b = (getattr(self, f"{name}_lora_{part}")[...] for part in "ab")
        return linear._replace(a=a.astype(dtype), b=(adapter.scale * b).astype(dtype))

    def _routed(self, x_NTD: jax.Array, context: layers.Context) -> tuple[jax.Array, jax.Array]:
        """Return the experts of each token and their weights, float32."""
        wide_NTD, router_DE = x_NTD.astype(jnp.float32), self.router[...].astype(jnp.float32)
        logits_NTE = jnp.einsum("NTD,DE->NTE", wide_NTD, router_DE, precision=jax.lax.Precision.HIGHEST)
        if (bias := getattr(self, "router_bias", None)) is not None:
            logits_NTE += bias[...].astype(jnp.float32)
        probs_NTE = jax.nn.softmax(logits_NTE)
        groups, kept = self.groups
        scores_NTE = probs_NTE if groups == 1 else routing.within_groups(probs_NTE, groups=groups, kept=kept)
        weights_NTU, chosen_NTU = jax.lax.top_k(scores_NTE, self.experts_per_token)
        if self.normalizes:
            weights_NTU /= jnp.sum(weights_NTU, axis=-1, keepdims=True)
        if self.scale != 1:
            weights_NTU *= self.scale
        if context.routes is not None:
            context.routes.record(logits_NTE, chosen_NTU, context.valid_NT)
        return chosen_NTU, weights_NTU

    def _shared(self, x_NTD: jax.Array, context: layers.Context) -> jax.Array:
        gate_NTS = context.project("NTD,DS->NTS", x_NTD, self, "shared_gate")
        up_NTS = context.project("NTD,DS->NTS", x_NTD, self, "shared_up")
        gated_NTS = context.constrain_mlp(activations.activate(self.activation, gate_NTS, up_NTS))
        out_NTD = context.project("NTS,SD->NTD", gated_NTS, self, "shared_down")
        if not self.has_share:
            return out_NTD
        return jax.nn.sigmoid(context.project("NTD,DX->NTX", x_NTD, self, "shared_share")) * out_NTD


def apply_experts(
    x_NTD: Float[jax.Array, "N T D"],
    chosen_NTU: Int[jax.Array, "N T U"],
    weights_NTU: Float[jax.Array, "N T U"],
    inwards: tuple[Linear, ...],
    down: Linear,
    *,
    activation: str,
    layout: sharding.Layout,
) -> Float[jax.Array, "N T D"]:
    """Return the weighted sum of what each token's experts make of it, in the dtype of x.

    Args:
        x_NTD: the tokens.
        chosen_NTU: their experts, in [0, E), each at most once.
        weights_NTU: of these, float32.
        inwards: gate and up of every expert, [E, D, F] each, or one [E, D, 2, F] that holds both.
        down: [E, F, D], of every expert.
        activation: a key of activations.ACTIVATIONS or GATINGS.
        layout: where rows, experts and F live on a mesh.
    """
    mesh, count = layout.mesh, down.matrix.shape[0]
    rows, width = layout.place("rows", x_NTD.shape[0]), layout.place("mlp", down.matrix.shape[1])

    def products(matrices, rows_MD, experts_M, sizes_E):
        def product(rows_MK, matrix):  # [M, outputs], with axes of outputs side by side
            matrix_EKO = matrix.reshape(*matrix.shape[:2], -1)
            chosen = grouped_product.select(rows_MK, matrix_EKO, mesh)
            return grouped_product.grouped_product(rows_MK, matrix_EKO, sizes_E, implementation=chosen)

        def grouped(rows_MK, linear):
            out_MO = product(rows_MK, linear.matrix)
            if linear.a is not None:
                out_MO += product(product(rows_MK, linear.a), linear.b)
            if linear.bias is None:
                return out_MO
            bias_EO = linear.bias.reshape(len(linear.bias), -1)
            return out_MO + jnp.take(bias_EO, experts_M, axis=0, indices_are_sorted=True).astype(out_MO.dtype)

        inwards, down = matrices
        parts = [grouped(rows_MD, linear) for linear in inwards]
        gate_MF, up_MF = jnp.split(parts[0], 2, axis=-1) if len(parts) == 1 else parts
        return grouped(activations.activate(activation, gate_MF, up_MF), down)

    def summed(x_NTD, chosen_NTU, weights_NTU, *matrices):
        x_SD, chosen_SU, weights_SU = (a.reshape(-1, a.shape[-1]) for a in (x_NTD, chosen_NTU, weights_NTU))
        operands = (products, x_SD, chosen_SU, weights_SU, matrices, count)
        if mesh is None or layout.ways("experts") == 1:
            out_SD = dispatch.local(*operands)
        else:
            out_SD = dispatch.exchanged(*operands, axis="expert", agree=mesh.axis_names)
        return out_SD.reshape(x_NTD.shape).astype(x_NTD.dtype)

    operands = (x_NTD, chosen_NTU, weights_NTU, inwards, down)
    if mesh is None or layout.on_one_device:
        return summed(*operands)

    def on_device(x_NTD, chosen_NTU, weights_NTU, inwards, down):
        if width is None:
            return summed(x_NTD, chosen_NTU, weights_NTU, inwards, down)
        if down.bias is not None:  # of the devices whose parts are added up, one adds what has no F
            down = down._replace(bias=jnp.where(jax.lax.axis_index(width) == 0, down.bias, 0))
        return jax.lax.psum(summed(x_NTD, chosen_NTU, weights_NTU, inwards, down), width)

    def placed(linear, *, inputs=None, outputs=None):  # the last axis of outputs is the one that is cut
        expert, others = layout.place("experts", count), [None] * (linear.matrix.ndim - 3)
        fields = ((inputs, *others, outputs), (*others, outputs), (inputs, None), (None, *others, outputs))
        return Linear._make([PartitionSpec(expert, *axes) for axes in fields])

    of_rows = PartitionSpec(rows, None, None)
    return jax.shard_map(
        on_device,
        **specs.mesh_or_rest(mesh),
        in_specs=(
            of_rows,
            of_rows,
            of_rows,
            tuple(placed(one, outputs=width) for one in inwards),
            placed(down, inputs=width),
        ),
        out_specs=of_rows,
        check_vma=False,
    )(*operands)
