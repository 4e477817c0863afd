"""Tokenised data kept on disk between starts: made by the first process that needs them, mapped by all others.

A folder is named by a digest of all that its rows depend on: the bytes of the sources, the tokenizer and the prompt
format, the configuration, the code and its libraries. So nothing is read that another start would have made otherwise,
and finding out takes no tokenising. Without `data.cache_dir`, sets whose sources have less than KEPT_FROM bytes are
made anew at every start: that takes seconds, and leaves nothing behind.
"""

import concurrent.futures
import hashlib
import logging
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import transformers

from fpo_jax import __version__, data, models, tokenization
from fpo_jax import config as configuration
from fpo_jax.data import dataset_folder, loading, worker_pool
from fpo_jax.data.dataset_folder import Dataset
from fpo_jax.io import atomic_io, json_digest, jsonl

log = logging.getLogger("fpo_jax")

KEPT_FROM = 2**24  # bytes of the sources
WAIT_S = 1.0  # between looks whether another process has finished
_SAID_EVERY_S = 60.0
# Every field of these sections is part of a folder's name but for those that change neither row nor audit: NO_PART.
SECTIONS = ("data.", "tokenizer.")
BEYOND = ("stage", "train.eval_groups")  # fields elsewhere that change rows
NO_PART = {
    "": ("data.cache_dir", "data.layout", "data.row_length", "data.shuffle", "data.last_batch"),
    "train": ("data.eval", "data.eval_split", "data.eval_rows", "train.eval_groups"),
    "eval": ("data.train", "data.train_split", "data.train_rows", "data.mixer", "data.decontaminate"),
}


class Source(NamedTuple):
    """The files of one source, or of one benchmark that the data are compared with."""

    name: str
    files: Sequence[Path]
    stats: Sequence[tuple[int, int]]  # bytes and time of each before it was read


def place(config: configuration.Config, workdir: Path | None) -> Path | None:
    """Return the folder of all data that are kept; None where nothing is."""
    if config.data.cache_dir:
        return Path(config.data.cache_dir).expanduser()
    return None if workdir is None else workdir / "data"


def sources(config: configuration.Config, name: str) -> list[Source] | None:
    """Return the files that the train or eval data are read from; None where they are not known.

    Raises:
        ValueError: a source that is not there, or has no file to read.
    """
    options = config.data
    entries = [(options[name], options[f"{name}_split"] or None)]
    extra: list[tuple[str, str | None]] = []
    if name == "train":
        if options.mixer:
            entries = [(part.source, part.split or None) for part in map(data.parse, options.mixer)]
        extra = [parts[:2] for parts in map(loading.entry, options.decontaminate) if parts]
    hub = {"data_dir": options.subfolder or None, "revision": options.revision or None}
    plain = {"data_dir": None, "revision": None}
    found = []
    for listed, where in ((entries, hub), (extra, plain)):
        for source, split in listed:
            files = loading.files(source, split=split, **where)
            if not files or not all(file.is_file() for file in files):
                return None
            found.append(Source(f"{source}@{split or ''}", files, _stats(files)))
    return found


def parts(
    config: configuration.Config,
    name: str,
    found: Sequence[Source],
    encoder: tokenization.Encoder,
    model_config: models.ModelConfig,
    *,
    reward_pad_id: int | None,
) -> dict[str, Any]:
    """Return what the rows of the train or eval data, and their audit, depend on."""
    left_out = {*NO_PART[""], *NO_PART[name]}
    fields = configuration.flatten(config.to_dict())
    files = [file for source in found for file in source.files]
    with concurrent.futures.ThreadPoolExecutor(worker_pool.cpus()) as threads:
        digests = iter(list(threads.map(_digest, files)))
    tokenizer = encoder.tokenizer
    folders = [Path(str(module.__file__)).parent for module in (data, tokenization)]
    code = [path for folder in folders for path in sorted(folder.glob("*.py"))] + [Path(jsonl.__file__)]
    return {
        "name": name,
        "sources": [[source.name, [[str(file), next(digests)] for file in source.files]] for source in found],
        "options": {
            field: value
            for field, value in fields.items()
            if (field.startswith(SECTIONS) or field in BEYOND) and field not in left_out
        },
        "tokenizer": json_digest.of(
            [
                encoder.backend.to_str(),
                tokenizer.backend_tokenizer.to_str(),
                {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
                [tokenizer.pad_token_id, encoder.eos_id, encoder.bos_id, encoder.adds_bos],
                encoder.format.as_dict(),
            ]
        ),
        "model": {"vocab_size": model_config.vocab_size, "reward_pad_id": reward_pad_id},
        "code": json_digest.of([[path.name, _digest(path)] for path in code]),
        "versions": {
            "fpo_jax": __version__,
            "tokenizers": tokenizers.__version__,
            "transformers": transformers.__version__,
        },
    }


def is_kept(config: configuration.Config, found: Sequence[Source] | None) -> bool:
    """Return whether data of these sources are kept."""
    if found is None:
        return False
    return bool(config.data.cache_dir) or sum(size for source in found for size, _ in source.stats) >= KEPT_FROM


def kept(
    folder: Path, name: str, of: dict[str, Any], found: Sequence[Source], make: Callable[[Path | None], Dataset]
) -> Dataset:
    """Return the data from their folder; make them first where they are not there, or damaged.

    Of several processes one makes them, and the others wait for it. On a disk that has no locks each makes its own.

    Args:
        folder: of all data that are kept.
        name: train or eval.
        of: from `parts`.
        found: the sources, which must not change meanwhile.
        make: makes the data, with a folder for what is large; that one becomes the folder of the data.

    Raises:
        ValueError: `make` does; a source changed while it was read; what was written is damaged when it is read.
    """
    target = folder / f"{name}-{json_digest.of(of)[:16]}"
    started, said, written = time.monotonic(), -math.inf, False
    while True:
        if target.exists():
            try:
                dataset = dataset_folder.read(target, of)
            except dataset_folder.Damaged as error:
                if written:
                    raise ValueError(
                        f"{error}, though it was just written; give data.cache_dir on another disk."
                    ) from None
                _set_aside(target, error)
                continue
            log.info("%s data: %s, verified after %.1f s", name, target, time.monotonic() - started)
            return dataset
        try:
            with atomic_io.writing_folder(target) as new:
                log.info("%s data: they are tokenised, and kept in %s", name, target)
                dataset_folder.write(new, make(new), of)
                for source in found:
                    if _stats(source.files) != source.stats:
                        raise ValueError(f"{source.name} changed while it was read; start again.")
            written = True
        except atomic_io.Lockless as error:
            log.warning("%s data: %s They are made for this process alone.", name, error)
            return make(None)
        except atomic_io.Taken:
            if time.monotonic() - said >= _SAID_EVERY_S:
                log.info("%s data: waiting for the process that writes %s", name, target)
                said = time.monotonic()
            time.sleep(WAIT_S)
        except ValueError:
            if not target.exists():  # else another process finished between our two looks
                raise


def _set_aside(target: Path, error: Exception) -> None:
    aside = target.with_name(f"{target.name}.damaged")
    log.warning("%s; it is set aside as %s, and the data are made anew", error, aside.name)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        target.rename(aside)
    except FileNotFoundError:  # another process saw it too
        return


def _stats(files: Sequence[Path]) -> list[tuple[int, int]]:
    return [(found.st_size, found.st_mtime_ns) for found in (file.stat() for file in files)]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
