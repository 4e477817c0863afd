"""One attention call for every decoder, and the choice of its implementation.

Queries, keys and values go in, the attended values come out. Rows are right-padded, so causality alone keeps padding
keys from every valid query and no length mask is needed; padding queries return exactly zero. The softmax is float32
in every implementation. On a mesh each device attends its own rows and heads, and nothing is communicated. Rotary
embedding, projections and caches are the models' business.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from fpo_jax import sharding, types
from fpo_jax.attention import blockwise, mosaic, sharded, splash
from fpo_jax.attention import segment_mask as segments_
from fpo_jax.attention.dispatch import IMPLEMENTATIONS, WITH_SINKS, Selection


def attend(
    q_NTHC: Float[jax.Array, "N T H C"],
    k_NTGC: Float[jax.Array, "N T G C"],
    v_NTGC: Float[jax.Array, "N T G C"],
    *,
    valid_NT: Bool[jax.Array, "N T"],
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None = None,
    segments: types.Segments | None = None,
    sinks_H: Float[jax.Array, " H"] | None = None,
    choice: Selection,
    layout: sharding.Layout,
) -> Float[jax.Array, "N T H C"]:
    """Attend causally within each row.

        out_i = sum_j softmax_j(cap(scale * q_i . k_j)) v_j   over j <= i, with a window W also j > i - W, and with
                                                              segments only j of the segment of i and of the one that
                                                              it follows; W then counts their own positions
        out_i = 0                                             where row position i is padding
        cap(x) = soft_cap * tanh(x / soft_cap), or x without a soft-cap

    Query head h reads key/value head h // (H / G). A sink s_h is one more logit of every query of head h, with a value
    of zero (gpt-oss, arXiv 2508.10925): out_i is then the above times sigmoid(L_i - s_h), with L_i the log-sum-exp of
    the query's logits.

    Args:
        q_NTHC: queries, already rotated.
        k_NTGC: keys, already rotated; G divides H.
        v_NTGC: values.
        valid_NT: True = a real token. Rows are right-padded: no True after a False.
        scale: factor on the logits, usually C**-0.5.
        sliding_window: W, positions a query sees, itself included (Mistral); None = all before it.
        soft_cap: bound on the magnitude of the logits (Gemma-2: 50), > 0; None for none.
        segments: who sees whom in packed rows; None = a row is one text.
        sinks_H: a logit for each query head; None for none.
        choice: from `select`.
        layout: where rows and heads live on a mesh; those that the mesh does not divide stay whole.

    Returns:
        [N, T, H, C] in the dtype of the queries; logits and softmax are float32.

    Raises:
        ValueError: unknown implementation, or one without an option that is asked for.
    """
    if choice.implementation not in _ENGINES:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"attention implementation {choice.implementation!r} is not one of {known}.")
    window = None if sliding_window is None or sliding_window >= q_NTHC.shape[1] else sliding_window
    if sinks_H is not None and choice.implementation not in WITH_SINKS:
        raise ValueError(
            f"attention implementation {choice.implementation!r} runs without the sinks asked for; take the"
            " implementation from attention.select."
        )
    options = {"interpret": True} if choice.interpret else {}
    engine = functools.partial(
        _ENGINES[choice.implementation], scale=scale, window=window, soft_cap=soft_cap, **options
    )
    out_NTHC = sharded.on_each_device(engine, q_NTHC, k_NTGC, v_NTGC, segments, sinks_H, layout=layout)
    # Every query sees at least itself, so the value under the select is finite and so is its gradient.
    return jnp.where(valid_NT[:, :, None, None], out_NTHC, 0)


def _library(q_NTHC, k_NTGC, v_NTGC, segments, *, scale, window, soft_cap, implementation) -> jax.Array:
    """Attend by JAX's own call, in XLA or cuDNN, which take who sees whom in a row of several texts as a mask."""
    if soft_cap is not None:
        raise ValueError(
            f"attention implementation {implementation!r} runs without the soft-cap {soft_cap} asked for; take the"
            " implementation from attention.select."
        )
    seen_N1TT, local = None, None if window is None else (window - 1, 0)
    if segments is not None:
        seen_N1TT, local = segments_.seen(segments, segments, window=window)[:, None], None
    return jax.nn.dot_product_attention(
        q_NTHC,
        k_NTGC,
        v_NTGC,
        mask=seen_N1TT,
        scale=scale,
        is_causal=True,
        local_window_size=local,
        implementation=implementation,
    )


_ENGINES: dict[str, Callable[..., jax.Array]] = {
    "xla": functools.partial(_library, implementation="xla"),
    "chunked": blockwise.attend,
    "cudnn": functools.partial(_library, implementation="cudnn"),
    "mosaic": mosaic.attend,
    "splash": splash.attend,
}
