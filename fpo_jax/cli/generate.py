"""Answer prompts with a model: `fpo generate --model DIR --data prompts.jsonl --out answers.jsonl`.

The model is a Hugging Face directory, a hub name, the newest (or any) checkpoint of a run, or whatever an
OpenAI-compatible server serves; the file that comes out is the same: one line per prompt with `prompt`, `completions`
and, for each completion, how it ended and how many tokens it has. A prompt that leaves no room for the answer loses its
beginning, as token ids, and is counted. The same command goes on where it was and does nothing when all is done.

A server is sent every sampling field, neutral ones too: vLLM fills what a request does not say from the model's
generation_config.json. --server-api openai sends what OpenAI knows.

Exit codes: 0 finished; 1 prompts are left that the server did not answer; 2 the input cannot be used; 75 stopped by a
signal with everything saved.
"""

import bisect
import collections
import contextlib
import dataclasses
import json
import logging
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import tqdm
from transformers import PreTrainedTokenizerFast

from fpo_jax import checkpoint, data, hf, models, sharding, tokenization
from fpo_jax import config as configuration
from fpo_jax.cli import args as command_line
from fpo_jax.cli import generate_args, jsonl_job
from fpo_jax.cli import openai_client as servers
from fpo_jax.cli.generate_args import Options, check
from fpo_jax.distributed import preemption, progress, workdir_lock
from fpo_jax.inference import sampler
from fpo_jax.io import json_digest, terminal
from fpo_jax.models import params

log = logging.getLogger("fpo_jax")


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a job did."""

    prompts: int
    done_before: int
    failed: int  # the server gave no answer
    cut: int  # prompts that lost their beginning
    completions: int
    tokens: int
    stopped: int  # completions that ended by themselves
    seconds: float

    @property
    def text(self) -> str:
        """In a few words."""
        if self.done_before == self.prompts:
            return f"{self.prompts} prompts, all done before"
        rate = f", {self.tokens / self.seconds:,.0f} tokens/s" if self.tokens else ""
        cut = f", {self.cut} prompts cut" if self.cut else ""
        ended = f", {self.stopped / self.completions:.0%} ended by themselves" if self.completions else ""
        return f"{self.prompts} prompts, {self.completions} new completions{ended}{cut}{rate}"


class _Prompt:
    """One prompt of the job, with its token ids where a model here answers it."""

    def __init__(self, index: int, record: data.Record):
        self.index, self.text, self.source, self.tools = index, record.prompt, record.source, record.tools
        self.ids: list[int] = []
        self.cut = 0


def run(options: Options) -> Summary:
    """Do what is not done.

    Raises:
        ValueError: an option, the data or the model cannot be used; the file belongs to another job, or another process
            writes it.
        preemption.Stopped: a signal; what was answered is saved.
    """
    decoding = _decoding(options, ())
    check(options)
    with workdir_lock.beside(options.out):
        if options.server:
            return _with_server(options, _prompts(options), decoding)
        return _with_model(options)


def _with_model(options: Options) -> Summary:
    source, config, load, fingerprint = _model(options)
    given = generate_args.given(options, rule=options.rule)
    encoder = tokenization.resolve(source, given, end_ids=hf.end_ids(source))
    tokenizer = encoder.tokenizer
    prompts = _prompts(options, tokenizer)
    log.info("prompt format: %s", encoder.format.text)
    for warning in tokenization.warnings(encoder):
        log.warning(warning)
    decoding = _decoding(options, encoder.format.end_ids)
    _refuse_special(options.stop_strings, tokenizer, decoding.stop_ids)
    window = options.max_length or config.max_positions
    if window > config.max_positions:
        raise ValueError(f"--max-length={window} exceeds the model's window of {config.max_positions} tokens.")
    room = window - decoding.max_new_tokens
    if room < 1:
        raise ValueError(f"--max-new-tokens={decoding.max_new_tokens} leaves no room for a prompt in {window} tokens.")
    if outside := [token for token in decoding.stop_ids if not 0 <= token < config.vocab_size]:
        raise ValueError(f"stop ids {outside} lie outside the model's vocabulary of {config.vocab_size} tokens.")
    layout, places = _placed(config, tensor=options.tensor)
    _tokenize(prompts, encoder, room)
    job = _job(options, prompts) | {"model": fingerprint(), "prompt_format": encoder.format.as_dict()}
    job |= {"stop_ids": list(decoding.stop_ids)}
    with jsonl_job.JobFile(options.out, job, count=len(prompts)) as file, preemption.StopRequest() as stop:
        left = _left(file, prompts)
        if not left:
            return _summary(file, prompts, left, seconds=0.0)
        started, bar = time.perf_counter(), _bar(left)

        def done(found: dict[int, list[list[int]]]) -> None:
            for place, completions in found.items():
                file.append(_line(left[place], completions, tokenizer, decoding, options))
            bar.update(len(found))
            if (asked := stop.agreed()) and len(file.done) < len(prompts):
                raise preemption.Stopped(f"{asked}: {len(file.done)} of {len(prompts)} prompts are answered and saved.")

        with bar, _fitting():
            sampler.sample(
                load(places),
                [prompt.ids for prompt in left],
                config=config,
                decoding=decoding,
                seed=options.seed,
                num_return=options.num_return,
                batch_size=options.batch_size * layout.data_parallel_degree,
                window=window,
                numbers=[prompt.index for prompt in left],
                compute_dtype=options.compute_dtype,
                layout=layout,
                done=done,
            )
        return _summary(file, prompts, left, seconds=time.perf_counter() - started)


@contextlib.contextmanager
def _fitting() -> Iterator[None]:
    """Say what to change where a device's memory does not suffice."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        fact = next(line for line in str(error).splitlines() if "RESOURCE_EXHAUSTED" in line)
        raise ValueError(
            f"the memory of a device does not suffice: {fact}. Lower --batch-size or --max-length, or cut the weights"
            " over more devices with --tensor."
        ) from error


def _placed(config: models.ModelConfig, *, tensor: int) -> tuple[sharding.Layout, Any]:
    """Lay out copies of the weights, each on `tensor` devices: cut over more, every token would gather them."""
    layout = sharding.make_layout(preset="multi_gpu", data=None, fsdp=None, tensor=tensor, devices=jax.devices())
    assert layout.mesh is not None
    return layout, params.shardings(config, mesh=layout.mesh)


def _with_server(options: Options, prompts: list[_Prompt], decoding: sampler.Decoding) -> Summary:
    if offering := next((prompt for prompt in prompts if prompt.tools), None):
        raise ValueError(
            f"{offering.source} offers tools, whose calls a server writes in a form of its own; give --model instead of"
            " --server, or take the column tools away."
        )
    ended = threading.Event()
    url, key = servers.checked_url(options.server), servers.Secret(options.api_key_env)
    server = servers.Server(url, options.server_model, key, ended)
    kwargs = tokenization.parse_kwargs(options.chat_template_kwargs)
    asked = servers.sampling_fields(
        options.server_api,
        max_tokens=decoding.max_new_tokens,
        temperature=decoding.temperature,
        n=options.num_return,
        top_p=decoding.top_p,
        top_k=decoding.top_k,
        min_tokens=decoding.min_new_tokens,
        stop=options.stop_strings,
        stop_token_ids=decoding.stop_ids,
    ) | ({"chat_template_kwargs": kwargs} if kwargs else {})
    job = _job(options, prompts) | {"rule": options.rule, "model": f"{options.server} {options.server_model}"}
    job |= {"server_api": options.server_api, "sent": asked}
    log.info("%s (server_api=%s) is sent %s", url, options.server_api, json.dumps(asked))

    async def answer(prompt: _Prompt) -> dict[str, Any] | str:
        text = prompt.text
        if options.rule == "chat" and isinstance(text, str):
            text = [{"role": "user", "content": text}]
        try:
            found = await server.completions(text, asked | {"seed": options.seed + prompt.index})
        except servers.Failed as error:
            return f"{prompt.source}: {error}"
        completions, ends = [text for text, _ in found], [end for _, end in found]
        return {**_head(prompt), "completions": completions, "finish": ends}

    with jsonl_job.JobFile(options.out, job, count=len(prompts)) as file, preemption.StopRequest() as stop:
        left = _left(file, prompts)
        started, failed = time.perf_counter(), 0
        with _bar(left) as bar:
            for found in servers.each(answer, left, workers=options.concurrency, ended=ended, asked=stop.agreed):
                bar.update(1)
                if isinstance(found, dict):
                    file.append(found)
                elif not ended.is_set():
                    failed += 1
                    log.warning("no answer: %s", found)
        if (name := stop.agreed()) and len(file.done) < len(prompts):
            raise preemption.Stopped(f"{name}: {len(file.done)} of {len(prompts)} prompts are saved.")
        return _summary(file, prompts, left, seconds=time.perf_counter() - started, failed=failed)


def _decoding(options: Options, ends: Sequence[int]) -> sampler.Decoding:
    return sampler.Decoding(
        options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_new_tokens=options.min_new_tokens,
        stop_ids=tuple(dict.fromkeys((*ends, *options.stop_ids))),
    )


def _prompts(options: Options, tokenizer: PreTrainedTokenizerFast | None = None) -> list[_Prompt]:
    """Read the prompts, leave out repeated ones, and number the rest."""
    rows = configuration.row_slice(options.rows)
    records = data.read(
        options.data,
        format=options.format,
        split=options.split or None,
        hh_split=options.hh_split,
        start=rows.start or 0,
        stop=rows.stop,
        data_dir=options.subfolder or None,
        revision=options.data_revision or None,
        tokenizer=tokenizer,
    )
    kept, seen, last = [], set(), None
    for record in records.rows:
        key = json.dumps([record.prompt, record.tools] if record.tools else record.prompt, sort_keys=True)
        repeated = {"none": False, "consecutive": key == last, "all": key in seen}[options.dedup]
        last = key
        seen.add(key)
        if not repeated:
            kept.append(_Prompt(len(kept), record))
    if not kept:
        raise ValueError(f"{options.data} has no prompt that can be used.")
    return kept[: options.num_prompts or None]


def _model(options: Options) -> tuple[Path, models.ModelConfig, Any, Any]:
    """Return where the tokenizer lies, the architecture, a function that loads the weights, and their fingerprint's."""
    dtype = options.compute_dtype
    if options.model:
        source = hf.local_dir(options.model, revision=options.revision or None)
        config = hf.read_config(source)
        _refuse_reward(config, source)

        def load(places):
            return hf.load_params(source, config, dtype=dtype, shardings=places)

        return source, config, load, lambda: hf.weights_fingerprint(source)
    step = None if not options.step else checkpoint.BEST if options.step == checkpoint.BEST else int(options.step)
    tree, meta = checkpoint.restore_params(Path(options.workdir), step)
    source = Path(meta["model_dir"])
    config = hf.read_config(source)
    if tokenization.prompt_format.read(Path(meta["model_dir"])) is None:
        log.warning(
            "%s keeps no record of its prompt format: it is older; template and tokenizer are the start model's",
            options.workdir,
        )
    if meta["config"]["lora"]["rank"]:
        raise ValueError(f"{options.workdir} trained an adapter; export it (fpo export) and give --model.")
    if meta["config"]["stage"] == "reward":
        raise ValueError(f"{options.workdir} trains a reward model, which writes no answers.")

    def place(leaf, where):
        return jax.make_array_from_callback(leaf.shape, where, lambda index: leaf[index].read().result().astype(dtype))

    digest = json_digest.of([meta["fingerprints"], meta["step"], meta["config"]])
    return source, config, lambda places: jax.tree.map(place, tree, places), lambda: digest


def _refuse_reward(config: models.ModelConfig, source: Path) -> None:
    if config.reward_head:
        raise ValueError(f"{source} is a reward model, which writes no answers.")


def _tokenize(prompts: list[_Prompt], encoder: tokenization.Encoder, room: int) -> None:
    """Give every prompt its ids; one too long loses its beginning, but for a BOS that the tokenizer itself adds."""
    try:
        texts, tools = [prompt.text for prompt in prompts], [prompt.tools for prompt in prompts]
        ids = tokenization.generation_prompts(encoder, texts, tools=tools)
    except ValueError:
        for prompt in prompts:  # to name the one that is at fault
            with configuration.about(prompt.source):
                tokenization.generation_prompts(encoder, [prompt.text], tools=[prompt.tools])
        raise
    for prompt, whole in zip(prompts, ids, strict=True):
        if not whole:
            raise ValueError(f"{prompt.source}: the prompt is empty; a model needs at least one token.")
        prompt.ids = tokenization.keep_end(encoder, whole, room=room)
        prompt.cut = len(whole) - len(prompt.ids)


def _job(options: Options, prompts: list[_Prompt]) -> dict[str, Any]:
    """Return everything that the answers depend on, but for the model."""
    digest = json_digest.of([[prompt.text, prompt.tools] if prompt.tools else prompt.text for prompt in prompts])
    kept = ("max_length", "num_return", "seed", "max_new_tokens", "temperature", "top_k")
    kept += ("top_p", "min_new_tokens", "stop_ids", "stop_strings", "compute_dtype", "keep_ids")
    return {"prompts": f"{len(prompts)} {digest}", **{name: getattr(options, name) for name in kept}}


def _left(file: jsonl_job.JobFile, prompts: list[_Prompt]) -> list[_Prompt]:
    """Return what is to be done, and say what was."""
    if file.repaired:
        log.info(file.repaired)
    if file.done:
        log.info("%s: %d of %d prompts are answered", file.path, len(file.done), len(prompts))
    return [prompt for prompt in prompts if prompt.index not in file.done]


def _head(prompt: _Prompt) -> dict[str, Any]:
    tools = {"tools": list(prompt.tools)} if prompt.tools else {}
    return {"index": prompt.index, "source": prompt.source, "prompt": prompt.text, **tools}


def _refuse_special(stops: Sequence[str], tokenizer: PreTrainedTokenizerFast, stop_ids: Sequence[int]) -> None:
    """Refuse a stop string that would stop nothing: a special token's spelling, unless its id is a stop id."""
    for stop in stops:
        token = tokenizer.get_vocab().get(stop)
        if token is not None and token not in stop_ids and tokenizer.decode([token], skip_special_tokens=True) == "":
            raise ValueError(
                f"the stop string {stop!r} is a special token, which no text holds; give its id, --stop-ids {token}."
            )


def _line(
    prompt: _Prompt,
    completions: list[list[int]],
    tokenizer: PreTrainedTokenizerFast,
    decoding: sampler.Decoding,
    options: Options,
) -> dict[str, Any]:
    """Return the line of one prompt."""
    ended = [_ended(tokenizer, prompt.ids, ids, decoding.stop_ids, options.stop_strings) for ids in completions]
    ids, texts, finish = (list(part) for part in zip(*ended, strict=True))
    line = {**_head(prompt), "completions": texts, "finish": finish, "tokens": [len(one) for one in ids]}
    line |= {"prompt_cut": prompt.cut} if prompt.cut else {}
    return line | ({"prompt_ids": prompt.ids, "ids": ids} if options.keep_ids else {})


def _ended(
    tokenizer: PreTrainedTokenizerFast,
    prompt: list[int],
    ids: list[int],
    stop_ids: Sequence[int],
    stops: Sequence[str],
) -> tuple[list[int], str, str]:
    """End a completion at a stop string, as if the sampler had looked for it after every token.

    The token that completes it was drawn and stays among the ids; the text ends before the stop string.

    Returns:
        (ids, text, finish); a text is what the ids, but for a stop token, add to the prompt's.
    """
    stopped = ids[-1] in stop_ids
    written = ids[:-1] if stopped else ids

    def place(count: int) -> int:
        """Where the first stop string begins in the text of the first tokens; -1 = none."""
        text = tokenization.continuation(tokenizer, prompt, written[:count])
        return min((found for stop in stops if (found := text.find(stop)) >= 0), default=-1)

    if stops and place(len(written)) >= 0:
        count = bisect.bisect_left(range(len(written)), True, key=lambda count: place(count) >= 0)
        return written[:count], tokenization.continuation(tokenizer, prompt, written[:count])[: place(count)], "stop"
    return ids, tokenization.continuation(tokenizer, prompt, written), "stop" if stopped else "length"


def _bar(left: list[_Prompt]) -> tqdm.tqdm:
    return progress.bar(total=len(left), unit="prompt", kept=True)


def _summary(
    file: jsonl_job.JobFile, prompts: list[_Prompt], left: list[_Prompt], *, seconds: float, failed: int = 0
) -> Summary:
    """Count what this start did to the prompts that were `left`; the file is finished if that was all."""
    fresh, indices = collections.Counter(), {prompt.index for prompt in left}
    for line in file.lines() if left else ():
        if line["index"] in indices:
            fresh["completions"] += len(line["completions"])
            fresh["stopped"] += line["finish"].count("stop")
            fresh["tokens"] += sum(line.get("tokens", ()))
    if not file.finished and len(file.done) == len(prompts):
        file.finish()
    cut = sum(prompt.cut > 0 for prompt in prompts)
    numbers = {name: fresh[name] for name in ("completions", "tokens", "stopped")}
    before = len(prompts) - len(left)
    return Summary(prompts=len(prompts), done_before=before, failed=failed, cut=cut, seconds=seconds, **numbers)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as the command line says; return the exit status."""
    return command_line.run(Options, _work, arguments, program="fpo generate", about=__doc__)


def _work(options: Options) -> int:
    summary = run(options)
    terminal.say(f"{options.out}: {summary.text}")
    if summary.failed:
        terminal.refuse("generate", f"{summary.failed} prompts without an answer; the same command asks again.")
    return int(summary.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
