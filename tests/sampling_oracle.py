"""The sampler without a cache, as the oracle of `fpo_jax.inference.sampler`: every token recomputes the whole window.

prompts ──► [N, T] right-padded rows ──► (hidden states of the whole window ──► one token per row) until all ended
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from fpo_jax import attention as attention_module
from fpo_jax import models, types


def sample(
    params: types.PyTree,
    prompts: Sequence[Sequence[int]],
    *,
    config: models.ModelConfig,
    max_new_tokens: int,
    temperature: float,
    eos_id: int,
    pad_id: int,
    seed: int,
    num_return: int = 1,
    batch_size: int = 64,
    window: int | None = None,
    compute_dtype: jax.typing.DTypeLike = "float32",
    attention: attention_module.Selection | None = None,
) -> list[list[list[int]]]:
    """Draw `num_return` completions to every prompt, token by token, from softmax(logits / temperature).

        token_t = argmax_v (logits[v] + temperature * g[v]),  g = Gumbel noise of (seed, prompt, return, t)

    which is an exact draw from the softmax (the Gumbel-max identity), and greedy decoding at temperature 0. The noise
    depends on the prompt's index in `prompts` and on the return's number alone, so the completions do not depend on
    batch_size, and more returns leave the first ones as they were (up to rounding of another batch shape).

    Args:
        params: the model's parameters.
        prompts: token ids of each prompt, BOS included where the model wants one; at least one token each.
        config: the architecture.
        max_new_tokens: tokens of a completion at most, EOS included, >= 1.
        temperature: >= 0; 1 = the model's own distribution, 0 = greedy.
        eos_id: the token that ends a completion.
        pad_id: what stands right of a row's tokens; it is masked, so any id in the vocabulary will do.
        seed: of all noise, in [0, 2**32).
        num_return: completions per prompt, >= 1.
        batch_size: rows per forward pass; the last batch is padded to it.
        window: tokens of a row, prompt and completion; None = just enough for the longest prompt. Give it to share one
            compilation between calls.
        compute_dtype: of the forward pass; logits and noise are float32.
        attention: as for models.hidden_states.

    Returns:
        completions[p][r]: token ids without the prompt, EOS included as the last one where the model wrote it; a
        completion without EOS was cut at max_new_tokens.

    Raises:
        ValueError: an option, an id or a length outside its range, or logits that are not finite.
    """
    longest = _longest_prompt(prompts, config=config, special={"eos_id": eos_id, "pad_id": pad_id})
    for name, value in (("max_new_tokens", max_new_tokens), ("num_return", num_return), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature={temperature} must be finite and at least 0; 0 is greedy decoding.")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} must lie in [0, 2**32).")
    needed = longest + max_new_tokens
    window = needed if window is None else window
    if not needed <= window <= config.max_positions:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} need {needed} positions, window={window}"
            f" and the model has {config.max_positions}; shorten the prompts, lower max_new_tokens, or choose a window"
            " between the two."
        )
    # (prompt, return) of every row; rows of the padded end are (-1, 0)
    ids_M2 = [(index, number) for index in range(len(prompts)) for number in range(num_return)]
    completions: list[list[list[int]]] = [[] for _ in prompts]
    for start in range(0, len(ids_M2), batch_size):
        ids_N2 = ids_M2[start : start + batch_size]
        padded_N2 = np.array(ids_N2 + [(-1, 0)] * (batch_size - len(ids_N2)), np.int32)
        tokens_NT, lengths_N = _rows(prompts, padded_N2[:, 0], window=window, pad_id=pad_id)
        tokens_NT, finite = jax.device_get(
            _extend(
                params,
                tokens_NT,
                lengths_N,
                padded_N2,
                np.float32(temperature),
                np.int32(eos_id),
                jax.random.key(seed),
                config=config,
                steps=max_new_tokens,
                compute_dtype=jnp.dtype(compute_dtype).name,
                attention=attention,
            )
        )
        if not finite:
            raise ValueError(
                f"the model gives logits that are not finite for prompts {ids_N2[0][0]} to {ids_N2[-1][0]}; check that"
                f" its weights are finite and that they fit {jnp.dtype(compute_dtype).name}."
            )
        for (index, _), row, length in zip(ids_N2, tokens_NT.tolist(), lengths_N.tolist(), strict=False):
            completions[index].append(_until_eos(row[length : length + max_new_tokens], eos_id))
    return completions


@functools.partial(jax.jit, static_argnames=("config", "steps", "compute_dtype", "attention"))
def _extend(
    params: types.PyTree,
    tokens_NT: Int[Array, "N T"],
    lengths_N: Int[Array, " N"],
    ids_N2: Int[Array, "N 2"],
    temperature: Array,
    eos_id: Array,
    key: Key[Array, ""],
    *,
    config: models.ModelConfig,
    steps: int,
    compute_dtype: str,
    attention: attention_module.Selection | None,
) -> tuple[Int[Array, "N T"], Bool[Array, ""]]:
    """Write up to `steps` tokens behind every row, until all rows of length > 0 have ended.

    A row that has ended is written on with the others: what stands behind its first EOS means nothing.

    Returns:
        The rows, and whether all logits that were sampled from are finite.
    """
    positions_T = jnp.arange(tokens_NT.shape[1])
    head_VD = models.head(params, config=config).astype(compute_dtype)
    keys_N = jax.vmap(lambda ids: jax.random.fold_in(jax.random.fold_in(key, ids[0]), ids[1]))(ids_N2)

    def write(carry):
        count, tokens_NT, ended_N, finite = carry
        valid_NT = positions_T < (lengths_N + count)[:, None]
        with jax.named_scope("model"):
            hidden_NTD = models.hidden_states(
                params, tokens_NT, valid_NT, config=config, compute_dtype=compute_dtype, attention=attention
            )
        predictors_N11 = jnp.maximum(lengths_N + count - 1, 0)[:, None, None]
        hidden_ND = jnp.take_along_axis(hidden_NTD, predictors_N11, axis=1)[:, 0]
        with jax.named_scope("draw"):
            logits_NV = jnp.einsum(
                "ND,VD->NV",
                hidden_ND,
                head_VD,
                preferred_element_type=jnp.float32,
                precision=jax.lax.Precision.HIGHEST,
            )
            keys_now_N = jax.vmap(lambda row_key: jax.random.fold_in(row_key, count))(keys_N)
            noise_NV = jax.vmap(lambda row_key: jax.random.gumbel(row_key, logits_NV.shape[1:]))(keys_now_N)
            drawn_N = jnp.argmax(logits_NV + temperature * noise_NV, axis=-1)
        here_NT = positions_T == (lengths_N + count)[:, None]
        tokens_NT = jnp.where(here_NT, drawn_N[:, None].astype(tokens_NT.dtype), tokens_NT)
        finite &= jnp.all(jnp.isfinite(logits_NV) | ended_N[:, None])
        return count + 1, tokens_NT, ended_N | (drawn_N == eos_id), finite

    def unfinished(carry):
        count, _, ended_N, finite = carry
        return (count < steps) & ~jnp.all(ended_N) & finite

    _, tokens_NT, _, finite = jax.lax.while_loop(unfinished, write, (0, tokens_NT, lengths_N == 0, jnp.bool_(True)))
    return tokens_NT, finite


def _rows(prompts, indices_N: np.ndarray, *, window: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded rows [N, T] and their lengths [N]; an index of -1 gives an empty row."""
    tokens_NT = np.full((len(indices_N), window), pad_id, np.int32)
    lengths_N = np.zeros(len(indices_N), np.int32)
    for row, index in enumerate(indices_N):
        if index >= 0:
            lengths_N[row] = len(prompts[index])
            tokens_NT[row, : lengths_N[row]] = prompts[index]
    return tokens_NT, lengths_N


def _longest_prompt(prompts, *, config: models.ModelConfig, special: dict[str, int]) -> int:
    """Return the longest prompt's tokens, having checked every id."""
    if not prompts:
        raise ValueError("there is no prompt; give at least one.")
    for name, token in special.items():
        if not 0 <= token < config.vocab_size:
            raise ValueError(f"{name}={token} lies outside the model's vocabulary of {config.vocab_size} tokens.")
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {index} is empty; a prompt has at least one token, e.g. BOS.")
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise ValueError(
                f"prompt {index} holds ids from {min(prompt)} to {max(prompt)}, the model's vocabulary has"
                f" {config.vocab_size} tokens; use the tokenizer of this model."
            )
    return max(len(prompt) for prompt in prompts)


def _until_eos(tokens: list[int], eos_id: int) -> list[int]:
    return tokens[: tokens.index(eos_id) + 1] if eos_id in tokens else tokens
