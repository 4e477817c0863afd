"""ONE ENTRY PER PARAMETER: path, shape, logical axes, Hugging Face name, layout on disk, initialisation, weight decay.

Nothing else in the project names a parameter of a model. Layouts are spelled in the letters of types.py, a digit being
a literal size. `letters` is our array, stacked: "LDHC" = [L, D, H, C]. `hf_letters` is one layer's tensor on disk,
parentheses joining axes: "(HC)D" = [H*C, D]. Of a mixture of experts "LEDF" is stacked twice: a tensor on disk is one
expert's, or that of all experts of a layer. Where the first layers have an MLP and the others experts, each kind is a
stack of its own, "dense_layers" and "layers", and L is the length of the stack.

Letters used only here: P learned positions; J heads of queries, keys and values in a row; of latent attention Q the
rank of queries, Z that of keys and values, W = Z + the rotated key, M a value's head, Y = M + a key's unrotated head.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

from fpo_jax.models.config import ModelConfig

AXES = {
    "L": "layers",
    "D": "embed",
    "H": "heads",
    "G": "kv_heads",
    "C": "head_dim",
    "F": "mlp",
    "S": "mlp",
    "V": "vocab",
    "Q": "embed",  # unless there is a D
    "Z": "embed",
}
OF_EXPERTS = {"E": "experts", "D": "expert_embed"}  # of what each expert has for itself; other letters are whole
_NO_PARENTHESES = str.maketrans("", "", "()")
_OF_ATTENTION = (
    "query",
    "key",
    "value",
    "qkv",
    "query_down",
    "query_up",
    "kv_down",
    "kv_up",
    "out",
)  # matrices; the others are the MLP's


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter."""

    path: str  # "layers/attention/query": keys of the nested dict
    letters: str  # layout here
    hf_name: str  # "{layer}" stands for the layer's number, "{expert}" for the expert's
    hf_letters: str  # layout of one tensor on disk
    # "normal" (standard deviation config.initializer_range), "uniform" (1/sqrt(its inputs)), "ones", "zeros"; of an
    # adapter also "magnitude", the norms of its matrix, and "unit_normal"
    init: str
    decay: bool  # whether weight decay applies: matrices yes, norms and biases no
    shape: tuple[int, ...] = ()
    first_layer: int = 0  # number of the first layer of its stack
    axes: tuple[str | None, ...] = ()  # logical axes for sharding.py, None = every device holds all of it

    @property
    def stacked(self) -> bool:
        """Whether the parameter has a leading L axis."""
        return self.letters.startswith("L")

    @property
    def of_experts(self) -> bool:
        """Whether an E axis follows it, of matrices that lie on disk one by one."""
        return "{expert}" in self.hf_name

    @property
    def routed(self) -> bool:
        """Whether each expert has its part of it, of which a token meets those of its own experts."""
        return self.letters.startswith("LE") and len(self.letters) > 2  # "LE" is the router's bias

    @property
    def inner_letters(self) -> str:
        """Axes here of what is one tensor on disk: "DF" of "LDF" and of "LEDF" with experts."""
        return self.letters[self.stacked + self.of_experts :]

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Shape of a tensor on disk (of one layer where stacked, of one expert where there are experts)."""
        sizes = dict(zip(self.letters, self.shape, strict=True))
        return tuple(math.prod(sizes[letter] for letter in group) for group in groups(self.hf_letters))

    @property
    def disk_letters(self) -> str:
        """Axes of the tensor on disk, taken apart: "HCD" of "(HC)D"."""
        return self.hf_letters.translate(_NO_PARENTHESES)

    @property
    def disk_shape(self) -> tuple[int, ...]:
        """Shape of the tensor on disk, with joined axes taken apart."""
        sizes = dict(zip(self.letters, self.shape, strict=True))
        return tuple(sizes[letter] for letter in self.disk_letters)

    @property
    def size(self) -> int:
        """Number of values, of all layers."""
        return math.prod(self.shape)

    def tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        """Tensors on disk, by name and by place in our array: one, or one per layer, or per layer and expert."""
        return [
            (self.hf_name.format(**self._numbers(place)), place)
            for place in itertools.product(*map(range, self.shape[: self.stacked + self.of_experts]))
        ]

    def _numbers(self, place: tuple[int, ...]) -> dict[str, int]:
        numbers: dict[str, int] = {}
        for name, first, number in zip(("layer", "expert"), (self.first_layer, 0), place, strict=False):
            numbers[name] = first + number
        return numbers

    def hf_names(self) -> list[str]:
        """Names on disk: one, or one per layer, or one per layer and expert."""
        return [name for name, _ in self.tensors()]


def entries(config: ModelConfig) -> tuple[Entry, ...]:
    """Return the entries of a model, from the embedding to the head."""
    return _entries(config)


@functools.lru_cache(maxsize=32)
def _entries(config: ModelConfig) -> tuple[Entry, ...]:
    sizes = {
        "D": config.width,
        "H": config.heads,
        "G": config.kv_heads,
        "C": config.head_dim,
        "F": config.ffn,
        "E": config.experts,
        "S": config.shared_ffn,
        "V": config.vocab_size,
        "P": config.max_positions,
        "Q": config.query_rank or 0,
        "Z": config.kv_rank,
        "W": config.kv_rank + config.rope_dim,
        "M": config.value_dim,
        "Y": config.head_dim - config.rope_dim + config.value_dim,
        "J": config.heads + 2 * config.kv_heads,
    }
    found = []
    for entry in _table(config):
        stack = entry.path.partition("/")[0]
        numbers = config.stacks.get(stack, range(0))
        own = sizes | {"L": len(numbers)} | ({"F": config.dense_ffn} if stack == "dense_layers" else {})
        shape = tuple(own.get(letter) or int(letter) for letter in entry.letters)
        first = numbers.start if entry.stacked else 0
        found.append(dataclasses.replace(entry, shape=shape, first_layer=first, axes=_logical_axes(entry)))
    return tuple(found)


def ignored_hf_names(config: ModelConfig) -> frozenset[str]:
    """Return tensor names that published files hold and that carry no weights: rotary tables and causal masks."""
    return frozenset(
        template.format(layer=layer) for template in config.of_family.buffers for layer in range(config.layers)
    )


def hf_head_name(config: ModelConfig) -> str:
    """Return the head's name on disk; files of tied models may hold it as a copy of the embedding."""
    return f"{config.of_family.head}.weight"


def full_hf_name(name: str, config: ModelConfig) -> str:
    """Return a tensor's name with the prefix that the files of the first GPT-2 models leave out."""
    prefix = config.of_family.bare_prefix
    bare = prefix and not name.startswith((prefix, f"{config.of_family.head}.", "score."))
    return f"{prefix}{name}" if bare else name


def groups(letters: str) -> Iterator[str]:
    """Split "(HC)D" into "HC" and "D"."""
    while letters:
        group, letters = letters[1:].split(")", 1) if letters[0] == "(" else (letters[0], letters[1:])
        yield group


def _matrix(path: str, letters: str, hf_name: str, hf_letters: str) -> Entry:
    return Entry(path, letters, hf_name, hf_letters, init="normal", decay=True)


def _bias(path: str, letters: str, hf_name: str, hf_letters: str) -> Entry:
    return Entry(path, letters, hf_name, hf_letters, init="zeros", decay=False)


def _table(config: ModelConfig) -> list[Entry]:
    """List a decoder's parameters, from what its family's record says."""
    family = config.of_family
    table = [_matrix("embed", "VD", f"{family.embed}.weight", "VD")]
    if family.learned_positions:
        table.append(_matrix("positions", "PD", f"{family.positions}.weight", "PD"))
    for stack in config.stacks:
        table += _layer(config, stack)
    return [*table, *_norm(config, "final_norm", "D", family.final_norm), *_head(config)]


def _layer(config: ModelConfig, stack: str) -> list[Entry]:
    """List the parameters of the layers of a stack."""
    family, table = config.of_family, []
    of_mlp = family.dense_matrices if stack == "dense_layers" else family.matrices
    for part, matrices in (("attention", family.matrices), ("mlp", of_mlp)):
        table += _placed_norm(config, stack, f"{part}_norm")
        for name, on_disk in matrices.items():
            if (name in _OF_ATTENTION) == (part == "attention") and name not in _absent(config):
                table += _linear(config, f"{stack}/{part}/{name}", name, family.layer + on_disk)
        table += _placed_norm(config, stack, f"{part}_out_norm")
    if family.latent:
        latents = {"kv_norm": ("Z", "kv_a_layernorm")}
        if config.query_rank is not None:
            latents["query_norm"] = ("Q", "q_a_layernorm")
        for name, (letter, on_disk) in latents.items():
            hf_name = f"{family.layer}self_attn.{on_disk}"
            table += _norm(config, f"{stack}/attention/{name}", f"L{letter}", hf_name, letter)
    if family.query_key_norm is not None and config.query_key_norm:
        for name, heads in (("query", "H"), ("key", "G")):
            letters = f"L{heads}C" if "H" in family.query_key_norm else "LC"
            disk = f"({heads}C)" if family.query_key_norm == "HC" else letters.removeprefix("L")
            table += _norm(
                config, f"{stack}/attention/{name}_norm", letters, f"{family.layer}self_attn.{name[0]}_norm", disk
            )
    if family.sinks:
        name = f"{family.layer}self_attn.sinks"
        table.append(Entry(f"{stack}/attention/sinks", "LH", name, "H", init="normal", decay=False))
    return table


def _absent(config: ModelConfig) -> tuple[str, ...]:
    """Return the matrices of latent attention that this model does without."""
    if not config.of_family.latent:
        return ()
    return ("query_down", "query_up") if config.query_rank is None else ("query",)


def _norm(config: ModelConfig, path: str, letters: str, hf_name: str, disk: str = "D") -> list[Entry]:
    """A norm's scale, which starts at the value that leaves a normalised input as it is, and its bias."""
    init = "zeros" if config.of_family.norm.startswith("offset") else "ones"
    found = [Entry(f"{path}/scale", letters, f"{hf_name}.weight", disk, init=init, decay=False)]
    return (
        [*found, _bias(f"{path}/bias", letters, f"{hf_name}.bias", disk)] if config.of_family.norm == "layer" else found
    )


def _placed_norm(config: ModelConfig, stack: str, place: str) -> list[Entry]:
    """A layer's norm, where the family has one in that place."""
    family = config.of_family
    return _norm(config, f"{stack}/{place}", "LD", family.layer + family.norms[place]) if place in family.norms else []


def _linear(config: ModelConfig, path: str, name: str, hf_name: str) -> list[Entry]:
    """A matrix of a layer, and its bias where it has one."""
    family = config.of_family
    inputs, outputs = family.matrix(name)
    first, second = (_joined(inputs), _joined(outputs)) if family.transposed else (_joined(outputs), _joined(inputs))
    biased = name in config.biased
    if family.stacked_experts and name != "router" and name not in _OF_ATTENTION:
        on_disk = _joined(outputs[::-1])  # "F2": gate and up lie next to each other
        found = [_matrix(path, f"LE{inputs}{outputs}", hf_name, f"E{_joined(inputs)}{on_disk}")]
        bias = _bias(f"{path}_bias", f"LE{outputs}", f"{hf_name}_bias", f"E{on_disk}")
        return [*found, bias] if biased else found
    stacked = "LE" if "{expert}" in hf_name else "L"
    found = [_matrix(path, f"{stacked}{inputs}{outputs}", f"{hf_name}.weight", first + second)]
    return [*found, _bias(f"{path}_bias", f"L{outputs}", f"{hf_name}.bias", _joined(outputs))] if biased else found


def _joined(letters: str) -> str:
    """Return the axis on disk that holds these axes."""
    return letters if len(letters) == 1 else f"({letters})"


def _head(config: ModelConfig) -> list[Entry]:
    """What turns hidden states into what the model says, where that is not the embedding again."""
    if config.reward_head:  # starts as torch starts a linear layer
        return [Entry("score", "1D", "score.weight", "1D", init="uniform", decay=True)]
    return [] if config.tied_head else [_matrix("head", "VD", hf_head_name(config), "VD")]


def _logical_axes(entry: Entry) -> tuple[str | None, ...]:
    """Name the axes; a vector over D, Q or Z stays whole: cutting a few KiB saves nothing and costs a collective."""
    vector = len(entry.letters.removeprefix("L")) == 1
    whole = "DQZ" if vector else "QZ" if "D" in entry.letters else ""
    axes = AXES | OF_EXPERTS if entry.routed else AXES
    return tuple(None if letter in whole else axes.get(letter) for letter in entry.letters)
