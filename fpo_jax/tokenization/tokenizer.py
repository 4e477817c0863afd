"""Load a tokenizer, and encode so that only a chat template can write a control token, never the data.

A control token is an added token that the tokenizer flags as special, that a SentencePiece vocabulary reserves (`<s>`,
`</s>`), or that is spelt `<|...|>` (with either bar). `<think>` and runs of spaces are text. Text from the data may
contain the same characters; it must stay text. So the encoder is a copy of the tokenizer in which every control token
is renamed to an alias made of Unicode noncharacters: the ids, the flags and the merges of the text stay what they were,
but the spelling `</s>` no longer matches anything.

    data text  --protect-->  template  --alias-->  aliases for what the template wrote  --reveal + encode-->  ids
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import tokenizers
import transformers
from google.protobuf import message as protobuf
from sentencepiece import sentencepiece_model_pb2 as sentencepiece
from transformers import PreTrainedTokenizerFast

from fpo_jax.io import json_digest, terminal
from fpo_jax.tokenization import chat_templates, template_sandbox, thinking, tokenizer_limits
from fpo_jax.tokenization.prompt_format import PromptFormat

# noncharacters: no text may carry them (Unicode 16, section 23.7), so they delimit what must not be forged
_OPEN, _CLOSE, _HIDE = "\ufdd0", "\ufdd1", "\ufdd2"
_RESERVED = re.compile(f"[{_OPEN}{_CLOSE}{_HIDE}]")
_HIDDEN = re.compile(f"{_HIDE}([0-9]+){_HIDE}")

# Llama-2 and its children keep these in the vocabulary, sometimes without the special flag (Phi-3: </s>)
_SENTENCEPIECE_CONTROLS = ("<unk>", "<s>", "</s>", "<pad>")
_MARKER = re.compile("<[|｜].*[|｜]>")
_BYTE_PIECE = re.compile("<0x[0-9A-Fa-f]{2}>")

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
# what a tokenizer is told apart by, besides its vocabulary: spaces, capitals, digits, accents, scripts, line ends
_PROBE = (
    "Ab cd  ef\n\n\tGhi, 12345.67e-8 don't 'll naïve ÀÉ\u0301 ﬁ ½ 中文 日本 العربية"
    " हिन्दी 🙂👩\u200d💻 \u200b<b>(x_y)</b> $#@!"
)


class Encoder(NamedTuple):
    """A tokenizer whose control tokens no text can spell, the ids that rows are built with, and the prompt format."""

    tokenizer: PreTrainedTokenizerFast  # renders templates and decodes
    backend: tokenizers.Tokenizer  # encodes; control tokens renamed, adds nothing by itself
    controls: tuple[str, ...]  # spelling of each control token
    aliases: dict[str, str]  # spelling -> U+FDD0, index in `controls`, U+FDD1
    pattern: re.Pattern[str]  # matches any control token, the longest first
    eos_id: int
    bos_id: int | None
    adds_bos: bool  # whether the tokenizer itself opens a text with BOS
    format: PromptFormat  # with nothing left open: template, EOS, every end token

    @property
    def control_ids(self) -> frozenset[int]:
        """Tokens that no text of the data can write."""
        found = (self.backend.token_to_id(one) for one in self.aliases.values())
        return frozenset(token for token in found if token is not None)

    @property
    def end_ids(self) -> frozenset[int]:
        """Control tokens that end a completion."""
        return frozenset(self.format.end_ids) & self.control_ids

    def __repr__(self) -> str:
        """Name the tokenizer; its vocabulary would fill the screen."""
        return f"Encoder({self.tokenizer.name_or_path!r})"


@tokenizer_limits.no_panic()
def load_tokenizer(
    name_or_path: str | Path, *, chat_template: str | None = None, eos_token: str | None = None
) -> PreTrainedTokenizerFast:
    """Load a fast tokenizer from a directory, a `tokenizer.json`, a SentencePiece `.model` file or the hub.

    No code from the model's directory is ever run. A `.model` without a tokenizer.json is read as SentencePiece itself
    reads it, with the prefix space, and with BOS in front of a text unless its settings say otherwise.

    Args:
        name_or_path: local directory or file, or a hub name `owner/name`.
        chat_template: None keeps the tokenizer's own; else a key of `CHAT_TEMPLATES`, the path of a file with a Jinja
            template, or the template itself (any text with a brace).
        eos_token: spelling of the end token; only needed where the files do not name one.

    Returns:
        The tokenizer, with the chosen chat template and an EOS token. Its pad token is left as it is.

    Raises:
        ValueError: nothing there to load, no Rust tokenizer, no EOS token, a broken or unknown template.
    """
    path = Path(name_or_path).expanduser()
    try:
        tokenizer = _load(name_or_path, path)
    except Exception as error:  # the libraries raise a dozen types, from Rust bare Exception; recursion is one too
        if terminal.is_ours(error):
            raise
        cause = _broken(path) or " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"cannot load a tokenizer from {str(name_or_path)!r}: {cause}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"the tokenizer {str(name_or_path)!r} is a {type(tokenizer).__name__}, which has no Rust version; "
            "save a tokenizer.json beside it"
        )
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise ValueError(f"eos_token {eos_token!r} is not in the vocabulary of {str(name_or_path)!r}")
        tokenizer.add_special_tokens({"eos_token": eos_token})
    if tokenizer.eos_token_id is None:
        raise ValueError(_no_eos(name_or_path))
    if chat_template is not None:
        tokenizer.chat_template = template_text(chat_template)
        _check_syntax(tokenizer)
    return tokenizer


@tokenizer_limits.no_panic()
def encoder(
    tokenizer: PreTrainedTokenizerFast, prompt_format: PromptFormat | None = None, *, end_ids: Sequence[int] = ()
) -> Encoder:
    """Build the encoder of a tokenizer (half a second; build it once).

    Args:
        tokenizer: from `load_tokenizer`, with the chat template and the EOS that the prompt format speaks of.
        prompt_format: how prompts and completions become ids; None = as transformers does it. What it leaves open
            (template, EOS, digest of the tokenizer) is filled in.
        end_ids: tokens that end a completion besides EOS, as generation_config.json and config.json list them.

    Raises:
        ValueError: the tokenizer has no EOS token, or special tokens that it would not load again as they are.
    """
    eos_id, bos_id = tokenizer.eos_token_id, tokenizer.bos_token_id
    if not isinstance(eos_id, int):
        raise ValueError(_no_eos(tokenizer.name_or_path))
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {*tokenizer.all_special_tokens, *_SENTENCEPIECE_CONTROLS}
    ends = {eos_id, *end_ids, *(() if prompt_format is None else prompt_format.end_ids)}
    ids = {
        token["content"]: token["id"]
        for token in state["added_tokens"]
        if token["id"] in ends
        or (
            token["content"] not in thinking.MARKS  # which the data write, whatever flag they have
            and (token["special"] or token["content"] in special or _MARKER.fullmatch(token["content"]))
        )
    }
    controls = tuple(sorted(ids, key=lambda spelling: (-len(spelling), spelling)))
    aliases = {spelling: f"{_OPEN}{index}{_CLOSE}" for index, spelling in enumerate(controls)}
    for token in state["added_tokens"]:
        if token["content"] in aliases:
            token |= {"content": aliases[token["content"]], "normalized": False}
    _rename(state["model"], aliases)
    backend = tokenizers.Tokenizer.from_str(
        json.dumps(state | {"post_processor": None, "truncation": None, "padding": None})
    )
    if str(tokenizer.eos_token) not in ids:
        raise ValueError(f"the EOS token {tokenizer.eos_token!r} is not an added token; use add_special_tokens for it")
    if moved := [spelling for spelling, token_id in ids.items() if backend.token_to_id(aliases[spelling]) != token_id]:
        raise ValueError(f"the tokenizer's ids of {', '.join(moved)} are not reproducible; save it anew and load that")
    opening = tokenizer("a", add_special_tokens=True)["input_ids"]
    settled = prompt_format or PromptFormat(rule="chat" if tokenizer.chat_template else "raw")
    settled = dataclasses.replace(
        settled,
        chat_template=str(tokenizer.get_chat_template()) if settled.rule == "chat" and tokenizer.chat_template else "",
        eos_token=str(tokenizer.eos_token),
        end_ids=tuple(dict.fromkeys((eos_id, *settled.end_ids, *end_ids))),
        tokenizer=fingerprint(tokenizer),
    )
    return Encoder(
        tokenizer=tokenizer,
        backend=backend,
        controls=controls,
        aliases=aliases,
        pattern=re.compile("|".join(map(re.escape, controls)) or "(?!)"),
        eos_id=eos_id,
        bos_id=bos_id if isinstance(bos_id, int) else None,
        adds_bos=isinstance(bos_id, int) and opening[:1] == [bos_id],
        format=settled,
    )


@tokenizer_limits.no_panic()
def encode(encoder: Encoder, texts: Sequence[str]) -> list[list[int]]:
    """Encode a batch of texts; nothing is added, and only aliases become control tokens."""
    return [encoding.ids for encoding in encoder.backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the sha256 (hex) of what a tokenizer makes of texts and ids, wherever and however it is stored."""
    ids = tokenizer(_PROBE, add_special_tokens=False, verbose=False)["input_ids"]
    return json_digest.of([sorted(tokenizer.get_vocab().items()), ids])


def refuse_reserved(text: str) -> str:
    """Return `text`, which must not contain the three noncharacters that mark control tokens here.

    Raises:
        ValueError: it does.
    """
    if found := _RESERVED.search(text):
        raise ValueError(
            f"the text contains the noncharacter U+{ord(found.group()):04X} at position {found.start()}, which marks "
            "control tokens here; remove it from the data"
        )
    return text


def protect(encoder: Encoder, text: str) -> str:
    """Hide each control token's spelling in `text`, so that it passes through a template as text."""
    return encoder.pattern.sub(
        lambda found: f"{_HIDE}{encoder.controls.index(found.group())}{_HIDE}", refuse_reserved(text)
    )


def alias(encoder: Encoder, rendered: str) -> str:
    """Turn the control tokens that a template wrote into aliases, and what `protect` hid back into text."""
    written = encoder.pattern.sub(lambda found: encoder.aliases[found.group()], rendered)
    return _HIDDEN.sub(lambda found: encoder.controls[int(found.group(1))], written)


def spelt(encoder: Encoder, text: str) -> str:
    """Return a text with the control tokens of a template spelt out again."""
    for spelling, its_alias in encoder.aliases.items():
        text = text.replace(its_alias, spelling)
    return text


def _load(name_or_path: str | Path, path: Path) -> transformers.PreTrainedTokenizerBase:
    if path.exists():
        tokenizer_limits.check(path)
    if path.is_file():
        return _from_file(path)
    if path.is_dir():
        found = sorted(entry.name for entry in path.iterdir())
        if not any(name in found for name in _TOKENIZER_FILES):
            raise ValueError(
                f"the directory holds none of {', '.join(_TOKENIZER_FILES)}; it holds {', '.join(found) or 'nothing'}"
            )
        if "tokenizer.json" not in found and "tokenizer.model" in found:
            return _from_sentencepiece(path)
        return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name_or_path)) or path.suffix in (".json", ".model"):
        raise ValueError("no such file or directory, and a hub name has the form owner/name")
    return transformers.AutoTokenizer.from_pretrained(str(name_or_path), trust_remote_code=False)


def _from_file(path: Path) -> transformers.PreTrainedTokenizerBase:
    if path.suffix == ".json":
        try:
            return PreTrainedTokenizerFast(tokenizer_file=str(path))
        except Exception as error:  # the Rust library raises a bare Exception for a broken file
            if terminal.is_ours(error):
                raise
            raise ValueError(f"not a tokenizer.json: {error}") from error
    if path.suffix == ".model":
        return _order_merges(transformers.LlamaTokenizer.from_pretrained(str(path), add_bos_token=True), path)
    raise ValueError("a tokenizer file is a tokenizer.json or a SentencePiece .model")


def _from_sentencepiece(path: Path) -> transformers.PreTrainedTokenizerBase:
    """A directory with a `tokenizer.model` and no `tokenizer.json`, read with the settings beside it.

    Without settings AutoTokenizer drops the prefix space ("Hi" becomes another token), and with settings that do not
    say `add_bos_token` it drops BOS, which these models were trained with (seen in transformers 5.23).
    """
    model, config = path / "tokenizer.model", path / "tokenizer_config.json"
    if not config.exists():
        return _from_file(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if not isinstance(tokenizer, transformers.LlamaTokenizer):
        return tokenizer
    if "add_bos_token" not in json.loads(config.read_text("utf-8")):
        tokenizer.add_bos_token = True
    return _order_merges(tokenizer, model)


def _order_merges(tokenizer: transformers.LlamaTokenizer, path: Path) -> transformers.LlamaTokenizer:
    """Order the merges as SentencePiece does, by the score of the piece they make.

    transformers 5.23 orders them by id. Mistral and Llama-2 give runs of spaces low ids and the lowest score, so there
    59 % of the HH transcripts (those with two spaces somewhere) get other tokens than the model was trained with.
    """
    try:
        model = sentencepiece.ModelProto.FromString(path.read_bytes())  # pyright: ignore[reportAttributeAccessIssue]
    except protobuf.DecodeError as error:
        raise ValueError(f"not a SentencePiece model: {error}") from error
    if model.trainer_spec.model_type != model.trainer_spec.BPE:
        raise ValueError("the SentencePiece model is not a BPE; save a tokenizer.json beside it")
    ids = {piece.piece: index for index, piece in enumerate(model.pieces)}
    normal = {piece.piece: piece.score for piece in model.pieces if piece.type == piece.NORMAL}
    pairs = [
        (-score, ids[whole], ids[left], ids[right], (left, right))
        for whole, score in normal.items()
        for cut in range(1, len(whole))
        if (left := whole[:cut]) in normal and (right := whole[cut:]) in normal
    ]
    tokenizer.backend_tokenizer.model = tokenizers.models.BPE(
        vocab=ids, merges=[pair[-1] for pair in sorted(pairs)], fuse_unk=True, byte_fallback=True
    )
    return tokenizer


def _rename(model: dict, aliases: dict[str, str]) -> None:
    """Rename control tokens inside the vocabulary, and drop the merges by which text could reach them."""
    if model["type"] == "Unigram":
        model["vocab"] = [[aliases.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {aliases.get(piece, piece): index for piece, index in model["vocab"].items()}
    if model.get("unk_token") in aliases:
        model["unk_token"] = aliases[model["unk_token"]]
    if model.get("merges"):
        joined = ("".join(merge if isinstance(merge, list) else merge.split(" ")) for merge in model["merges"])
        model["merges"] = [
            merge
            for merge, piece in zip(model["merges"], joined, strict=True)
            if piece not in aliases and not _BYTE_PIECE.fullmatch(piece)
        ]


def template_text(chat_template: str) -> str:
    """Return the Jinja text of a template that is given by name, by file or as it is.

    Raises:
        ValueError: a name that is none of these.
    """
    if chat_template in chat_templates.CHAT_TEMPLATES:
        return chat_templates.CHAT_TEMPLATES[chat_template]
    text = chat_template
    if "{" not in text:
        path = Path(chat_template).expanduser()
        if not path.is_file():
            raise ValueError(
                f"chat_template {chat_template!r} is no file, no Jinja text, and not one of "
                f"{', '.join(chat_templates.CHAT_TEMPLATES)}"
            )
        text = path.read_text("utf-8")
    return text


def _check_syntax(tokenizer: PreTrainedTokenizerFast) -> None:
    asked = template_sandbox.Conversation([{"role": "user", "content": "x"}])
    try:
        template_sandbox.render(str(tokenizer.chat_template), [asked], variables=tokenizer.special_tokens_map)
    except template_sandbox.Refused:
        pass  # sound Jinja that refuses this conversation; the real ones will tell


def _broken(path: Path) -> str:
    """Name the file of a directory that is no JSON; empty where all are, or are too large to be read only for this."""
    for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
        if file.suffix != ".json" or not file.is_file() or file.stat().st_size > tokenizer_limits.LARGEST_FILE:
            continue
        try:
            json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:
            return f"{file.name} is not valid JSON ({error}); fetch it again"
    return ""


def _no_eos(name: str | Path) -> str:
    return (
        f"the tokenizer {str(name)!r} names no EOS token, so no completion could be taught to end; add "
        '"eos_token" to its tokenizer_config.json or pass eos_token="<|endoftext|>" (or what ends a text there)'
    )
