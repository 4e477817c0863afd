"""Decoders as functions of a plain nested dict of arrays: tokens in, hidden states out, never logits.

    tokens_NT, valid_NT, params ──► hidden_states ──► hidden_NTD ──(logprobs, with the head)──► log-probs

The modules under this package are Flax nnx; the hot path sees only `jax.jit` over plain pytrees, because
`hidden_states` merges module and parameters inside the trace. `param_table` says what the dict holds.
"""

import contextlib

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Int

from fpo_jax import attention as attention_module
from fpo_jax import sharding, types
from fpo_jax.models import kv_cache, routing, transformer
from fpo_jax.models.config import Adapter, ModelConfig

COMPUTE_DTYPES = ("float32", "bfloat16", "float16")


def hidden_states(
    params: types.PyTree,
    tokens_NT: Int[jax.Array, "N T"],
    valid_NT: Bool[jax.Array, "N T"],
    *,
    config: ModelConfig,
    compute_dtype: jax.typing.DTypeLike,
    remat: str = "none",
    attention: attention_module.Selection | None = None,
    layout: sharding.Layout = sharding.ONE_DEVICE,
    adapter: Adapter | None = None,
    dropout_key: jax.Array | None = None,
    segments: types.Segments | None = None,
    fp8: bool = False,
) -> Float[jax.Array, "N T D"]:
    """Run the decoder up to and including its final norm: `hidden_states_and_routing` without the second result."""
    return hidden_states_and_routing(
        params,
        tokens_NT,
        valid_NT,
        config=config,
        compute_dtype=compute_dtype,
        remat=remat,
        attention=attention,
        layout=layout,
        adapter=adapter,
        dropout_key=dropout_key,
        segments=segments,
        fp8=fp8,
    )[0]


def hidden_states_and_routing(
    params: types.PyTree,
    tokens_NT: Int[jax.Array, "N T"],
    valid_NT: Bool[jax.Array, "N T"],
    *,
    config: ModelConfig,
    compute_dtype: jax.typing.DTypeLike,
    remat: str = "none",
    attention: attention_module.Selection | None = None,
    layout: sharding.Layout = sharding.ONE_DEVICE,
    adapter: Adapter | None = None,
    dropout_key: jax.Array | None = None,
    segments: types.Segments | None = None,
    fp8: bool = False,
) -> tuple[Float[jax.Array, "N T D"], routing.Routing | None]:
    """Run the decoder up to and including its final norm.

    Every row starts at position 0, in packed rows every text of it, and rows are right-padded; what stands in the
    padding changes neither the valid positions nor their gradient. Hidden states of padding positions are finite and
    mean nothing.

    Args:
        params: nested dict of arrays with the entries of param_table, any float dtype; cast to compute_dtype at use.
        tokens_NT: token ids; ids outside the vocabulary at valid positions give NaN.
        valid_NT: True = a real token; no True after a False.
        config: the architecture; static.
        compute_dtype: float32, bfloat16 or float16: dtype of matmul operands and of the residual stream. Norms,
            softmax and rotary embedding are float32 in all of them. float32 means float32 on every device: matmuls
            then run at the highest precision instead of TF32 or bfloat16 passes.
        remat: what the backward pass finds of a layer: "none" recomputed, "dots" (the results of its matmuls), "full"
            (its input alone, everything else is recomputed), "offload" (the same, the input in the host's memory).
        attention: from attention.select; None = decided for the default device.
        layout: where activations live on a mesh. They must be told: left alone, the compiler cuts D where the
            embedding is cut, rebuilds whole activations in every layer, and cuDNN attention does not compile.
        adapter: low-rank additions, whose A and B `params` holds beside their matrices; None = none.
        dropout_key: of what the adapter drops in this pass; None = nothing, as in every evaluation.
        segments: of packed rows: who sees whom, and where each token stands in its own conversation. The rotary
            frequencies must not depend on the length of a text (rope type dynamic).
        fp8: whether the products of the layers with their weights are of 8-bit floating-point numbers (models.fp8).

    Returns:
        hidden_NTD in compute_dtype, and the routing of a mixture of experts; None of another model.

    Raises:
        ValueError: unknown compute_dtype or remat.
    """
    dtype = _checked(compute_dtype)
    if remat not in transformer.REMAT:
        raise ValueError(f"remat {remat!r} is not one of {', '.join(transformer.REMAT)}.")
    if attention is None:
        attention = _default_attention(config, dtype, tokens_NT.shape[1], layout, segments=segments is not None)
    with _exact(dtype):
        return nnx.merge(transformer.graph(config, adapter), params)(
            tokens_NT,
            valid_NT,
            compute_dtype=dtype,
            remat=remat,
            choice=attention,
            layout=layout,
            dropout_key=dropout_key,
            segments=segments,
            fp8=fp8,
        )


def prefill(
    params: types.PyTree,
    tokens_NT: Int[jax.Array, "N T"],
    lengths_N: Int[jax.Array, " N"],
    *,
    config: ModelConfig,
    compute_dtype: jax.typing.DTypeLike,
    positions: int,
    returns: int = 1,
    attention: attention_module.Selection | None = None,
    layout: sharding.Layout = sharding.ONE_DEVICE,
) -> tuple[Float[jax.Array, "M D"], kv_cache.Cache]:
    """Run the decoder over prompts and keep what later tokens will look at.

    Args:
        params: as for hidden_states.
        tokens_NT: prompts, right-padded.
        lengths_N: tokens of each.
        config: the architecture.
        compute_dtype: as for hidden_states; the cache has it too.
        positions: room of the cache, prompt and completion.
        returns: copies of each prompt's row in the result, next to each other.
        attention: as for hidden_states.
        layout: as for hidden_states.

    Returns:
        The hidden state of each row's last token [M, D], M = N * returns (row n * returns + r), and the cache.
    """
    dtype = _checked(compute_dtype)
    if attention is None:
        attention = _default_attention(config, dtype, tokens_NT.shape[1], layout)
    valid_NT = jnp.arange(tokens_NT.shape[1]) < lengths_N[:, None]
    with _exact(dtype):
        hidden_NTD, cache = nnx.merge(transformer.graph(config), params).prefill(
            tokens_NT, valid_NT, compute_dtype=dtype, choice=attention, layout=layout
        )
    last_N11 = jnp.maximum(lengths_N - 1, 0)[:, None, None]
    hidden_ND = jnp.take_along_axis(hidden_NTD, last_N11, axis=1)[:, 0]
    return jnp.repeat(hidden_ND, returns, axis=0), kv_cache.with_room(cache, positions=positions, returns=returns)


def decode(
    params: types.PyTree,
    tokens_N: Int[jax.Array, " N"],
    positions_N: Int[jax.Array, " N"],
    cache: kv_cache.Cache,
    *,
    config: ModelConfig,
    compute_dtype: jax.typing.DTypeLike,
    layout: sharding.Layout = sharding.ONE_DEVICE,
) -> tuple[Float[jax.Array, "N D"], kv_cache.Cache]:
    """Run the decoder over one more token of each row.

    Args:
        params: as for hidden_states.
        tokens_N: the tokens.
        positions_N: where they stand, from 0: how many tokens came before. Beyond the cache's room nothing is kept.
        cache: from prefill or decode.
        config: the architecture.
        compute_dtype: as for hidden_states.
        layout: as for hidden_states.

    Returns:
        hidden_ND, and the cache with the new position.
    """
    dtype = _checked(compute_dtype)
    with _exact(dtype):
        return nnx.merge(transformer.graph(config), params).decode(
            tokens_N, positions_N, cache, compute_dtype=dtype, layout=layout
        )


def _checked(compute_dtype: jax.typing.DTypeLike) -> jnp.dtype:
    dtype = jnp.dtype(compute_dtype)
    if dtype.name not in COMPUTE_DTYPES:
        raise ValueError(f"compute_dtype {dtype.name} is not one of {', '.join(COMPUTE_DTYPES)}.")
    return dtype


def _exact(dtype: jnp.dtype) -> contextlib.AbstractContextManager:
    """float32 means float32 on every device."""
    return jax.default_matmul_precision("highest") if dtype == jnp.float32 else contextlib.nullcontext()


def _default_attention(
    config: ModelConfig, dtype: jnp.dtype, positions: int, layout: sharding.Layout, *, segments: bool = False
) -> attention_module.Selection:
    return attention_module.select(
        "auto",
        platform=jax.default_backend(),
        dtype=dtype,
        head_dim=config.head_dim,
        heads=config.heads,
        kv_heads=config.kv_heads,
        positions=[positions],
        sliding_window=config.sliding_window,
        soft_cap=config.attention_soft_cap,
        sinks=config.of_family.sinks,
        segments=segments,
        compute_capability=str(getattr(jax.devices()[0], "compute_capability", "")),
        layout=layout,
    )


def head(params: types.PyTree, *, config: ModelConfig) -> Float[jax.Array, "V D"]:
    """Return the LM head [V, D] in the parameters' dtype: the embedding where the two are tied."""
    return params["embed"] if config.tied_head else params["head"]


def logits(params: types.PyTree, hidden_ND: Float[jax.Array, "N D"], *, config: ModelConfig) -> Float[jax.Array, "N V"]:
    """Return the logits, float32, after one hidden state of each row: for sampling, never for training."""
    head_VD = head(params, config=config).astype(hidden_ND.dtype)
    exact = jax.lax.Precision.HIGHEST
    logits_NV = jnp.einsum("ND,VD->NV", hidden_ND, head_VD, preferred_element_type=jnp.float32, precision=exact)
    cap = config.final_soft_cap
    return logits_NV if cap is None else cap * jnp.tanh(logits_NV / cap)


def scores(
    params: types.PyTree, hidden_NTD: Float[jax.Array, "N T D"], last_NP: Int[jax.Array, "N P"]
) -> Float[jax.Array, "N P"]:
    """Return a reward model's scores, float32: the bias-free head on the hidden states at P positions of each row."""
    hidden_NPD = jnp.take_along_axis(hidden_NTD, last_NP[:, :, None], axis=1).astype(jnp.float32)
    score_D = params["score"][0].astype(jnp.float32)
    return jnp.einsum("NPD,D->NP", hidden_NPD, score_D, precision=jax.lax.Precision.HIGHEST)
