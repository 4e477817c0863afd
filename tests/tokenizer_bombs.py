"""Tokenizers that take all memory or never end: name -> (what is changed in a sound directory, what is said)."""

import base64
import json
import struct
from collections.abc import Callable
from pathlib import Path

_NO_TOKENIZER = r"cannot load a tokenizer from .*: "
_FILE = _NO_TOKENIZER + r"tokenizer\.json "


def _settings(directory: Path, **changed: object) -> None:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def _tokenizer(**changed: object) -> Callable[[Path], None]:
    """Change the tokenizer; a function makes a value of what was there."""

    def change(directory: Path) -> None:
        path = directory / "tokenizer.json"
        there = json.loads(path.read_text())
        for name, value in changed.items():
            there[name] = value(there[name]) if callable(value) else value
        path.write_text(json.dumps(there))

    return change


def _replace(pattern: dict[str, str], content: str, times: int, key: str = "normalizers") -> dict:
    return {"type": "Sequence", key: [{"type": "Replace", "pattern": pattern, "content": content}] * times}


def _split_at(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _charsmap(text: bytes) -> dict:
    table = struct.pack("<I", 1024) + b"\0" * 1024 + text + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}


def _added(**changed: object) -> Callable[[list], list]:
    return lambda tokens: [*tokens, tokens[0] | {"content": "<new>", "id": 10**4} | changed]


_GROWS = _NO_TOKENIZER + r"(encoding|decoding) takes \d+ steps that may make [\d,]+ characters of one"
BOMBS = {
    "a normalizer that multiplies": (_tokenizer(normalizer=_replace({"String": "a"}, "a" * 10, 8)), _GROWS),
    "a normalizer that doubles": (_tokenizer(normalizer=_replace({"String": "a"}, "aa", 40)), _GROWS),
    "a normalizer that fills gaps": (_tokenizer(normalizer=_replace({"Regex": ""}, "b", 40)), _GROWS),
    "a normalizer that writes bytes": (
        _tokenizer(normalizer={"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 40}),
        _GROWS,
    ),
    "a normalizer with a huge prefix": (_tokenizer(normalizer={"type": "Prepend", "prepend": "a" * 2**20}), _GROWS),
    "a table of characters that multiplies": (_tokenizer(normalizer=_charsmap(b"a" * 10**6)), _GROWS),
    "a hundred thousand steps": (
        _tokenizer(normalizer={"type": "Sequence", "normalizers": [{"type": "NFKC"}] * 10**5}),
        _GROWS,
    ),
    "a decoder that multiplies": (_tokenizer(decoder=_replace({"String": "a"}, "a" * 10, 9, "decoders")), _GROWS),
    "a splitter that multiplies": (
        _tokenizer(
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
                ]
                * 40,
            }
        ),
        _GROWS,
    ),
    "an id of 10^9": (
        _tokenizer(model=lambda model: model | {"vocab": model["vocab"] | {"bomb": 10**9}}),
        _FILE + r"has the id 10{9}",
    ),
    "an added id of 10^9": (_tokenizer(added_tokens=_added(id=10**9)), _FILE + r"has the id 10{9}"),
    "a setting with the id 10^9": (
        lambda directory: _settings(directory, added_tokens_decoder={str(10**9): {"content": "<x>"}}),
        _NO_TOKENIZER + "tokenizer_config.json has the id 10{9}",
    ),
    "a piece of a million characters": (
        _tokenizer(added_tokens=_added(content="a" * 10**6)),
        _FILE + r"has pieces of up to 1,000,000",
    ),
    "texts filled up to 10^9": (
        _tokenizer(
            padding={
                "strategy": {"Fixed": 10**9},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "<unk>",
            }
        ),
        _FILE + r"fills every text up to 1,000,000,000 tokens",
    ),
    "a suffix of a million characters": (
        _tokenizer(model=lambda model: model | {"end_of_word_suffix": "a" * 10**6}),
        _FILE + r"has a setting of 1,000,000",
    ),
    "counts within counts": (
        _tokenizer(pre_tokenizer=_split_at("(((a{999}){999}){999}){999}")),
        _FILE + r"has the regular expression",
    ),
    "ten million values": (
        lambda directory: (directory / "tokenizer.json").write_text('{"model": [' + "[]," * 5_000_000 + "[]]}"),
        _FILE + r"holds [\d,]+ values",
    ),
}
