"""What fpo generate is asked: who answers which prompts, and how. Options and their check; nothing is done here."""

import dataclasses
from pathlib import Path

from fpo_jax import checkpoint, models, tokenization
from fpo_jax.cli import openai_client as servers
from fpo_jax.config import choices

DEDUP = ("none", "consecutive", "all")
# what means nothing to each place that answers may come from
_LOCAL = ("tokenizer", "chat_template", "eos_token", "auto_insert_empty_system", "prepend_bos", "max_length")
_LOCAL += ("batch_size", "compute_dtype", "tensor", "keep_ids")
_IDLE = {
    "model": ("concurrency", "server_api"),
    "workdir": ("revision", "concurrency", "server_api"),
    "server": ("revision", *_LOCAL),
}
# that an API does not carry, and the most that OpenAI takes
_NOT_CARRIED = {"vllm": (), "openai": ("top_k", "min_new_tokens", "stop_ids", "chat_template_kwargs")}
_OPENAI_TEMPERATURE, _OPENAI_STOPS = 2.0, 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answering:
    """Who answers, and how, whatever is asked. Paths and names as on the command line."""

    model: str = ""  # directory or hub name; or workdir, or server
    revision: str = ""
    workdir: str = ""  # of a training run
    step: str = ""  # of that run: a number, best, or "" = the newest
    server: str = ""  # URL up to /v1
    server_model: str = ""
    server_api: str = "vllm"  # which sampling fields are sent: vllm (all), or openai (those that OpenAI knows)
    api_key_env: str = ""
    concurrency: int = 16
    tokenizer: str = ""  # "" = the model's, as for all of the prompt format
    chat_template: str = ""
    chat_template_kwargs: str = ""  # JSON: {"enable_thinking": false}
    eos_token: str = ""
    auto_insert_empty_system: bool = False
    prepend_bos: bool = False
    max_length: int = 0  # prompt and completion; 0 = the model's window
    seed: int = 0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()  # besides the tokenizer's EOS and the model's
    stop_strings: tuple[str, ...] = ()  # a text ends before the one complete first, its ids with the token that did so
    batch_size: int = 64  # rows of a pass, per copy of the weights
    tensor: int = 1  # devices that share one copy of the weights
    compute_dtype: str = "bfloat16"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Answering):
    """What to answer, with what, and how."""

    out: Path
    data: str
    format: str = "prompts"
    split: str = ""
    rows: str = ""
    subfolder: str = ""
    data_revision: str = ""
    hh_split: str = "last_turn"
    rule: str = ""  # raw, chat, or "" = as the model was trained; chat where it has a template
    num_prompts: int = 0  # after deduplication; 0 = all
    dedup: str = "none"
    num_return: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    min_new_tokens: int = 0
    keep_ids: int = 0  # 1 = write the token ids too, `prompt_ids` and `ids`, as fpo kl needs them


def given(options: Answering, *, rule: str) -> tokenization.Given:
    """Return what was said of the prompt format."""
    return tokenization.Given(
        rule=rule,
        tokenizer=options.tokenizer,
        chat_template=options.chat_template,
        chat_template_kwargs=options.chat_template_kwargs,
        eos_token=options.eos_token,
        auto_insert_empty_system=options.auto_insert_empty_system,
        prepend_bos=options.prepend_bos,
    )


def check(options: Options) -> None:
    """Refuse options that contradict each other or do not apply.

    Raises:
        ValueError: all of them.
    """
    problems = []
    given = [name for name in ("model", "workdir", "server") if getattr(options, name)]
    if len(given) != 1:
        problems.append(f"give one of --model, --workdir and --server, not {' and '.join(given) or 'none'}")
    if options.step and not options.workdir:
        problems.append("--step belongs to --workdir")
    if options.server and not options.server_model:
        problems.append("--server needs --server-model, the model's name there")
    if not options.server and (options.server_model or options.api_key_env):
        problems.append("--server-model and --api-key-env belong to --server")
    problems += _problems_of_api(options) if options.server else []
    for kind in given if len(given) == 1 else ():
        wrong = [name for name in _IDLE[kind] if getattr(options, name) != getattr(Options, name)]
        if wrong:
            said = ", ".join(f"--{name.replace('_', '-')}" for name in wrong)
            problems.append(f"with --{kind}, {said} would change nothing; leave out what does not apply")
    if options.step not in ("", checkpoint.BEST) and not options.step.isdecimal():
        problems.append(f"--step={options.step!r} must be a number or {checkpoint.BEST}")
    if not 0 <= options.seed < 2**32:
        problems.append(f"--seed={options.seed} must lie in [0, 2**32)")
    problems += choices.problems_of("--rule", options.rule, ("", "raw", "chat"))
    if options.server and not options.rule:
        problems.append("--server needs --rule: chat asks for answers to conversations, raw for continuations of texts")
    if options.server and options.rule == "raw" and options.chat_template_kwargs:
        problems.append("--chat-template-kwargs belongs to --rule=chat")
    problems += choices.problems_of("--dedup", options.dedup, DEDUP)
    for name, least in (("num_prompts", 0), ("num_return", 1), ("batch_size", 1), ("concurrency", 1), ("tensor", 1)):
        if getattr(options, name) < least:
            problems.append(f"--{name.replace('_', '-')}={getattr(options, name)} must be at least {least}")
    if options.keep_ids not in (0, 1):
        problems.append(f"--keep-ids={options.keep_ids} must be 0 or 1")
    problems += choices.problems_of("--compute-dtype", options.compute_dtype, models.COMPUTE_DTYPES)
    if "" in options.stop_strings:
        problems.append("a stop string is empty")
    if problems:
        raise ValueError("; ".join(problems) + ".")


def _problems_of_api(options: Options) -> list[str]:
    api = options.server_api
    if problems := choices.problems_of("--server-api", api, servers.APIS):
        return problems
    if lost := [name for name in _NOT_CARRIED[api] if getattr(options, name) != getattr(Options, name)]:
        said, them = ", ".join(f"--{name.replace('_', '-')}" for name in lost), "it" if len(lost) == 1 else "them"
        problems.append(
            f"--server-api={api} cannot carry {said}; leave {them} out, or ask a vLLM with --server-api=vllm"
        )
    if api == "openai" and options.temperature > _OPENAI_TEMPERATURE:
        problems.append(f"--temperature={options.temperature} is above {_OPENAI_TEMPERATURE:g}, the highest of OpenAI")
    if api == "openai" and len(options.stop_strings) > _OPENAI_STOPS:
        problems.append(f"--stop-strings has {len(options.stop_strings)} stop strings, OpenAI takes {_OPENAI_STOPS}")
    return problems
