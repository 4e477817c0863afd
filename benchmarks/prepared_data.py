"""Time and memory of a run's data: its first start, which tokenises, and a restart, which maps what the first one kept.

    python -m benchmarks.prepared_data --shape hh --rows SOURCE.jsonl.gz --tokenizer FILE --count 1000000 --folder F

Writes `count` records, those of the source over and over, each with a number in its prompt; then runs each phase in a
process of its own and prints a line of JSON for it:

    first      digest of the source, reading, tokenising, writing, reading back
    restart    digest of the source, verification, and the fingerprint as the trainer asks for it
    memory     without a folder: everything in memory at every start, as it is for small sets
    tiled      tokenises nothing: the rows of a first start of --of records are written --count / --of times, so that
               the restart of a million pairs can be measured without a first start of them
    datasets   `datasets.load_dataset` and `.map` alone, tokenising both completions in as many processes

`peak` is VmHWM of the process, mapped pages of files included, which several processes share; `anonymous` the peak of
RssAnon, sampled every 10 ms; `kib_a_pair` what that grew by. The folder is left for another start: remove it.
"""

import argparse
import gzip
import json
import multiprocessing
import os
import resource
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from fpo_jax import config as configuration
from fpo_jax import data, models, tokenization
from fpo_jax.data import dataset_folder, growing_array, tokenized, worker_pool
from fpo_jax.io import atomic_io, json_digest
from fpo_jax.trainer import dataset_cache, run_inputs

PHASES = ("first", "restart", "memory", "datasets")  # "tiled" is asked for
SHAPES = {
    "ultrafeedback": {"format": "chat_pairs", "rule": "chat", "max_length": 2048, "max_prompt_length": 1800},
    "hh": {"format": "hh", "rule": "raw", "max_length": 512, "max_completion_length": 256},
}


def records_of(options: argparse.Namespace) -> Path:
    """Return the file of the records, which are written unless they are there."""
    path = options.folder / f"{options.shape}-{options.count}.jsonl"
    if path.exists():
        return path
    with gzip.open(options.rows, "rt") as file:
        drawn = [json.loads(line) for line in file]
    with path.open("w") as file:
        for number in range(options.count):
            row = drawn[number % len(drawn)]
            if options.shape == "hh":
                row = {key: text.replace("Human: ", f"Human: {number}: ", 1) for key, text in row.items()}
            else:
                sides = {key: [dict(turn) for turn in row[key]] for key in ("chosen", "rejected")}
                for turns in sides.values():
                    turns[0]["content"] = f"{number}: {turns[0]['content']}"
                row = {**row, **sides}
            file.write(json.dumps(row) + "\n")
    return path


def config_of(options: argparse.Namespace, path: Path) -> configuration.Config:
    """Return a configuration that reads the records."""
    c = configuration.default()
    c.data.train, c.data.on_bad_row = str(path), "skip"
    c.tokenizer.path, c.tokenizer.eos_token = str(options.tokenizer), options.eos_token
    c.data.update(SHAPES[options.shape])
    return c


def readers(
    options: argparse.Namespace, path: Path, *, cache: bool
) -> tuple[configuration.Config, tokenization.Encoder, models.ModelConfig]:
    """Return what `run_inputs.read_data` takes."""
    c = config_of(options, path)
    c.data.cache_dir = str(options.folder / "cache") if cache else ""
    encoder = run_inputs.read_encoder(c, options.folder)
    model_config = models.ModelConfig(
        family="llama", vocab_size=len(encoder.tokenizer), width=8, layers=1, heads=1, kv_heads=1, head_dim=8, ffn=8,
        max_positions=4096, bos_id=1, eos_ids=(2,), pad_id=0, initializer_range=0.02,
    )  # fmt: skip
    return c, encoder, model_config


def tile(options: argparse.Namespace, path: Path) -> dict:
    """Write the folder of `count` records by repeating the rows of `of` records."""
    times = options.count // options.of
    few = argparse.Namespace(**{**vars(options), "count": options.of})
    train, _ = run_inputs.read_data(*readers(few, records_of(few), cache=True))
    c, encoder, model_config = readers(options, path, cache=True)
    found = dataset_cache.sources(c, "train")
    assert found is not None and times * options.of == options.count
    parts = dataset_cache.parts(c, "train", found, encoder, model_config, reward_pad_id=None)

    def repeated(places: Sequence[str]) -> tuple[str, ...]:
        return tuple(f"{path}:{number * options.of + line}" for number in range(times) for line in range(len(places)))

    def listed(reasons: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
        return {reason: repeated(places) for reason, places in reasons.items()}

    folder = options.folder / "cache" / f"train-{json_digest.of(parts)[:16]}"
    with atomic_io.writing_folder(folder) as new:
        tokens = growing_array.GrowingArray(new / dataset_folder.TOKENS)
        for _ in range(times):
            tokens.append(train.prepared.tokens_S)
        lengths_N = np.tile(train.prepared.lengths_N, times)
        prepared = train.prepared._replace(
            tokens_S=tokens.finish(),
            starts_N=tokenized.starts(lengths_N),
            lengths_N=lengths_N,
            prompt_lengths_N=np.tile(train.prepared.prompt_lengths_N, times),
            rewards_BK=np.tile(train.prepared.rewards_BK, (times, 1)),
            sources=repeated(train.prepared.sources),
        )
        audit = train.audit._replace(
            tokens=train.audit.tokens * times, dropped=listed(train.audit.dropped), noted=listed(train.audit.noted)
        )
        dataset_folder.write(new, data.Dataset(prepared, audit, train.sample), parts)
    return {"groups": prepared.groups}


def read(options: argparse.Namespace, path: Path, *, cache: bool) -> dict:
    """Read the data as a run does."""
    train, _ = run_inputs.read_data(*readers(options, path, cache=cache))
    found = {"groups": train.prepared.groups, "tokens": train.audit.tokens}
    return found | {"fingerprint": train.fingerprint()[:12]}


def map_alone(options: argparse.Namespace, path: Path) -> dict:
    """Tokenise with the library `datasets` alone, and nothing checked, cut or audited."""
    import datasets

    from benchmarks import prepared_data  # by this name its function is sent to processes by name

    c = config_of(options, path)
    tokenizer = run_inputs.read_encoder(c, options.folder).tokenizer

    cache = str(options.folder / "hf")
    table = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
    table = table.map(
        prepared_data.tokenise,
        batched=True,
        num_proc=worker_pool.cpus(),
        remove_columns=table.column_names,
        fn_kwargs={"tokenizer": tokenizer, "chat": options.shape != "hh"},
    )
    return {"groups": len(table)}


def tokenise(rows: dict, *, tokenizer: PreTrainedTokenizerFast, chat: bool) -> dict:
    """Return the tokens of both completions of some rows."""
    sides = {}
    for key in ("chosen", "rejected"):
        texts = rows[key]
        if chat:
            texts = [tokenizer.apply_chat_template(turns, tokenize=False) for turns in texts]
        sides[f"{key}_ids"] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return sides


def measured(options: argparse.Namespace, path: Path, phase: str) -> None:
    """Run one phase and print what it took."""
    peak = {"anonymous": 0}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak["anonymous"] = max(peak["anonymous"], _status("RssAnon"))

    watching = threading.Thread(target=watch)
    watching.start()
    baseline, start = _status("RssAnon"), time.perf_counter()
    if phase in ("datasets", "tiled"):
        found = (map_alone if phase == "datasets" else tile)(options, path)
    else:
        found = read(options, path, cache=phase != "memory")
    seconds = time.perf_counter() - start
    done.set()
    watching.join()
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    mib = 2**20
    report = {
        "phase": phase,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime, 1),
        "baseline_mib": baseline // mib,
        "peak_mib": _status("VmHWM") // mib,
        "anonymous_mib": peak["anonymous"] // mib,
        "kib_a_pair": round((peak["anonymous"] - baseline) / options.count / 1024, 2),
    }
    print(json.dumps(report | found), flush=True)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def main() -> int:
    """Measure what the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--rows", type=Path, required=True, help="gzipped JSON Lines to draw the records from")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--eos_token", default="")
    parser.add_argument("--count", type=int, default=60_000)
    parser.add_argument("--of", type=int, default=10_000, help="records of the first start whose rows are tiled")
    parser.add_argument("--folder", type=Path, required=True, help="for records and results; not removed")
    parser.add_argument("--phases", default=",".join(PHASES))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    path = records_of(options)
    print(json.dumps({"records": options.count, "bytes": path.stat().st_size, "cpus": worker_pool.cpus()}), flush=True)
    for phase in options.phases.split(","):
        process = multiprocessing.get_context("spawn").Process(target=measured, args=(options, path, phase))
        process.start()
        process.join()
        if process.exitcode:
            return process.exitcode
    return 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
