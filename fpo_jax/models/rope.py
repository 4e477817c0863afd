"""Rotary position embedding: a frozen description, its inverse frequencies, and the rotation of queries and keys.

    angle(t, p) = t * inverse_frequency(p),   pair (x_p, x_{p+P}) is turned by it,   p in [0, P)

P is the number of rotated pairs, half the rotated share of the head dimension. In some families pairs are neighbours,
(x_2p, x_2p+1). The scalings (linear, dynamic, llama3, yarn, longrope) change the inverse frequencies only; yarn and
longrope also scale cos and sin. Frequencies are float32 and computed in the
order in which transformers computes them, so that both agree to 2 units in the last place.
"""

import dataclasses
import math
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

# rope type -> (keys it needs, keys it may have), by Hugging Face's names
_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "longrope": (("short_factor", "long_factor", "original_max_position_embeddings"), ("factor", "attention_factor")),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}
# written by some published configs, read by no implementation
_WITHOUT_EFFECT = frozenset({"finetuned"})


@dataclasses.dataclass(frozen=True)
class Rope:
    """How positions turn queries and keys. The scaling fields keep Hugging Face's names; None = not used by `type`."""

    type: str = "default"
    theta: float = 10000.0  # base of the frequencies
    fraction: float = 1.0  # share of the head dimension that is rotated, from its start
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    short_factor: tuple[float, ...] | None = (
        None  # longrope: a divisor of each pair's frequency, in texts of the original length
    )
    long_factor: tuple[float, ...] | None = None  # the same in longer texts

    def __post_init__(self):
        """Raise ValueError naming every field that does not fit the type."""
        if self.type not in _KEYS:
            raise ValueError(f"rope type {self.type!r} is not supported; supported: {', '.join(_KEYS)}.")
        needed, optional = _KEYS[self.type]
        given = {name for name in SCALING_FIELDS if getattr(self, name) is not None}
        problems = [f"{name} is missing" for name in needed if name not in given]
        problems += [f"{name} has no meaning" for name in sorted(given - {*needed, *optional})]
        problems += [
            f"{name}={getattr(self, name)} must be finite"
            for name in SCALING_FIELDS
            if name not in _PER_PAIR
            and not abs(getattr(self, name) or 0) <= sys.float_info.max  # also an int that no float holds
        ]
        problems += [
            f"{name} must be a list of positive numbers"
            for name in _PER_PAIR
            if not all(type(one) in (int, float) and 0 < one <= sys.float_info.max for one in getattr(self, name) or ())
        ]
        if not 0 < self.theta <= sys.float_info.max:
            problems.append(f"rope_theta={self.theta} must be positive and finite")
        if not 0 < self.fraction <= 1:
            problems.append(f"the rotated share of the head dimension is {self.fraction}, it must lie in (0, 1]")
        if self.original_max_position_embeddings is not None and self.original_max_position_embeddings < 2:
            problems.append(
                f"original_max_position_embeddings={self.original_max_position_embeddings} must be at least 2"
            )
        if self.factor is not None and not self.factor >= 1:
            problems.append(f"factor={self.factor} must be at least 1")
        if problems:
            raise ValueError(f"rope type {self.type!r}: " + "; ".join(problems) + ".")


_PER_PAIR = ("short_factor", "long_factor")
SCALING_FIELDS = tuple(
    field.name for field in dataclasses.fields(Rope) if field.name not in ("type", "theta", "fraction")
)


def type_problems(record: type, values: Mapping[str, Any], *, names: Mapping[str, str]) -> list[str]:
    """Name the values that are not of the type of their field in a dataclass; an int passes for a float.

    Args:
        record: the dataclass.
        values: field -> value.
        names: field -> what the user calls it, where that differs.
    """
    problems = []
    for field in dataclasses.fields(record):
        union = isinstance(field.type, types.UnionType)
        allowed = typing.get_args(field.type) if union else (field.type,)
        allowed = tuple(typing.get_origin(kind) or kind for kind in allowed)  # of what a tuple holds, nothing is said
        accepted = (*allowed, int) if float in allowed else allowed
        if field.name in values and type(values[field.name]) not in accepted:
            wanted = " or ".join(
                "null" if kind is type(None) else str(getattr(kind, "__name__", kind)) for kind in allowed
            )
            problems.append(f"{names.get(field.name, field.name)}={values[field.name]!r} must be {wanted}")
    return problems


def from_hf(parameters: dict[str, Any], *, theta: Any, fraction: Any, original: Any) -> Rope:
    """Read a `rope_parameters` (transformers 5) or `rope_scaling` (transformers 4) dict, types checked here.

    Args:
        parameters: the dict; its own rope_theta and partial_rotary_factor come before the two arguments.
        theta: base given outside the dict.
        fraction: rotated share given outside the dict.
        original: original_max_position_embeddings, of the types that have one.

    Raises:
        ValueError: unknown type or key, missing key, wrong type or range.
    """
    values = {key: value for key, value in parameters.items() if value is not None and key not in _WITHOUT_EFFECT}
    kind = values.pop("rope_type", None)
    legacy = values.pop("type", None)
    kind = kind or legacy or "default"
    theta = values.pop("rope_theta", theta)
    fraction = values.pop("partial_rotary_factor", fraction)
    values |= {name: tuple(values[name]) for name in _PER_PAIR if isinstance(values.get(name), list)}
    if unknown := sorted(set(values) - set(SCALING_FIELDS)):
        raise ValueError(f"rope type {kind!r}: {', '.join(unknown)} is not supported.")
    names = {"theta": "rope_theta", "fraction": "partial_rotary_factor"}
    if kind == "dynamic":  # its window is max_position_embeddings, whatever stands here
        values.pop("original_max_position_embeddings", None)
    if kind in _KEYS and "original_max_position_embeddings" in _KEYS[kind][0]:
        values["original_max_position_embeddings"] = original
    if wrong := type_problems(Rope, values | {"theta": theta, "fraction": fraction}, names=names):
        raise ValueError(f"rope type {kind!r}: {'; '.join(wrong)}.")
    return Rope(type=kind, theta=theta, fraction=fraction, **values)


def to_hf(rope: Rope) -> dict[str, Any] | None:
    """Write the `rope_scaling` dict that both transformers 4 and 5 read; None for the plain embedding."""
    if rope.type == "default":
        return None
    scaling = {name: getattr(rope, name) for name in SCALING_FIELDS if getattr(rope, name) is not None}
    scaling |= {name: list(scaling[name]) for name in _PER_PAIR if name in scaling}
    return {"rope_type": rope.type, **scaling}


def rotated_pairs(rope: Rope, *, head_dim: int) -> int:
    """Return P, the pairs of dimensions that are rotated.

    Raises:
        ValueError: the rotated share is not an even, positive number of dimensions.
    """
    rotated = int(head_dim * rope.fraction)
    if rotated < 2 or rotated % 2:
        raise ValueError(
            f"rope rotates int(head_dim={head_dim} * {rope.fraction}) = {rotated} dimensions; it must be even and >= 2."
        )
    if rope.type == "dynamic" and rotated == 2:
        raise ValueError("dynamic rope needs more than 2 rotated dimensions: its exponent is dim / (dim - 2).")
    return rotated // 2


def check(rope: Rope, *, head_dim: int) -> None:
    """Check that the description fits heads of a size.

    Raises:
        ValueError: what rotated_pairs raises, or factors of longrope that are not one for each pair.
    """
    pairs = rotated_pairs(rope, head_dim=head_dim)
    for name in _PER_PAIR:
        factors = getattr(rope, name)
        if factors is not None and len(factors) != pairs:
            raise ValueError(f"{name} has {len(factors)} entries, and {pairs} pairs of dimensions are rotated.")


def depends_on_length(rope: Rope, *, longest: int) -> bool:
    """Whether texts of up to `longest` tokens are not all rotated by the same frequencies."""
    if rope.type == "longrope":
        return longest > (rope.original_max_position_embeddings or 0)
    return rope.type == "dynamic"


def rotation(
    rope: Rope,
    *,
    head_dim: int,
    max_positions: int,
    lengths_N: Int[jax.Array, " N"],
    positions_XT: Int[jax.Array, "X T"],
) -> tuple[Float[jax.Array, "Y T P"], Float[jax.Array, "Y T P"]]:
    """Return cos and sin of every angle.

    Dynamic scaling and longrope depend on how long the text is. Here that is the row's own number of valid tokens, so
    that neither padding nor the other rows of the batch change a row. transformers takes the padded length of the
    batch and, with dynamic scaling beyond max_position_embeddings, keeps the longest it has seen so far; both agree on
    a fresh model given one row without padding.

    Args:
        rope: the description.
        head_dim: C.
        max_positions: the config's max_position_embeddings.
        lengths_N: valid tokens of each row.
        positions_XT: of the tokens, from 0; one row for all, or one for each.

    Returns:
        cos and sin, float32, times the attention factor of yarn and longrope; [N, T, P] where frequencies depend on the
        row's length, else [X, T, P].
    """
    pairs = rotated_pairs(rope, head_dim=head_dim)
    if rope.type == "dynamic":
        frequencies_XP = _dynamic(rope, pairs, max_positions, lengths_N)
        magnitude = 1.0
    elif rope.type == "longrope":
        frequencies_XP, magnitude = _longrope(rope, pairs, max_positions, lengths_N, positions_XT.shape[1])
    else:
        frequencies_P, magnitude = inverse_frequencies(rope, pairs=pairs)
        frequencies_XP = jnp.asarray(frequencies_P)[None]
    angles_XTP = positions_XT.astype(jnp.float32)[:, :, None] * frequencies_XP[:, None, :]
    return jnp.cos(angles_XTP) * magnitude, jnp.sin(angles_XTP) * magnitude


def rotate(
    x_NTHC: Float[jax.Array, "N T H C"],
    cos_XTP: Float[jax.Array, "X T P"],
    sin_XTP: Float[jax.Array, "X T P"],
    *,
    interleaved: bool = False,
) -> Float[jax.Array, "N T H C"]:
    """Turn the first 2P dimensions of every head: p with p + P, interleaved 2p with 2p + 1.

    float32 inside, dtype kept.
    """
    pairs = cos_XTP.shape[-1]
    cos, sin = cos_XTP[:, :, None, :], sin_XTP[:, :, None, :]
    places = (
        (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)) if interleaved else (slice(pairs), slice(pairs, 2 * pairs))
    )
    first, second = (x_NTHC[..., place].astype(jnp.float32) for place in places)
    parts = [first * cos - second * sin, second * cos + first * sin]
    if interleaved:
        turned = jnp.stack(parts, axis=-1).reshape(*x_NTHC.shape[:-1], 2 * pairs)
    else:
        turned = jnp.concatenate(parts, axis=-1)
    return jnp.concatenate([turned.astype(x_NTHC.dtype), x_NTHC[..., 2 * pairs :]], axis=-1)


def inverse_frequencies(rope: Rope, *, pairs: int) -> tuple[Float[np.ndarray, " P"], float]:
    """Return the inverse frequencies (float32, radians per position) and the factor on cos and sin.

    For every type but dynamic and longrope, whose frequencies depend on the row.
    """
    exponents_P = np.arange(0, 2 * pairs, 2, dtype=np.float32) / np.float32(2 * pairs)
    periods_P = np.float32(rope.theta) ** exponents_P
    return _SCALINGS[rope.type](rope, periods_P)


def _default(rope: Rope, periods_P: np.ndarray) -> tuple[np.ndarray, float]:
    return np.float32(1) / periods_P, 1.0


def _linear(rope: Rope, periods_P: np.ndarray) -> tuple[np.ndarray, float]:
    return np.float32(1) / periods_P / np.float32(rope.factor), 1.0


def _llama3(rope: Rope, periods_P: np.ndarray) -> tuple[np.ndarray, float]:
    """Divide the slow frequencies by `factor`, keep the fast ones, and blend linearly in between."""
    assert rope.factor and rope.low_freq_factor and rope.high_freq_factor and rope.original_max_position_embeddings
    frequencies_P = np.float32(1) / periods_P
    turns_P = rope.original_max_position_embeddings * frequencies_P / np.float32(2 * math.pi)
    kept_P = (turns_P - rope.low_freq_factor) / np.float32(rope.high_freq_factor - rope.low_freq_factor)
    kept_P = np.clip(kept_P, 0, 1).astype(np.float32)
    return (1 - kept_P) * frequencies_P / np.float32(rope.factor) + kept_P * frequencies_P, 1.0


def _yarn(rope: Rope, periods_P: np.ndarray) -> tuple[np.ndarray, float]:
    """Blend interpolated and original frequencies by how often they turn within the original context.

    YaRN, arXiv 2309.00071; the defaults (beta 32 and 1, attention factor 0.1 ln(factor) + 1) are transformers'.
    """
    assert rope.factor and rope.original_max_position_embeddings
    pairs, context = len(periods_P), rope.original_max_position_embeddings

    def pair_of(turns: float) -> float:
        """Index of the pair that turns this often within the original context."""
        return pairs * math.log(context / (turns * 2 * math.pi)) / math.log(rope.theta)

    low, high = pair_of(rope.beta_fast or 32), pair_of(rope.beta_slow or 1)
    if rope.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    if low == high:
        high += 0.001
    interpolated_P = np.clip((np.arange(pairs, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    original_P = np.float32(1) - interpolated_P
    frequencies_P = (
        np.float32(1) / (np.float32(rope.factor) * periods_P) * (1 - original_P)
        + np.float32(1) / periods_P * original_P
    )
    return frequencies_P, _yarn_magnitude(rope)


def logit_factor(rope: Rope) -> float:
    """Return DeepSeek's factor on the attention logits: (0.1 mscale_all_dim ln(factor) + 1)^2 of yarn, 1 of others."""
    return _magnitude(rope, rope.mscale_all_dim) ** 2 if rope.mscale_all_dim else 1.0


def _magnitude(rope: Rope, weight: float) -> float:
    assert rope.factor is not None
    return 0.1 * weight * math.log(rope.factor) + 1.0


def _yarn_magnitude(rope: Rope) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _magnitude(rope, rope.mscale) / _magnitude(rope, rope.mscale_all_dim)
    return _magnitude(rope, 1.0)


_SCALINGS = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}


def _dynamic(rope: Rope, pairs: int, max_positions: int, lengths_N: jax.Array) -> jax.Array:
    """NTK-aware scaling [N, P]: the base grows with the row's length once that exceeds max_positions."""
    assert rope.factor is not None
    length_N = jnp.maximum(lengths_N, max_positions).astype(jnp.float32)
    stretch_N = rope.factor * length_N / max_positions - (rope.factor - 1)
    base_N = rope.theta * stretch_N ** (2 * pairs / (2 * pairs - 2))
    exponents_P = np.arange(0, 2 * pairs, 2, dtype=np.float32) / np.float32(2 * pairs)
    return 1.0 / base_N[:, None] ** exponents_P[None, :]


def _longrope(
    rope: Rope, pairs: int, max_positions: int, lengths_N: jax.Array, longest: int
) -> tuple[jax.Array, float]:
    """LongRoPE [X, P], arXiv 2402.13753: each pair has a divisor of its own, another one in long texts."""
    original, short, long = rope.original_max_position_embeddings, rope.short_factor, rope.long_factor
    assert original and short and long
    exponents_P = np.arange(0, 2 * pairs, 2, dtype=np.float32) / np.float32(2 * pairs)
    periods_P = np.float32(rope.theta) ** exponents_P
    short_P, long_P = (np.float32(1) / (np.asarray(factors, np.float32) * periods_P) for factors in (short, long))
    frequencies_XP = jnp.asarray(short_P)[None]
    if longest > original:
        frequencies_XP = jnp.where((lengths_N > original)[:, None], long_P, short_P)
    factor = max_positions / original if rope.factor is None else rope.factor
    magnitude = rope.attention_factor
    if magnitude is None:
        magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return frequencies_XP, magnitude
