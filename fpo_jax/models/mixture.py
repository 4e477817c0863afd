"""A mixture of experts in the place of the MLP: a router gives each token its few experts, and no token is dropped.

    p = softmax(router(x))      float32
    y = sum_u w_u down_u(act(gate_u(x)) * up_u(x))      u the experts of largest p; w_u = p_u, or p_u / sum_u p_u
      + sigmoid(share(x)) shared(x)                     where the family has an expert that sees every token

Tokens are sorted by their experts and multiplied in groups (`jax.lax.ragged_dot`): M = N T U rows, with U experts of a
token. No array has an axis of tokens, one of experts and one of D or F, except where XLA has no grouped product (CPU).
On a mesh each device sorts the tokens of its own rows and multiplies by its part of F of every expert.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from fpo_jax import sharding
from fpo_jax.kernels.lm_head import spec as specs
from fpo_jax.models import activations, config, layers


class MixtureMLP(nnx.Module):
    """A router, E gated experts, and where the family has one an expert for all tokens."""

    router: nnx.Param
    gate: nnx.Param
    up: nnx.Param
    down: nnx.Param

    def __init__(self, config: config.ModelConfig):
        self.activation = config.activation
        self.experts_per_token, self.normalizes = config.experts_per_token, config.normalize_top_k
        self.has_shared = "shared_gate" in config.of_family.matrices

    def __call__(self, x_NTD: Float[jax.Array, "N T D"], context: layers.Context) -> Float[jax.Array, "N T D"]:
        """Apply the experts."""
        chosen_NTU, weights_NTU = self._routed(x_NTD, context)
        matrices = (module[...].astype(x_NTD.dtype) for module in (self.gate, self.up, self.down))
        out_NTD = apply_experts(
            x_NTD, chosen_NTU, weights_NTU, *matrices, activation=self.activation, layout=context.layout
        )
        return out_NTD + self._shared(x_NTD, context) if self.has_shared else out_NTD

    def _routed(self, x_NTD: jax.Array, context: layers.Context) -> tuple[jax.Array, jax.Array]:
        """Return the experts of each token and their weights, float32."""
        wide_NTD, router_DE = x_NTD.astype(jnp.float32), self.router[...].astype(jnp.float32)
        logits_NTE = jnp.einsum("NTD,DE->NTE", wide_NTD, router_DE, precision=jax.lax.Precision.HIGHEST)
        probs_NTE = jax.nn.softmax(logits_NTE)
        weights_NTU, chosen_NTU = jax.lax.top_k(probs_NTE, self.experts_per_token)
        if self.normalizes:
            weights_NTU /= jnp.sum(weights_NTU, axis=-1, keepdims=True)
        if context.routes is not None:
            context.routes.record(probs_NTE, chosen_NTU, context.valid_NT)
        return chosen_NTU, weights_NTU

    def _shared(self, x_NTD: jax.Array, context: layers.Context) -> jax.Array:
        gate_NTS = context.project("NTD,DS->NTS", x_NTD, self, "shared_gate")
        up_NTS = context.project("NTD,DS->NTS", x_NTD, self, "shared_up")
        gated_NTS = context.constrain_mlp(activations.activate(self.activation, gate_NTS, up_NTS))
        out_NTD = context.project("NTS,SD->NTD", gated_NTS, self, "shared_down")
        return jax.nn.sigmoid(context.project("NTD,DX->NTX", x_NTD, self, "shared_share")) * out_NTD


def apply_experts(
    x_NTD: Float[jax.Array, "N T D"],
    chosen_NTU: Int[jax.Array, "N T U"],
    weights_NTU: Float[jax.Array, "N T U"],
    gate_EDF: Float[jax.Array, "E D F"],
    up_EDF: Float[jax.Array, "E D F"],
    down_EFD: Float[jax.Array, "E F D"],
    *,
    activation: str,
    layout: sharding.Layout,
) -> Float[jax.Array, "N T D"]:
    """Return the weighted sum of what each token's experts make of it, in the dtype of x.

    Args:
        x_NTD: the tokens.
        chosen_NTU: their experts, in [0, E), each at most once.
        weights_NTU: of these, float32.
        gate_EDF: of every expert, in the dtype of x, as the next two.
        up_EDF: the same.
        down_EFD: the same.
        activation: a key of activations.ACTIVATIONS.
        layout: where rows and F live on a mesh.
    """

    def on_rows(x_NTD, chosen_NTU, weights_NTU, gate_EDF, up_EDF, down_EFD):
        used, width = chosen_NTU.shape[-1], x_NTD.shape[-1]
        chosen_M = chosen_NTU.reshape(-1)
        order_M = jnp.argsort(chosen_M)
        sizes_E = jnp.bincount(chosen_M, length=gate_EDF.shape[0]).astype(jnp.int32)
        sorted_MD = jnp.take(x_NTD.reshape(-1, width), order_M // used, axis=0)
        gate_MF, up_MF = (jax.lax.ragged_dot(sorted_MD, matrix, sizes_E) for matrix in (gate_EDF, up_EDF))
        out_MD = jax.lax.ragged_dot(activations.activate(activation, gate_MF, up_MF), down_EFD, sizes_E)
        back_M = jnp.argsort(order_M)
        out_NTUD = jnp.take(out_MD, back_M, axis=0, unique_indices=True).reshape(*chosen_NTU.shape, width)
        weighted_NTUD = out_NTUD.astype(jnp.float32) * weights_NTU[..., None]
        return jnp.sum(weighted_NTUD, axis=-2).astype(x_NTD.dtype)

    operands = (x_NTD, chosen_NTU, weights_NTU, gate_EDF, up_EDF, down_EFD)
    if layout.mesh is None or layout.on_one_device:
        return on_rows(*operands)
    rows, width = layout.place("rows", x_NTD.shape[0]), layout.place("mlp", gate_EDF.shape[-1])

    def on_device(*operands):
        out_NTD = on_rows(*operands)
        return out_NTD if width is None else jax.lax.psum(out_NTD, width)

    of_rows, inwards = PartitionSpec(rows, None, None), PartitionSpec(None, None, width)
    return jax.shard_map(
        on_device,
        **specs.mesh_or_rest(layout.mesh),
        in_specs=(of_rows, of_rows, of_rows, inwards, inwards, PartitionSpec(None, width, None)),
        out_specs=of_rows,
        check_vma=False,
    )(*operands)
