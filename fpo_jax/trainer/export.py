"""A checkpoint of a run as a Hugging Face directory that transformers and vLLM read.

Config, generation config, tokenizer, chat template and the record of the prompt format are those of the training; an
export that transformers would render otherwise is refused. Weights go from the checkpoint to the directory one layer's
tensor at a time, so that a model larger than the host's memory can be exported.
"""

import dataclasses
import glob
import logging
import shutil
from pathlib import Path
from typing import Any

from fpo_jax import checkpoint, hf, models, tokenization
from fpo_jax.distributed import workdir_lock
from fpo_jax.io import atomic_io
from fpo_jax.models import params
from fpo_jax.trainer import adapters, model_card, run_inputs

log = logging.getLogger("fpo_jax")

DTYPES = ("float32", "bfloat16", "float16")


def export(
    workdir: Path,
    out: Path,
    *,
    step: int | str | None,
    dtype: str | None,
    lora: str = "merged",
    card: bool = False,
) -> str:
    """Write the directory and return one line that says what was written.

    Args:
        workdir: of the run.
        out: absent or empty directory.
        step: which checkpoint; "best" = the best one of a run with train.keep_best; None = the newest.
        dtype: of the weights on disk; None = the dtype in the config of the model the run started from.
        lora: of a run that trained an adapter: "merged" into the model it started from, or the "adapter" alone, as PEFT
            reads it.
        card: write a model card too, README.md: that of `fpo report` where the run has one, else a short one.

    Raises:
        ValueError: no such run or step, `out` in use or its disk too small, or weights that are not finite in `dtype`.
        OSError: the disk failed on the way; nothing is left behind.
    """
    if not workdir.is_dir():
        raise ValueError(f"{workdir} is not a directory; give the --workdir of a training run.")
    with workdir_lock.beside(out):
        for left in out.parent.glob(f".{glob.escape(out.name)}.partial*"):  # of exports that were killed
            shutil.rmtree(left)
        tree, meta = checkpoint.restore_params(workdir, step)
        line = _export(workdir, out, tree, meta, dtype=dtype, lora=lora)
        if card:
            library = "peft" if lora == "adapter" else "transformers"
            text = model_card.of_export(workdir, meta["config"], step=meta["step"], library=library)
            atomic_io.write(out / model_card.FILE, text)
        return line


def _export(workdir: Path, out: Path, tree: Any, meta: dict[str, Any], *, dtype: str | None, lora: str) -> str:
    config = models.from_hf_config(meta["hf_config"])
    if tokenization.prompt_format.read(Path(meta["model_dir"])) is None:
        log.warning(
            "%s keeps no record of its prompt format: it is older; template and tokenizer are the start model's",
            workdir,
        )
    if meta["config"].get("stage") == "reward":
        pad_id = run_inputs.reward_pad_id(tokenization.resolve(Path(meta["model_dir"])), config)
        config = dataclasses.replace(config, reward_head=True, pad_id=pad_id)
    dtype = dtype or _source_dtype(meta["hf_config"])
    adapter = adapters.of_settings(meta["config"].get("lora", {}), config)
    if lora == "adapter" and adapter is None:
        raise ValueError(f"{workdir} trained no adapter (lora.rank=0); leave --lora out.")
    if adapter is not None:
        if lora == "adapter":
            of_base = meta["config"]["model"]
            hf.write_peft(
                tree,
                config,
                adapter,
                out_dir=out,
                base_name=of_base["path"],
                revision=of_base["revision"] or None,
                source_dir=Path(meta["model_dir"]),
            )
            return f"{out}: adapter of rank {adapter.rank} over {len(adapter.targets)} matrices, step {meta['step']}"
        tree = hf.merged(tree, _base(meta), config, adapter)
    hf.export(tree, config, out_dir=out, source_dir=Path(meta["model_dir"]), dtype=dtype)
    return f"{out}: {config.family}, step {meta['step']}, {params.count(config):,} parameters in {dtype}"


def _base(meta: dict[str, Any]) -> Path:
    """Return the model that a run started from, whose weights its checkpoints do not hold."""
    path, revision = meta["config"]["model"]["path"], meta["config"]["model"]["revision"]
    base = hf.local_dir(path, revision=revision or None)
    if hf.weights_fingerprint(base) != meta["fingerprints"]["model"]:
        raise ValueError(f"the weights of {path} are not those that the adapter was trained on; put them back.")
    return base


def _source_dtype(config: dict[str, Any]) -> str:
    """Return the dtype of the source model; where its config does not say float32, of a quantised one bfloat16."""
    absent = "bfloat16" if config.get("quantization_config") else "float32"
    dtype = config.get("dtype") or config.get("torch_dtype") or absent
    if dtype not in DTYPES:
        raise ValueError(f"the source model's dtype {dtype!r} is not one of {', '.join(DTYPES)}; select with --dtype.")
    return dtype
