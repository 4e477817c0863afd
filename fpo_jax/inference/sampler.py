"""Draw completions from a model: params and token-id prompts in, token-id completions out.

    prompts ──prefill──► cache, K rows per prompt ──► (one token per row ──► cache) until all rows ended

A prompt is run once for all of its returns. Shapes are static: prompts are padded to one of a few lengths, and a
batch has a fixed number of rows, so that there is one compilation per length. Each of the K returns has a copy of the
prompt's keys and values: attention then reads one array, at K times the memory of the prompts' part. Rows are cut over
the devices of a mesh, as in training. Text is not this module's business: tokenize before, decode after.
"""

import dataclasses
import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from fpo_jax import attention as attention_module
from fpo_jax import models, sharding, types

log = logging.getLogger("fpo_jax")

SHORTEST = 16  # length below which prompts are not told apart


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How tokens are drawn; hashable, a static argument under jit."""

    max_new_tokens: int  # of a completion, the stop token included
    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # the k most probable tokens alone; 0 = off
    top_p: float = 1.0  # the fewest most probable tokens that together have this probability; 1 = off
    min_new_tokens: int = 0  # that come before a stop token, at least
    stop_ids: tuple[int, ...] = ()  # tokens that end a completion

    def __post_init__(self):
        """Raise ValueError with everything that is out of range."""
        problems = []
        if self.max_new_tokens < 1:
            problems.append(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            problems.append(f"temperature={self.temperature} must be finite and at least 0; 0 is greedy decoding")
        if self.top_k < 0:
            problems.append(f"top_k={self.top_k} must be at least 0; 0 is off")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p={self.top_p} must lie in (0, 1]; 1 is off")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            problems.append("temperature=0 is greedy, where top_k and top_p change nothing; leave them out")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            problems.append(
                f"min_new_tokens={self.min_new_tokens} must lie between 0 and max_new_tokens={self.max_new_tokens}"
            )
        if problems:
            raise ValueError("; ".join(problems) + ".")


def sample(
    params: types.PyTree,
    prompts: Sequence[Sequence[int]],
    *,
    config: models.ModelConfig,
    decoding: Decoding,
    seed: int,
    num_return: int = 1,
    batch_size: int = 64,
    window: int | None = None,
    numbers: Sequence[int] | None = None,
    compute_dtype: jax.typing.DTypeLike = "float32",
    attention: attention_module.Selection | None = None,
    layout: sharding.Layout = sharding.ONE_DEVICE,
    done: Callable[[dict[int, list[list[int]]]], None] | None = None,
) -> list[list[list[int]]]:
    """Draw `num_return` completions to every prompt from softmax(logits / temperature), cut to top-k and top-p.

        token_t = argmax_v (logits[v] / temperature + g[v]),  g = Gumbel noise of (seed, prompt's number, return, t)

    which is an exact draw from the softmax (the Gumbel-max identity), and greedy decoding at temperature 0. The noise
    depends on the prompt's number and on the return's alone, so the completions do not depend on batch_size, on the
    order or on the other prompts, and more returns leave the first ones as they were. Another batch_size, mesh or
    number of returns is another program, which may round differently; the other prompts and their order change not a
    bit, as a prompt is padded by its own length alone.

    Args:
        params: the model's parameters.
        prompts: token ids of each prompt, BOS included where the model wants one; at least one token each.
        config: the architecture.
        decoding: how tokens are drawn.
        seed: of all noise, in [0, 2**32).
        num_return: completions per prompt, >= 1.
        batch_size: rows of a pass, over all devices; the last batch is filled up to it.
        window: positions of a row, prompt and completion, at most; None = the model's.
        numbers: what stands for each prompt in the noise, in [0, 2**31); None = 0, 1, 2, ...
        compute_dtype: of the forward pass and of the cache; logits and noise are float32.
        attention: as for model.hidden_states.
        layout: where rows and heads live on a mesh; `params` lie there already.
        done: called with {index: completions} of every batch of prompts as soon as they have them all; in any order.

    Returns:
        completions[p][r]: token ids without the prompt, the stop token included as the last one where the model wrote
        one; a completion without it was cut at max_new_tokens.

    Raises:
        ValueError: an option, an id or a length outside its range, or logits that are not finite.
    """
    longest = _longest_prompt(prompts, config=config, stop_ids=decoding.stop_ids)
    for name, value in (("num_return", num_return), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    if batch_size % layout.data_parallel_degree:
        raise ValueError(
            f"batch_size={batch_size} is not divisible by {layout.data_parallel_degree} devices; use a multiple."
        )
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} must lie in [0, 2**32).")
    window = config.max_positions if window is None else window
    needed = longest + decoding.max_new_tokens
    if not needed <= window <= config.max_positions:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens={decoding.max_new_tokens} need {needed} positions,"
            f" window={window} and the model has {config.max_positions}; shorten the prompts, lower max_new_tokens, or"
            " choose a window between the two."
        )
    for one in config.ropes:
        if one.type == "longrope" and needed > (one.original_max_position_embeddings or 0):
            raise ValueError(
                f"a prompt of {longest} tokens and max_new_tokens={decoding.max_new_tokens} need {needed} positions,"
                f" and beyond {one.original_max_position_embeddings} the rotary frequencies (rope type 'longrope') of"
                " all positions change while a text is written; shorten the prompts or lower max_new_tokens."
            )
    numbers = range(len(prompts)) if numbers is None else numbers
    together = min(num_return, max(1, batch_size // layout.data_parallel_degree))  # returns of a prompt in one pass
    per_pass = max(
        layout.data_parallel_degree, batch_size // together // layout.data_parallel_degree * layout.data_parallel_degree
    )  # prompts
    lengths = _lengths(window - decoding.max_new_tokens)
    padded = [next(length for length in lengths if length >= len(prompt)) for prompt in prompts]
    completions: list[list[list[int]]] = [[] for _ in prompts]
    run = functools.partial(
        _respond,
        config=config,
        decoding=decoding,
        returns=together,
        compute_dtype=jnp.dtype(compute_dtype).name,
        attention=attention,
        layout=layout,
    )
    for length, indices in _batches(padded, per_pass):
        tokens_PT, lengths_P = _rows([prompts[index] for index in indices], rows=per_pass, length=length)
        numbers_P = np.array([numbers[index] for index in indices] + [0] * (per_pass - len(indices)), np.int32)
        for first in range(0, num_return, together):
            placed = (tokens_PT, lengths_P, numbers_P)
            if layout.mesh is not None:
                placed = jax.device_put(placed, sharding.batch_sharding(layout.mesh, stacked=False))
            drawn_PKT, finite_P = jax.device_get(run(params, *placed, np.int32(first), jax.random.key(seed)))
            if not finite_P.all():
                bad = [numbers[index] for index, finite in zip(indices, finite_P, strict=False) if not finite]
                raise ValueError(
                    f"the model gives logits that are not finite for prompts {sorted(bad)}; check that its weights are"
                    f" finite and that they fit {jnp.dtype(compute_dtype).name}."
                )
            for index, drawn_KT in zip(indices, drawn_PKT.tolist(), strict=False):
                rows = drawn_KT[: num_return - first]
                completions[index] += [_until_stop(row, decoding.stop_ids) for row in rows]
        if done is not None:
            done({index: completions[index] for index in indices})
    return completions


@functools.partial(jax.jit, static_argnames=("config", "decoding", "returns", "compute_dtype", "attention", "layout"))
def _respond(
    params: types.PyTree,
    tokens_PT: Int[Array, "P T"],
    lengths_P: Int[Array, " P"],
    numbers_P: Int[Array, " P"],
    first: Int[Array, ""],
    key: Key[Array, ""],
    *,
    config: models.ModelConfig,
    decoding: Decoding,
    returns: int,
    compute_dtype: str,
    attention: attention_module.Selection | None,
    layout: sharding.Layout,
) -> tuple[Int[Array, "P K S"], Bool[Array, " P"]]:
    """Write completions until all rows of length > 0 have ended, or one has logits that are not finite.

    Returns:
        The new tokens, of which those behind a stop token mean nothing, and for which prompts all logits that were
        sampled from are finite.
    """
    steps = decoding.max_new_tokens
    hidden_ND, cache = models.prefill(
        params,
        tokens_PT,
        lengths_P,
        config=config,
        compute_dtype=compute_dtype,
        positions=tokens_PT.shape[1] + steps,
        returns=returns,
        attention=attention,
        layout=layout,
    )
    lengths_N = jnp.repeat(lengths_P, returns)
    keys_P = jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers_P)
    returns_K = first + jnp.arange(returns)
    keys_N = jax.vmap(lambda one: jax.vmap(lambda number: jax.random.fold_in(one, number))(returns_K))(keys_P)
    keys_N = keys_N.reshape(-1)
    drawn_NS = jnp.zeros((lengths_N.shape[0], steps), jnp.int32)

    def draw(count, hidden_ND):
        with jax.named_scope("draw"):
            logits_NV = models.logits(params, hidden_ND, config=config)
            keys_now_N = jax.vmap(lambda row_key: jax.random.fold_in(row_key, count))(keys_N)
            return _draw(logits_NV, keys_now_N, count, decoding), jnp.all(jnp.isfinite(logits_NV), axis=-1)

    def write(carry):
        count, drawn_NS, ended_N, sound_N, hidden_ND, cache = carry
        tokens_N, finite_N = draw(count, hidden_ND)
        sound_N &= finite_N | ended_N
        drawn_NS = jax.lax.dynamic_update_slice_in_dim(drawn_NS, tokens_N[:, None], count, axis=1)
        ended_N |= jnp.isin(tokens_N, jnp.array(decoding.stop_ids, jnp.int32))
        hidden_ND, cache = models.decode(
            params, tokens_N, lengths_N + count, cache, config=config, compute_dtype=compute_dtype, layout=layout
        )
        return count + 1, drawn_NS, ended_N, sound_N, hidden_ND, cache

    def unfinished(carry):
        count, _, ended_N, sound_N, *_ = carry
        return (count < steps) & ~jnp.all(ended_N) & jnp.all(sound_N)

    start = (jnp.int32(0), drawn_NS, lengths_N == 0, jnp.ones_like(lengths_N, bool), hidden_ND, cache)
    _, drawn_NS, _, sound_N, *_ = jax.lax.while_loop(unfinished, write, start)
    found = drawn_NS.reshape(-1, returns, steps), jnp.all(sound_N.reshape(-1, returns), axis=1)
    if layout.mesh is None:
        return found
    # every process reads all of it
    return jax.lax.with_sharding_constraint(found, sharding.replicated(layout.mesh))


def _draw(logits_NV: Float[Array, "N V"], keys_N, count, decoding: Decoding) -> Int[Array, " N"]:
    """Draw one token per row."""
    if decoding.min_new_tokens and decoding.stop_ids:
        stops_V = jnp.isin(jnp.arange(logits_NV.shape[1]), jnp.array(decoding.stop_ids))
        logits_NV = jnp.where(stops_V & (count < decoding.min_new_tokens), -jnp.inf, logits_NV)
    if decoding.temperature == 0:
        return jnp.argmax(logits_NV, axis=-1).astype(jnp.int32)
    logits_NV = _cut(logits_NV / decoding.temperature, top_k=decoding.top_k, top_p=decoding.top_p)
    noise_NV = jax.vmap(lambda key: jax.random.gumbel(key, logits_NV.shape[1:]))(keys_N)
    return jnp.argmax(logits_NV + noise_NV, axis=-1).astype(jnp.int32)


def _cut(logits_NV: Float[Array, "N V"], *, top_k: int, top_p: float) -> Float[Array, "N V"]:
    """Rule out what is not among the k most probable tokens, and then what a share of top_p can do without.

    The token that reaches top_p stays; ties with the last one that stays do too.
    """
    if top_k and top_k < logits_NV.shape[1]:
        least_N1 = jax.lax.top_k(logits_NV, top_k)[0][:, -1:]
        logits_NV = jnp.where(logits_NV < least_N1, -jnp.inf, logits_NV)
    if top_p < 1:
        sorted_NV = jnp.sort(logits_NV, axis=-1, descending=True)
        probabilities_NV = jax.nn.softmax(sorted_NV, axis=-1)
        before_NV = jnp.cumsum(probabilities_NV, axis=-1) - probabilities_NV
        least_N1 = jnp.min(jnp.where(before_NV < top_p, sorted_NV, jnp.inf), axis=-1, keepdims=True)
        logits_NV = jnp.where(logits_NV < least_N1, -jnp.inf, logits_NV)
    return logits_NV


def _batches(padded: Sequence[int], size: int) -> Iterator[tuple[int, Sequence[int]]]:
    """Yield (length, indices) of at most `size` prompts that are padded to the same length, the shortest first.

    >>> list(_batches([32, 16, 32, 32], 2))
    [(16, [1]), (32, [0, 2]), (32, [3])]
    """
    order = sorted(range(len(padded)), key=padded.__getitem__)
    for length, group in itertools.groupby(order, padded.__getitem__):
        indices = list(group)
        log.info("sampling: %d prompts of up to %d tokens, %d at a time", len(indices), length, size)
        for start in range(0, len(indices), size):
            yield length, indices[start : start + size]


def _rows(prompts: Sequence[Sequence[int]], *, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded rows and their lengths; those that fill a batch up are empty."""
    tokens_PT, lengths_P = np.zeros((rows, length), np.int32), np.zeros(rows, np.int32)
    for row, prompt in enumerate(prompts):
        lengths_P[row] = len(prompt)
        tokens_PT[row, : len(prompt)] = prompt
    return tokens_PT, lengths_P


def _lengths(longest: int) -> list[int]:
    """Return the lengths that prompts are padded to: powers of two, and the longest.

    >>> _lengths(100)
    [16, 32, 64, 100]
    """
    powers = [SHORTEST << k for k in range(32) if SHORTEST << k < longest]
    return [*powers, longest]


def _longest_prompt(prompts, *, config: models.ModelConfig, stop_ids: Sequence[int]) -> int:
    """Return the longest prompt's tokens, having checked every id."""
    if not prompts:
        raise ValueError("there is no prompt; give at least one.")
    for token in stop_ids:
        if not 0 <= token < config.vocab_size:
            raise ValueError(f"stop id {token} lies outside the model's vocabulary of {config.vocab_size} tokens.")
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {index} is empty; a prompt has at least one token, e.g. BOS.")
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise ValueError(
                f"prompt {index} holds ids from {min(prompt)} to {max(prompt)}, the model's vocabulary has"
                f" {config.vocab_size} tokens; use the tokenizer of this model."
            )
    return max(len(prompt) for prompt in prompts)


def _until_stop(tokens: list[int], stop_ids: Sequence[int]) -> list[int]:
    ends = [place for place, token in enumerate(tokens) if token in stop_ids]
    return tokens[: ends[0] + 1] if ends else tokens
