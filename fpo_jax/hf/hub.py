"""A Hugging Face model directory as files: found or fetched, its config, its companions.

A directory is a stranger's: no code in it is ever run, whatever `auto_map` or `*.py` it has (the models are our own,
the weights safetensors), no file is read through a link that leaves it, and no JSON beyond LARGEST_JSON. Archives are
no format here: there is nothing to unpack.
"""

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.errors

from fpo_jax import models
from fpo_jax.io import terminal
from fpo_jax.tokenization import prompt_format

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
# what besides the weights makes a model directory complete
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates",
    prompt_format.FILE,
)
_DOWNLOADS = [SINGLE, "model-*.safetensors", INDEX, *COMPANIONS, "additional_chat_templates/*"]
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_SHARD = re.compile(r"[\w.-]+\.safetensors")
LARGEST_JSON = 2**24  # bytes; an index of 100,000 tensors has half of it, and a Python list can take 20 times its text
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def local_dir(name_or_path: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """Return a local model directory; a hub name is downloaded to the hub cache first (no pickles, no code).

    Args:
        name_or_path: an existing directory, or a hub name such as "EleutherAI/pythia-70m".
        revision: hub commit, tag or branch; None = main. Only a hub name has one.

    Raises:
        ValueError: neither a directory nor reachable, a revision for a directory, no safetensors inside, a link that
            leaves the directory.
    """
    path = _fetched(name_or_path, revision, _DOWNLOADS)
    check_links(path)
    weight_files(path)
    return path


def adapter_dir(name_or_path: str | os.PathLike[str]) -> Path:
    """Return the local directory of an adapter that PEFT, or an export here, wrote; a hub name is downloaded first.

    Args:
        name_or_path: an existing directory, or a hub name.

    Raises:
        ValueError: neither a directory nor reachable, no adapter inside, a link that leaves the directory.
    """
    path = _fetched(name_or_path, None, [ADAPTER_CONFIG, ADAPTER, *COMPANIONS, "additional_chat_templates/*"])
    check_links(path)
    for name in (ADAPTER_CONFIG, ADAPTER):
        if not (path / name).is_file():
            raise ValueError(
                f"{path} has no {name}; give a directory that PEFT's save_pretrained or fpo export --lora adapter"
                " wrote, with safetensors."
            )
    return path


def _fetched(name_or_path: str | os.PathLike[str], revision: str | None, patterns: Sequence[str]) -> Path:
    """Return the directory, or that of the hub's cache."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"{path} is a local directory, revision={revision!r} has no meaning; leave it out.")
    elif not _HUB_NAME.fullmatch(str(name_or_path)):
        raise ValueError(f"{name_or_path} is not a directory; give a model directory or a hub name such as org/name.")
    else:
        try:
            path = Path(
                huggingface_hub.snapshot_download(str(name_or_path), revision=revision, allow_patterns=list(patterns))
            )
        except (OSError, huggingface_hub.errors.HFValidationError) as error:
            at = "" if revision is None else f" at revision {revision}"
            raise ValueError(
                f"{name_or_path} is no directory here and could not be fetched from the hub{at}"
                f" ({type(error).__name__}: {terminal.first_line(error)}); check the spelling, the network, HF_TOKEN"
                " for gated models, or download it elsewhere and give its directory."
            ) from error
    return path


def check_links(directory: Path) -> None:
    """Check that every file that is read or copied lies in the directory; the hub's cache links to its own blobs.

    Raises:
        ValueError: a link to somewhere else or to a directory, or what is no regular file.
    """
    root = directory.resolve()
    homes = [root]
    if root.parent.name == "snapshots":
        homes.append((root.parents[1] / "blobs").resolve())
    for pattern in (*COMPANIONS, "*.safetensors", INDEX, ADAPTER_CONFIG):
        for top in directory.glob(pattern):
            for path in [top, *(top.rglob("*") if top.is_dir() else ())]:
                target = path.resolve()
                if not any(target.is_relative_to(home) for home in homes) or (path.is_symlink() and path.is_dir()):
                    raise ValueError(
                        f"{path} is a link to {target}, which is not a file of this directory; give the directory that"
                        " holds the files, or copy them."
                    )
                if path.exists() and not (path.is_file() or path.is_dir()):
                    raise ValueError(f"{path} is no regular file; fetch the directory again.")


def read_config(directory: Path) -> models.ModelConfig:
    """Read config.json.

    Raises:
        ValueError: missing, broken or unsupported.
    """
    return models.from_hf_config(read_json(directory / "config.json"))


def left_out(directory: Path) -> str:
    """Say what else than its language model a multimodal checkpoint holds; empty for any other.

    Raises:
        ValueError: config.json is missing or broken.
    """
    return models.left_out(read_json(directory / "config.json"))


def copy_companions(source_dir: Path, target_dir: Path, *, leave_out: Sequence[str] = ()) -> None:
    """Copy config, generation config, tokenizer files, chat templates and prompt format into an existing directory."""
    left_out = {path for pattern in leave_out for path in source_dir.glob(pattern)}
    for path in sorted({path for pattern in COMPANIONS for path in source_dir.glob(pattern)} - left_out):
        if path.is_dir():
            shutil.copytree(path, target_dir / path.name)
        else:
            shutil.copyfile(path, target_dir / path.name)


def check_vocabulary(tokenizer_size: int, config: models.ModelConfig) -> None:
    """Check that every id of the tokenizer has an embedding; a larger embedding is normal (Pythia: 50,304 for 50,277).

    Args:
        tokenizer_size: len(tokenizer), added tokens included.
        config: the architecture.

    Raises:
        ValueError: the tokenizer is larger than the model.
    """
    if tokenizer_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer_size} tokens, the model {config.vocab_size} embeddings; use the tokenizer"
            " of this model, without added tokens."
        )


def weight_files(directory: Path) -> list[Path]:
    """List the safetensors files that make up the weights; shards named by the index may turn out to be missing.

    Raises:
        ValueError: no safetensors, pickles only, both a single file and an index, or a broken index.
    """
    single, index = directory / SINGLE, directory / INDEX
    if single.exists() and index.exists():
        raise ValueError(f"{directory} has both {SINGLE} and {INDEX}; remove the one that is not meant.")
    if single.exists():
        return [single]
    if index.exists():
        names = set(_weight_map(index).values())
        if outside := sorted(name for name in names if Path(name).name != name or name == ".."):
            raise ValueError(f"{index} names files outside its directory: {', '.join(outside)}.")
        if others := sorted(name for name in names if not _SHARD.fullmatch(name)):
            raise ValueError(f"{index} names files that are no safetensors: {', '.join(map(repr, others))}.")
        return [directory / name for name in sorted(names)]
    if pickles := sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern)):
        raise ValueError(
            f"{directory} has weights only as pickles ({', '.join(pickles)}), which run code when read and are refused;"
            " convert them to safetensors first."
        )
    raise ValueError(f"{directory} has neither {SINGLE} nor {INDEX}; give a directory with safetensors weights.")


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} has no weight_map from tensor names to file names; fetch it again.")
    return weight_map


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the file is missing, too large, nested too deeply, not JSON (NaN is none), or no object.
    """
    try:
        if (size := path.stat().st_size) > LARGEST_JSON:
            raise ValueError(f"{size:,} bytes, and at most {LARGEST_JSON:,} are read")
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object.")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def dumps(content: dict[str, Any]) -> str:
    """Return JSON as Hugging Face lays it out."""
    return json.dumps(content, indent=2) + "\n"
