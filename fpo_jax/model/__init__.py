"""Decoders as functions of a plain nested dict of arrays: tokens in, hidden states out, never logits.

    tokens_NT, valid_NT, params ──► hidden_states ──► hidden_NTD ──(logps.py, with head)──► log-probs

The modules under this package are Flax nnx; the hot path sees only `jax.jit` over plain pytrees, because
`hidden_states` merges module and parameters inside the trace. params.py says what the dict holds.
"""

import contextlib

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Int

from fpo_jax import attention as attention_module
from fpo_jax import shapes, sharding
from fpo_jax.model import decoder
from fpo_jax.model.configuration import FAMILIES, ModelConfig, filler_id, from_hf_config, head_keys, to_hf_config
from fpo_jax.model.rope import Rope

__all__ = [
    "FAMILIES",
    "ModelConfig",
    "Rope",
    "filler_id",
    "from_hf_config",
    "head",
    "head_keys",
    "hidden_states",
    "scores",
    "to_hf_config",
]

COMPUTE_DTYPES = ("float32", "bfloat16", "float16")


def hidden_states(
    params: shapes.PyTree,
    tokens_NT: Int[jax.Array, "N T"],
    valid_NT: Bool[jax.Array, "N T"],
    *,
    config: ModelConfig,
    compute_dtype: jax.typing.DTypeLike,
    remat: str = "none",
    attention: attention_module.Choice | None = None,
    layout: sharding.Layout = sharding.ONE_DEVICE,
) -> Float[jax.Array, "N T D"]:
    """Run the decoder up to and including its final norm.

    Every row starts at position 0 and is right-padded; what stands in the padding changes neither the valid
    positions nor their gradient. Hidden states of padding positions are finite and mean nothing.

    Args:
        params: nested dict of arrays with the rows of params.py, any float dtype; cast to compute_dtype at use.
        tokens_NT: token ids; ids outside the vocabulary at valid positions give NaN.
        valid_NT: True = a real token; no True after a False.
        config: the architecture; static.
        compute_dtype: float32, bfloat16 or float16: dtype of matmul operands and of the residual stream. Norms,
            softmax and rotary embedding are float32 in all of them. float32 means float32 on every device: matmuls
            then run at the highest precision instead of TF32 or bfloat16 passes.
        remat: what the backward pass finds of a layer: "none" recomputed, "dots" (the results of its matmuls), "full"
            (its input alone, everything else is recomputed), "offload" (the same, the input in the host's memory).
        attention: from attention.choose; None = decided for the default device.
        layout: where activations live on a mesh. They must be told: left alone, the compiler cuts D where the
            embedding is cut, rebuilds whole activations in every layer, and cuDNN attention does not compile.

    Returns:
        hidden_NTD in compute_dtype.

    Raises:
        ValueError: unknown compute_dtype or remat.
    """
    dtype = jnp.dtype(compute_dtype)
    if dtype.name not in COMPUTE_DTYPES:
        raise ValueError(f"compute_dtype {dtype.name} is not one of {', '.join(COMPUTE_DTYPES)}.")
    if remat not in decoder.REMAT:
        raise ValueError(f"remat {remat!r} is not one of {', '.join(decoder.REMAT)}.")
    if attention is None:
        attention = attention_module.choose(
            "auto",
            platform=jax.default_backend(),
            dtype=dtype,
            head_dim=config.head_dim,
            heads=config.heads,
            kv_heads=config.kv_heads,
            positions=[tokens_NT.shape[1]],
            sliding_window=config.sliding_window,
            soft_cap=None,
            segments=False,
            layout=layout,
        )
    exact = jax.default_matmul_precision("highest") if dtype == jnp.float32 else contextlib.nullcontext()
    with exact:
        return nnx.merge(decoder.graph(config), params)(
            tokens_NT,
            valid_NT,
            compute_dtype=dtype,
            remat=remat,
            choice=attention,
            layout=layout,
        )


def head(params: shapes.PyTree, *, config: ModelConfig) -> Float[jax.Array, "V D"]:
    """Return the LM head [V, D] in the parameters' dtype: the embedding where the two are tied."""
    return params["embed"] if config.tied_head else params["head"]


def scores(
    params: shapes.PyTree, hidden_NTD: Float[jax.Array, "N T D"], last_N: Int[jax.Array, " N"]
) -> Float[jax.Array, " N"]:
    """Return a reward model's scores, float32: the bias-free head on the hidden state at one position of each row."""
    hidden_ND = jnp.take_along_axis(hidden_NTD, last_N[:, None, None], axis=1)[:, 0].astype(jnp.float32)
    score_D = params["score"][0].astype(jnp.float32)
    return jnp.einsum("ND,D->N", hidden_ND, score_D, precision=jax.lax.Precision.HIGHEST)
