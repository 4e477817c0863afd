"""The readable definition of `token_stats`: dense logits in float32, ordinary autodiff.

In: hidden states, head, targets. Out: `TokenStats`. This is the oracle that every other implementation is tested
against, and what to read first. It does not save memory: it holds [N, V] logits, several times over under
differentiation.
"""

import jax
import jax.numpy as jnp

from fpo_jax.kernels.lm_head import spec as specs

MASKED_LOGIT = -1e30  # finite, so that no inf - inf can arise in a gradient


def token_stats(
    hidden_ND: specs.Array, head_VD: specs.Array, targets_N: specs.Array, *, spec: specs.HeadSpec
) -> specs.TokenStats:
    """Compute target logit and log-sum-exp of every token, from its whole row of logits.

        z[n, v] = logit_scale * cap(hidden[n] . head[v])
        target_logit[n] = z[n, target[n]];  lse[n] = log sum_v exp z[n, v]

    The operands are rounded to `spec.compute_dtype`; everything after that is float32 (float64 when given float64).
    The block sizes and the workspace of the spec mean nothing here: there is one block.

    Args:
        hidden_ND: final hidden states, bfloat16, float32 or float64.
        head_VD: LM head, one row per vocabulary entry.
        targets_N: token ids, integers in [0, vocab_size); outside it the target logit is NaN.
        spec: options of the head.

    Returns:
        TokenStats of shape [N]; float32, or float64 when given float64.

    Raises:
        ValueError: shapes or dtypes that do not fit (see `spec.check`).

    >>> import jax.numpy as jnp
    >>> from fpo_jax.kernels.lm_head import spec
    >>> stats = token_stats(jnp.ones((1, 1)), jnp.log(jnp.array([[1.0], [3.0]])), jnp.array([1]), spec=spec.HeadSpec())
    >>> print(f"{jnp.exp(stats.target_logit_N - stats.lse_N)[0]:.4f}")  # logits log 1 and log 3: p = 3 / (1 + 3)
    0.7500
    """
    specs.check(hidden_ND, head_VD, targets_N, spec)
    operand = specs.operand_dtype(hidden_ND.dtype, head_VD.dtype, spec)
    accumulator = specs.accumulator_dtype(operand)
    vocab_size = spec.vocab_size or head_VD.shape[0]

    hidden_ND = jnp.asarray(hidden_ND).astype(operand).astype(accumulator)
    head_VD = jnp.asarray(head_VD).astype(operand).astype(accumulator)
    logits_NV = jnp.einsum("ND,VD->NV", hidden_ND, head_VD, precision=jax.lax.Precision.HIGHEST)
    if spec.softcap is not None:
        logits_NV = spec.softcap * jnp.tanh(logits_NV / spec.softcap)
    logits_NV = spec.logit_scale * logits_NV
    logits_NV = jnp.where(jnp.arange(head_VD.shape[0]) < vocab_size, logits_NV, MASKED_LOGIT)

    in_vocab_N = (targets_N >= 0) & (targets_N < vocab_size)
    safe_targets_N = jnp.where(in_vocab_N, targets_N, 0)
    target_logit_N = jnp.take_along_axis(logits_NV, safe_targets_N[:, None], axis=1)[:, 0]
    target_logit_N = jnp.where(in_vocab_N, target_logit_N, jnp.nan)
    lse_N = jax.nn.logsumexp(logits_NV, axis=1)

    entropy_N = is_argmax_N = None
    if spec.want_entropy:
        logps_NV = jax.lax.stop_gradient(logits_NV - lse_N[:, None])
        entropy_N = -jnp.sum(jnp.exp(logps_NV) * logps_NV, axis=1)
    if spec.want_argmax:
        is_argmax_N = jax.lax.stop_gradient(target_logit_N >= jnp.max(logits_NV, axis=1)).astype(accumulator)
    return specs.TokenStats(target_logit_N, lse_N, entropy_N, is_argmax_N)
