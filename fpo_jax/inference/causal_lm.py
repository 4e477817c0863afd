"""A language model as a Flax module with its weights: for a notebook, a script, or a training loop of your own.

    model = fpo_jax.CausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct", dtype="bfloat16")
    logits = nnx.jit(lambda model, tokens: model(tokens))(model, tokens)

The trainer keeps parameters as a plain tree and merges them with the same modules inside its jitted steps, because
nnx's own traversal costs time in every step.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from fpo_jax import hf, models, sharding, types
from fpo_jax.distributed import workdir_lock
from fpo_jax.inference import sampler
from fpo_jax.models import params, transformer


class CausalLM(transformer.Decoder):
    """A causal language model of any family: its parameters are `nnx.Param`s, layers stacked on a leading axis."""

    def __init__(
        self,
        config: models.ModelConfig,
        *,
        rngs: nnx.Rngs | None = None,
        dtype: jax.typing.DTypeLike = "float32",
        mesh: Mesh | None = None,
        parameters: types.PyTree | None = None,
    ):
        """Draw fresh parameters, or hold those that are given.

        Args:
            config: the architecture, as `models.from_hf_config` reads it.
            rngs: its stream `params` draws them.
            dtype: of the parameters.
            mesh: from `sharding.make_mesh`; parameters are drawn where they live. None = the default device.
            parameters: in the place of fresh ones; they lie where `mesh` says already.

        Raises:
            ValueError: the mesh does not divide a parameter; neither `rngs` nor `parameters`.
        """
        super().__init__(config)
        self.layout, self._source = sharding.Layout(mesh), ""
        if parameters is None:
            if rngs is None:
                raise ValueError(
                    "a model needs rngs to draw its parameters; give rngs=nnx.Rngs(0), or from_pretrained."
                )
            places = _places(config, mesh)
            parameters = jax.jit(lambda key: params.init(config, key, dtype), out_shardings=places)(rngs.params())
        assert parameters is not None
        state = nnx.state(self, nnx.Param)
        nnx.replace_by_pure_dict(state, parameters)
        nnx.update(self, state)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        mesh: Mesh | None = None,
        dtype: jax.typing.DTypeLike = "float32",
        revision: str | None = None,
    ) -> "CausalLM":
        """Read a Hugging Face model directory, or a hub name, layer by layer onto its devices.

        Args:
            name_or_path: a directory with safetensors, or a hub name.
            mesh: as for the constructor.
            dtype: of the parameters; cast once, from the dtype on disk.
            revision: commit of a hub name.

        Raises:
            ValueError: no such model, or one that is not supported; every problem at once.
        """
        source = hf.local_dir(name_or_path, revision=revision)
        config = hf.read_config(source)
        weights = hf.load_params(source, config, dtype=dtype, shardings=_places(config, mesh))
        model = cls(config, mesh=mesh, parameters=weights)
        model._source = str(source)
        return model

    def __call__(
        self, tokens_NT: Int[jax.Array, "N T"], valid_NT: Bool[jax.Array, "N T"] | None = None, **options
    ) -> Float[jax.Array, "N T V"]:
        """Return the logits of every position, float32; arguments as those of `hidden_states`.

        They take N·T·V numbers, which training avoids: see `fpo_jax.logprobs`.
        """
        hidden_NTD = self.hidden_states(tokens_NT, valid_NT, **options)
        N, T, D = hidden_NTD.shape
        logits_NV = models.logits(self.parameters(), hidden_NTD.reshape(N * T, D), config=self.config)
        return logits_NV.reshape(N, T, -1)

    def hidden_states(
        self,
        tokens_NT: Int[jax.Array, "N T"],
        valid_NT: Bool[jax.Array, "N T"] | None = None,
        *,
        compute_dtype: jax.typing.DTypeLike | None = None,
        remat: str = "none",
    ) -> Float[jax.Array, "N T D"]:
        """Return the hidden states after the final norm.

        Args:
            tokens_NT: token ids, right-padded.
            valid_NT: True = a real token; None = all of them.
            compute_dtype: of matmul operands and the result; None = that of the parameters.
            remat: what the backward pass recomputes: none, dots or full.
        """
        weights = self.parameters()
        return models.hidden_states(
            weights,
            tokens_NT,
            jnp.ones(tokens_NT.shape, bool) if valid_NT is None else valid_NT,
            config=self.config,
            compute_dtype=weights["embed"].dtype if compute_dtype is None else compute_dtype,
            remat=remat,
            layout=self.layout,
        )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        seed: int = 0,
        num_return: int = 1,
    ) -> list[list[list[int]]]:
        """Draw `num_return` completions of every prompt: token ids, with the end token where the model wrote one.

        `inference.sampler.sample` has more options.
        """
        stop = self.config.eos_ids
        decoding = sampler.Decoding(max_new_tokens, temperature=temperature, stop_ids=stop)
        return sampler.sample(
            self.parameters(),
            prompts,
            config=self.config,
            decoding=decoding,
            seed=seed,
            num_return=num_return,
            layout=self.layout,
        )

    def save_pretrained(self, directory: Path | str, *, dtype: jax.typing.DTypeLike | None = None) -> None:
        """Write a model directory that transformers and vLLM read, with the tokenizer of the one that was read.

        Args:
            directory: absent or empty.
            dtype: of the weights on disk; None = that of the parameters.

        Raises:
            ValueError: the directory is in use, or a weight is not finite in `dtype`.
        """
        weights = self.parameters()
        of_disk = weights["embed"].dtype if dtype is None else dtype
        with tempfile.TemporaryDirectory() as folder:
            source = Path(self._source or folder)
            if not self._source:
                (source / "config.json").write_text(json.dumps(models.to_hf_config(self.config)))
            with workdir_lock.beside(Path(directory), option="directory"):
                hf.export(weights, self.config, out_dir=Path(directory), source_dir=source, dtype=of_disk)

    def parameters(self) -> types.PyTree:
        """Return the parameters as the nested dict that the functions of `fpo_jax.models` take."""
        return nnx.to_pure_dict(nnx.state(self, nnx.Param))


def _places(config: models.ModelConfig, mesh: Mesh | None) -> types.PyTree | None:
    return None if mesh is None else params.shardings(config, mesh=mesh)
