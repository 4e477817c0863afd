"""What stands beside the weights of a model: config, generation config, tokenizer, chat template, prompt format.

A run keeps them as it was trained, so that its export, and whoever samples from it, does what the training did:

    start model's files + the run's encoder ──write──► directory ──check──► ids of a training conversation, as
                                                                            transformers makes them from the directory
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fpo_jax import tokenization
from fpo_jax.hf import hub as directories
from fpo_jax.tokenization import prompt_format

# of a tokenizer, and its chat templates, which are written anew where the training had another
_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt")
_TEMPLATES = ("chat_template*", "additional_chat_templates")
_EMPTY_SYSTEM = (
    "{% if not messages or messages[0]['role'] != 'system' %}"
    "{% set messages = [{'role': 'system', 'content': ''}] + messages %}{% endif %}"
)


def end_ids(directory: Path) -> tuple[int, ...]:
    """Return every token that ends a text for a model: those of generation_config.json, then those of config.json.

    Raises:
        ValueError: a file is broken, or lists what is no token id.
    """
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        content = _read(directory / name)
        listed = _listed(content)
        if any(type(token) is not int or token < 0 for token in listed):
            described = f"eos_token_id={content['eos_token_id']!r} must be a token id, a list of them or null"
            raise ValueError(f"{directory / name}: {described}.")
        found += listed
    return tuple(dict.fromkeys(found))


def write(
    source_dir: Path,
    encoder: tokenization.Encoder,
    *,
    out_dir: Path,
    example: Mapping[str, Any] | None,
    tokenizer: str = "",
) -> None:
    """Write everything but the weights into an existing directory, as the training had it, and check it.

    Args:
        source_dir: model that the training started from.
        encoder: of the training.
        out_dir: gets the files.
        example: a conversation of the training, with its ids; None = there is none that could be compared.
        tokenizer: path or hub name that the tokenizer was read from; "" = source_dir.

    Raises:
        ValueError: transformers would make other ids of the conversation than the training had.
    """
    directories.copy_companions(source_dir, out_dir, leave_out=(*_TOKENIZER, *_TEMPLATES))
    write_tokenizer(encoder, Path(tokenizer or source_dir).expanduser(), out_dir=out_dir, example=example)
    _write_ids(encoder, out_dir)
    check(out_dir)


def write_tokenizer(
    encoder: tokenization.Encoder, source: Path, *, out_dir: Path, example: Mapping[str, Any] | None
) -> None:
    """Write tokenizer, chat template and prompt format into an existing directory.

    Files of a directory with a tokenizer.json stay as they are, but for the chat template and EOS; of anything else
    (a SentencePiece model, a lone tokenizer.json, a hub name) a tokenizer.json is made, with the merges used here.
    """
    if source.is_dir() and (source / "tokenizer.json").is_file():
        for path in sorted({path for pattern in (*_TOKENIZER, *_TEMPLATES) for path in source.glob(pattern)}):
            copy = shutil.copytree if path.is_dir() else shutil.copyfile
            copy(path, out_dir / path.name)
    else:
        encoder.tokenizer.save_pretrained(out_dir)
    if encoder.format.rule == "chat":
        _write_template(encoder, out_dir, example)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = out_dir / name
        found = _read(path)
        if (found or name == "tokenizer_config.json") and _spelling(found) != encoder.format.eos_token:
            path.write_text(directories.dumps(found | {"eos_token": encoder.format.eos_token}))
    prompt_format.write(out_dir, encoder.format, example=example)


def check(directory: Path) -> None:
    """Check that transformers, given a directory, makes of a training conversation the ids that were trained on.

    Raises:
        ValueError: it does not; says where they differ.
    """
    recorded = prompt_format.read(directory)
    settled, example = (None, None) if recorded is None else recorded
    if settled is None or example is None:
        return
    tokenizer = tokenization.load_tokenizer(directory)
    faults = tokenization.example_faults(tokenization.encoder(tokenizer, settled), example)
    if faults:
        raise ValueError(
            f"transformers would not render {directory} as it was trained: {'; '.join(faults)}. Give the model's own"
            " tokenizer and chat template."
        )


def _write_template(encoder: tokenization.Encoder, out_dir: Path, example: Mapping[str, Any] | None) -> None:
    """Write the template by which transformers renders what the training rendered, where the files have another."""
    settled, prefix = encoder.format, ""
    for name, value in settled.chat_template_kwargs.items():
        prefix += f"{{% if {name} is not defined %}}{{% set {name} = {_jinja(value)} %}}{{% endif %}}"
    if settled.auto_insert_empty_system and tokenization.knows_system(settled.chat_template):
        prefix += _EMPTY_SYSTEM
    prefix += "\n" if prefix else ""  # which trim_blocks takes away, and not one of the template
    if settled.prepend_bos and encoder.adds_bos:
        prefix = _bos(encoder, prefix, example) + prefix
    text = prefix + settled.chat_template
    there = tokenization.load_tokenizer(out_dir, eos_token=settled.eos_token)
    if there.chat_template and there.get_chat_template() == text:
        return
    for path in {path for pattern in _TEMPLATES for path in out_dir.glob(pattern)}:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (out_dir / "chat_template.jinja").write_text(text, encoding="utf-8")
    path = out_dir / "tokenizer_config.json"  # where releases of transformers before the file of its own look
    path.write_text(directories.dumps(_read(path) | {"chat_template": text}), encoding="utf-8")


def _bos(encoder: tokenization.Encoder, prefix: str, example: Mapping[str, Any] | None) -> str:
    """Return what a template has to write first, so that the plain tokenizer makes of it the BOS and what follows.

    A SentencePiece tokenizer puts a space before a text, and none behind a control token in it.
    """
    messages = [{"role": "user", "content": "x"}] if example is None else list(example["messages"])[:-1]
    tools = None if example is None else example.get("tools")
    [wanted] = tokenization.generation_prompts(encoder, [messages], tools=[tools])
    for opening in ("", "{{ bos_token }}", "{{ bos_token + ' ' }}"):
        template = opening + prefix + encoder.format.chat_template
        settings = {"add_generation_prompt": True, "template": template, "tools": tools}
        if tokenization.transformers_ids(encoder, messages, **settings) == wanted:
            return opening
    return "{{ bos_token }}"


def _jinja(value: Any) -> str:
    """Return a value of JSON as Jinja writes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {_jinja(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(_jinja, value))}]"
    return "none" if value is None else json.dumps(value)


def _write_ids(encoder: tokenization.Encoder, out_dir: Path) -> None:
    """Let config.json and generation_config.json name every end token, EOS first, where they do not."""
    wanted = list(encoder.format.end_ids)
    for name in ("config.json", "generation_config.json"):
        path = out_dir / name
        found = _read(path)
        if set(_listed(found)) != set(wanted):
            path.write_text(directories.dumps(found | {"eos_token_id": wanted[0] if len(wanted) == 1 else wanted}))


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file; {} where there is none."""
    return directories.read_json(path) if path.is_file() else {}


def _listed(found: dict[str, Any]) -> list[Any]:
    """Return what a config lists as end tokens: none, one or several."""
    listed = found.get("eos_token_id")
    return listed if isinstance(listed, list) else [] if listed is None else [listed]


def _spelling(found: dict[str, Any]) -> str | None:
    eos = found.get("eos_token")
    return eos.get("content") if isinstance(eos, dict) else eos
