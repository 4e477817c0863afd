"""The frozen description of a decoder: what one checkpoint says, beside what `families` knows of all of its family."""

import dataclasses
import functools
import math
from typing import NamedTuple

from fpo_jax.models import activations, families, rope
from fpo_jax.models.rope import Rope

LARGEST = 2**31 - 1  # of any size: indices are int32
MOST_LAYERS = 10_000  # each has its own names and rows, so that the count is a length here and no mere number
FAMILIES = tuple(families.FAMILIES)


class LayerKind(NamedTuple):
    """What the attention of one layer has of its own."""

    window: int | None  # positions a query sees, itself included; None = all before it
    rope: Rope | None  # None = nothing is rotated


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One decoder's architecture; hashable, so that it can be a static argument of a jitted function."""

    family: str  # Hugging Face model_type, one of FAMILIES
    vocab_size: int  # V
    width: int  # D
    layers: int  # L
    heads: int  # H
    kv_heads: int  # G, divides H; equal to H for gpt_neox and gpt2
    head_dim: int  # C; need not be D / H
    ffn: int  # F
    max_positions: int  # longest text the model was trained for; dynamic rope scales beyond it
    activation: str = "silu"  # a key of activations.ACTIVATIONS
    norm_eps: float = 1e-5
    rope: Rope = dataclasses.field(default_factory=Rope)
    sliding_rope: Rope | None = None  # of the layers that slide; None = as the others
    sliding_window: int | None = None  # positions a query sees, itself included, in the layers that slide
    layer_types: tuple[str, ...] = ()  # of the first layers, which repeat, from families.LAYER_TYPES; () = the family's
    query_scale: float | None = None  # factor on the attention logits; None = head_dim**-0.5
    inverse_layer_scale: bool = False  # attention logits of layer n, from 1, are divided by n
    query_key_norm: bool = True  # whether queries and keys are normalised, in families that can
    attention_soft_cap: float | None = None  # bound on the magnitude of the attention logits
    final_soft_cap: float | None = None  # the same of the head's logits
    embedding_scale: float | None = None  # factor on the embeddings; None = as the family
    residual_scale: float | None = None  # factor on what attention and MLP add to the residual stream
    logit_scale: float | None = None  # factor on the logits of the LM head
    biases: tuple[str, ...] | None = None  # matrices of a layer that have one, sorted; None = the family's
    experts: int = 0  # E, in families that have them; `ffn` is then the width of one
    experts_per_token: int = 0  # that the router sends a token to
    shared_ffn: int = 0  # S, of the expert that sees every token
    normalize_top_k: bool = True  # whether the weights of a token's experts sum to one
    routed_scale: float = 1.0  # factor on the weights of a token's experts
    expert_groups: int = 1  # the experts of a token are in few groups of neighbours
    groups_per_token: int = 1  # that many: those with the most probable experts
    dense_layers: int = 0  # of the first layers, which have an MLP in the place of the experts
    dense_ffn: int = 0  # the width of that MLP
    rope_dim: int = 0  # of latent attention: dimensions of a query's or key's head that are rotated, of C
    value_dim: int = 0  # of latent attention: M, of a value's head, at most C
    kv_rank: int = 0  # Z, the width of the latent of keys and values
    query_rank: int | None = None  # Q, the same of queries; None = queries are not compressed
    router_aux_weight: float = 0.0  # of the load-balancing loss, in training
    router_aux_loss: bool = False  # whether the checkpoint asks for that loss
    router_z_weight: float = 0.0  # of the router z-loss, in training
    parallel_residual: bool = False  # attention and MLP read the same input, where the family leaves it open
    tied_head: bool = False  # the LM head is the embedding
    reward_head: bool = False  # a score of each position instead of an LM head
    initializer_range: float = 0.02  # standard deviation of fresh weights
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    dropout: tuple[tuple[str, float], ...] = ()  # (key of config.json, share) of what training drops there, never here

    @property
    def of_family(self) -> families.Family:
        """What all decoders of the family have."""
        return families.FAMILIES[self.family]

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kind of every layer."""
        return _kinds(self)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The sliding window of every layer."""
        return tuple(kind.window for kind in self.kinds)

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The different rotary embeddings of the layers."""
        return tuple(dict.fromkeys(kind.rope for kind in self.kinds if kind.rope is not None))

    @property
    def biased(self) -> tuple[str, ...]:
        """The matrices of a layer that have a bias."""
        return family_biases(self.of_family) if self.biases is None else self.biases

    @property
    def stacks(self) -> dict[str, range]:
        """The stacks of layers that have the same parameters, from the first, and the numbers of their layers."""
        first = {"dense_layers": range(self.dense_layers)} if self.dense_layers else {}
        return first | {"layers": range(self.dense_layers, self.layers)}

    @property
    def rotary_dim(self) -> int:
        """The dimensions of a head that the rotary embedding is given."""
        return self.rope_dim or self.head_dim

    @property
    def attention_scale(self) -> float:
        """The factor on the attention logits; of latent attention the square of yarn's magnitude is part of it."""
        if self.query_scale is not None:
            return self.query_scale
        return self.head_dim**-0.5 * (rope.logit_factor(self.rope) if self.of_family.latent else 1.0)

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP read the same input."""
        return self.parallel_residual or self.of_family.parallel

    @property
    def learned_positions(self) -> bool:
        """Whether positions are embedded and nothing is rotated."""
        return self.of_family.learned_positions

    def rotation_depends_on_length(self, longest: int) -> bool:
        """Whether texts of up to `longest` tokens are rotated by frequencies that depend on how long they are."""
        return any(rope.depends_on_length(one, longest=longest) for one in self.ropes)

    def __post_init__(self):
        """Raise ValueError naming every field that is out of range or unsupported."""
        if problems := _problems(self):
            raise ValueError(f"unsupported {self.family} model: " + "; ".join(problems) + ".")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Low-rank additions to a decoder's matrices (LoRA, arXiv 2106.09685): y = x W + scale dropout(x) A B."""

    rank: int  # r
    alpha: float
    dropout: float
    # paths of the matrices that have one, from params.adapter
    targets: tuple[str, ...]
    rslora: bool = False  # rank-stabilised (arXiv 2312.03732)
    dora: bool = False  # weight-decomposed (arXiv 2402.09353): y = m / |W + scale A B| * (x W + scale dropout(x) A B)
    saved: tuple[str, ...] = ()  # paths of the parameters that are trained whole beside them
    quantised: tuple[str, ...] = ()  # paths of the frozen matrices that are held in four bits (models.nf4)

    @property
    def scale(self) -> float:
        """Factor on A B: alpha / rank, rank-stabilised alpha / sqrt(rank)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def family_biases(family: families.Family) -> tuple[str, ...]:
    """Return the matrices that have a bias where config.json says nothing."""
    by_key = [name for key, names in family.bias_keys.items() if family.absent_biases.get(key) for name in names]
    return tuple(sorted({*family.biases, *by_key}))


def expanded(layer_types: tuple[str, ...], layers: int) -> tuple[str, ...]:
    """Repeat the types of the first layers over all of them."""
    return tuple(layer_types[layer % len(layer_types)] for layer in range(layers))


@functools.lru_cache(maxsize=64)
def _kinds(config: ModelConfig) -> tuple[LayerKind, ...]:
    kinds = {}
    for name in families.LAYER_TYPES:
        slides = name in (families.SLIDING, families.SLIDING_UNROTATED)
        rotates = name in (families.FULL, families.SLIDING) and not config.learned_positions
        own = config.sliding_rope if slides and config.sliding_rope is not None else config.rope
        kinds[name] = LayerKind(config.sliding_window if slides else None, own if rotates else None)
    return tuple(kinds[name] for name in expanded(config.layer_types or config.of_family.layer_types, config.layers))


# fields that say nothing of most families, and their value then
_OPTIONAL = {
    field.name: field.default
    for field in dataclasses.fields(ModelConfig)
    if field.name
    in (
        "sliding_rope",
        "sliding_window",
        "layer_types",
        "query_scale",
        "inverse_layer_scale",
        "query_key_norm",
        "attention_soft_cap",
        "final_soft_cap",
        "embedding_scale",
        "residual_scale",
        "logit_scale",
        "experts",
        "experts_per_token",
        "shared_ffn",
        "normalize_top_k",
        "routed_scale",
        "expert_groups",
        "groups_per_token",
        "dense_layers",
        "dense_ffn",
        "rope_dim",
        "value_dim",
        "kv_rank",
        "query_rank",
        "router_aux_weight",
        "router_aux_loss",
        "router_z_weight",
        "parallel_residual",
    )
}
_FACTORS = ("query_scale", "attention_soft_cap", "final_soft_cap", "embedding_scale", "residual_scale", "logit_scale")


def _meaningful(family: families.Family) -> set[str]:
    """Return the optional fields that a family knows."""
    known = {*family.keys, *family.extra}
    if family.hf_layer_types:
        known.add("layer_types")
    if family.sliding_theta is not None:
        known.add("sliding_rope")
    return known


def _problems(config: ModelConfig) -> list[str]:
    sizes = ("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "ffn", "max_positions")
    problems = [f"{name}={getattr(config, name)} must be positive" for name in sizes if getattr(config, name) < 1]
    problems += [
        f"{name}={getattr(config, name)} is beyond the largest that is supported, {most}"
        for name, most in {**dict.fromkeys(sizes, LARGEST), "layers": MOST_LAYERS}.items()
        if getattr(config, name) > most
    ]
    problems += [
        f"{name}={getattr(config, name)} must be 0 or larger, and finite"
        for name in ("norm_eps", "initializer_range")
        if not 0 <= getattr(config, name) < math.inf
    ]
    if config.activation not in activations.ACTIVATIONS:
        problems.append(f"activation {config.activation!r} is none of {', '.join(activations.ACTIVATIONS)}")
    if config.sliding_window is not None and config.sliding_window < 1:
        problems.append(f"sliding_window={config.sliding_window} must be positive or None")
    if config.family not in FAMILIES:
        return [*problems, f"family {config.family!r} is none of {', '.join(FAMILIES)}"]
    family = config.of_family
    known = _meaningful(family)
    problems += [
        f"{name}{f'={value}' if value is not True else ''} has no meaning for {config.family}"
        for name, default in _OPTIONAL.items()
        if (value := getattr(config, name)) != default and name not in known
    ]
    if config.rope.fraction != 1 and not family.partial_rotary:
        problems.append(
            f"partial_rotary_factor={config.rope.fraction} has no meaning for {config.family}: transformers rotates"
            " whole heads all the same, others do not"
        )
    if config.reward_head and family.reward_architecture is None:
        problems.append(f"a reward head, for which transformers has no class of {config.family}")
    if problems:
        return problems
    if family.gating and config.activation != "silu":
        return [f"activation={config.activation} has no meaning for {config.family}"]
    return [
        *_factors(config),
        *_names(config, family),
        *_latent(config, family),
        *_heads(config, family),
        *_mixture(config, family),
    ]


def _factors(config: ModelConfig) -> list[str]:
    return [
        f"{name}={value} must be positive and finite, or None"
        for name in _FACTORS
        if (value := getattr(config, name)) is not None and not 0 < value < math.inf
    ]


def _names(config: ModelConfig, family: families.Family) -> list[str]:
    problems = [
        f"layer type {name!r} is none of {', '.join(families.LAYER_TYPES)}"
        for name in dict.fromkeys(config.layer_types)
        if name not in families.LAYER_TYPES
    ]
    if config.biases is not None:
        optional = {name for names in family.bias_keys.values() for name in names}
        wrong = sorted(set(config.biases) - {*family.biases, *optional} | set(family.biases) - set(config.biases))
        problems += [f"a bias of {name} is not optional in {config.family}" for name in wrong]
    return problems


def _mixture(config: ModelConfig, family: families.Family) -> list[str]:
    if family.mlp != "moe":
        return []
    problems = [
        f"{name}={getattr(config, name)} must be between 1 and {LARGEST}"
        for name in ("experts", "experts_per_token", "shared_ffn")
        if name in family.keys and not 1 <= getattr(config, name) <= LARGEST
    ]
    if config.experts_per_token > config.experts:
        problems.append(f"a token has {config.experts_per_token} experts, and there are {config.experts}")
    problems += [
        f"{name}={getattr(config, name)} must be 0 or larger, and finite"
        for name in ("router_aux_weight", "router_z_weight")
        if not 0 <= getattr(config, name) < math.inf
    ]
    if family.dense_matrices and not 0 <= config.dense_layers < config.layers:
        problems.append(f"dense_layers={config.dense_layers} must be at least 0 and less than layers={config.layers}")
    if config.dense_layers and not 1 <= config.dense_ffn <= LARGEST:
        problems.append(f"dense_ffn={config.dense_ffn} must be between 1 and {LARGEST}")
    if not 0 < config.routed_scale < math.inf:
        problems.append(f"routed_scale={config.routed_scale} must be positive and finite")
    groups, kept = config.expert_groups, config.groups_per_token
    if groups < 1 or config.experts % groups:
        problems.append(f"expert_groups={groups} does not divide {config.experts} experts")
    elif not 1 <= kept <= groups or kept * (config.experts // groups) < config.experts_per_token:
        problems.append(
            f"groups_per_token={kept} of {groups} groups of {config.experts // groups} experts do not hold"
            f" {config.experts_per_token} experts of a token"
        )
    return problems


def _latent(config: ModelConfig, family: families.Family) -> list[str]:
    if not family.latent:
        return []
    problems = [
        f"{name}={value} must be between 1 and {LARGEST}"
        for name in ("rope_dim", "value_dim", "kv_rank", "query_rank", "shared_ffn")
        if (value := getattr(config, name)) is not None and not 1 <= value <= LARGEST
    ]
    if config.kv_heads != config.heads:
        problems.append(f"{config.family} has as many key/value heads as heads, {config.heads}, not {config.kv_heads}")
    if config.rope_dim >= config.head_dim:
        problems.append(f"rope_dim={config.rope_dim} leaves nothing of head_dim={config.head_dim} unrotated")
    if config.value_dim > config.head_dim:
        problems.append(
            f"value_dim={config.value_dim} is more than the head_dim of queries and keys, {config.head_dim}"
        )
    if config.shared_ffn % config.ffn:
        problems.append(f"shared_ffn={config.shared_ffn} is not a multiple of ffn={config.ffn}")
    return problems


def _heads(config: ModelConfig, family: families.Family) -> list[str]:
    problems = []
    if config.heads % config.kv_heads:
        problems.append(f"{config.heads} query heads are not a multiple of {config.kv_heads} key/value heads")
    if family.kv_heads_are_heads and (config.kv_heads, config.head_dim * config.heads) != (config.heads, config.width):
        problems.append(f"{config.family} has kv_heads = heads and head_dim = width / heads")
    elif family.square_heads and config.head_dim * config.heads != config.width:
        problems.append(f"{config.family} has head_dim = width / heads")
    for one in () if config.learned_positions or problems else config.ropes:
        try:
            rope.check(one, head_dim=config.rotary_dim)
        except ValueError as error:
            problems.append(str(error).rstrip("."))
    return problems
