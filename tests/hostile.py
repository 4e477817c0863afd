"""Model directories that mean harm. Each is a sound one, changed; any code in it that ran would leave a canary.

`CASES` maps a name to the change and to what the refusal says; None = the directory loads, and nothing of it runs.
"""

import json
import os
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests import tokenizer_bombs

CANARY = "canary"
LOOP = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
CALLS = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
DOUBLING = "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}"
# ways to the operating system; `{}` is a shell command that makes the canary
ESCAPES = {
    "subclasses": "{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}",
    "globals of a method": "{{{{ cycler.__init__.__globals__.os.system('{}') }}}}",
    "globals of a function": "{{{{ lipsum.__globals__['os'].popen('{}').read() }}}}",
    "globals of ours": "{{{{ raise_exception.__globals__.sys.modules.os.system('{}') }}}}",
    "attr filter": "{{{{ lipsum | attr('__globals__') }}}}",
    "format": "{{{{ '{{0.__class__}}'.format(messages) }}}}",
    "format by another way": "{{% set f = '{{0.__class__.__mro__}}'.format %}}{{{{ [messages] | map(f) | list }}}}",
    "namespace": "{{% set n = namespace(__class__=1) %}}",
    "import": "{{% import 'os' as os %}}{{{{ os.system('{}') }}}}",
    "include": "{{% include '/etc/passwd' %}}",
    "changing the data": "{{{{ messages.append(1) }}}}",
}


class Case(NamedTuple):
    """One way to do harm, and the refusal that meets it."""

    change: Callable[[Path], object]
    refusal: str | None


class _Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, canary: Path):
        self._canary = canary

    def __reduce__(self):
        return os.system, (_touch(self._canary),)


def _touch(canary: Path) -> str:
    return f"touch {canary}"


def canary(directory: Path) -> Path:
    """Return where the canary of a directory would appear."""
    return directory.parent / CANARY


def _pickled(directory: Path) -> bytes:
    return pickle.dumps(_Bomb(canary(directory)))


def _edit(directory: Path, name: str, **changed) -> None:
    path = directory / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def _weights(directory: Path) -> tuple[dict, bytes]:
    content = (directory / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _write_weights(directory: Path, header: bytes, body: bytes, *, claimed: int | None = None) -> None:
    length = struct.pack("<Q", len(header) if claimed is None else claimed)
    (directory / "model.safetensors").write_bytes(length + header + body)


def _pickles_alone(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "consolidated.00.pth"):
        (directory / name).write_bytes(_pickled(directory))


def _pickles_beside(directory: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "vocab.pkl", "tokenizer.pkl"):
        (directory / name).write_bytes(_pickled(directory))


def _pickle_in_disguise(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(_pickled(directory))


def _index(*names: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / "model.safetensors").unlink()
        for name in names:
            if "/" not in name and name.endswith(".bin"):
                (directory / name).write_bytes(_pickled(directory))
        weight_map = {f"t{index}": name for index, name in enumerate(names)}
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return change


def _code(directory: Path) -> None:
    """Code under every name that somebody might import, with the settings that ask for it."""
    lines = f"open({str(canary(directory))!r}, 'w').close()\nclass Evil: pass\n"
    for name in ("evil", "modeling_evil", "tokenization_evil", "sitecustomize", "jinja2", "json", "__init__", "setup"):
        (directory / f"{name}.py").write_text(lines)
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoModel")
    _edit(directory, "config.json", auto_map={name: "modeling_evil.Evil" for name in names})
    _edit(directory, "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_evil.Evil", None]})


def _foreign_code(directory: Path) -> None:
    _code(directory)
    _edit(directory, "config.json", model_type="evil", architectures=["EvilForCausalLM"])


def _tokenizer_class(directory: Path) -> None:
    _code(directory)
    _edit(directory, "tokenizer_config.json", tokenizer_class="evil.Evil")


def _large_header(directory: Path) -> None:
    with (directory / "model.safetensors").open("r+b") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(200_001_000)  # a hole: it costs no disk


def _many_tensors(directory: Path) -> None:
    """A header just within the bound: 20,000 tensors of no size."""
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    _write_weights(directory, json.dumps({f"t{index:06d}": entry for index in range(20_000)}).encode(), b"")


def _overlap(directory: Path) -> None:
    header, body = _weights(directory)
    first, second = [name for name in header if name != "__metadata__"][:2]
    header[second] = header[first]
    _write_weights(directory, json.dumps(header).encode(), body)


def _beyond(directory: Path) -> None:
    header, body = _weights(directory)
    name = max((name for name in header if name != "__metadata__"), key=lambda one: header[one]["data_offsets"][1])
    header[name] |= {"shape": [2**40], "data_offsets": [header[name]["data_offsets"][0], 2**42]}
    _write_weights(directory, json.dumps(header).encode(), body)


def _twice(directory: Path) -> None:
    header, body = _weights(directory)
    name = next(name for name in header if name != "__metadata__")
    again = json.dumps({name: header[name]})[1:]
    _write_weights(directory, (json.dumps(header)[:-1] + ", " + again).encode(), body)


def _deep(directory: Path) -> None:
    _write_weights(directory, b'{"__metadata__": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"")


def _cut(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _link(name: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        outside = directory.parent / "outside"
        outside.write_text("private\n")
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to(outside)

    return change


def _loop_of_links(directory: Path) -> None:
    (directory / "additional_chat_templates").symlink_to(".")


def _pipe(name: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        os.mkfifo(directory / name)

    return change


def _hole(name: str, size: int) -> Callable[[Path], None]:
    """A file that is a gigabyte long and takes no disk."""

    def change(directory: Path) -> None:
        with (directory / name).open("r+b") as file:
            file.truncate(size)

    return change


def _nested(name: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text('{"a": ' + "[" * 200_000 + "]" * 200_000 + "}")


def _config(**changed) -> Callable[[Path], None]:
    return lambda directory: _edit(directory, "config.json", **changed)


def _config_text(text: str) -> Callable[[Path], object]:
    return lambda directory: (directory / "config.json").write_text(text)


def _template(text: str) -> Callable[[Path], object]:
    return lambda directory: (directory / "chat_template.jinja").write_text(text)


def _escape(text: str) -> Callable[[Path], object]:
    return lambda directory: (directory / "chat_template.jinja").write_text(text.format(_touch(canary(directory))))


_WEIGHTS = r"model\.safetensors is damaged or cut short \(.*"
_NO_JSON = r"config\.json is not valid JSON \(.*"
_TEMPLATE = r"the chat template .*refused"
# refused by the sandbox, or an undefined name that writes nothing: a prompt without a token, no answer in the text
_NO_ESCAPE = (
    r"the chat template (refuses a conversation|does not write|leaves out the text)|is broken Jinja"
    r"|left of 8 rows read: empty_prompt"
)

CASES = {
    "weights as pickles only": Case(_pickles_alone, r"weights only as pickles .* convert them to safetensors first"),
    "pickles beside the weights": Case(_pickles_beside, None),
    "a pickle called model.safetensors": Case(_pickle_in_disguise, _WEIGHTS),
    "an index that names a pickle": Case(_index("pytorch_model.bin"), r"names files that are no safetensors: 'pytorch"),
    "an index that leads up": Case(_index("../../etc/passwd"), r"names files outside its directory: \.\./\.\./etc"),
    "an index with an absolute path": Case(_index("/etc/passwd"), r"names files outside its directory: /etc/passwd"),
    "an index that names its parent": Case(_index(".."), r"names files outside its directory: \.\."),
    "an index that names nothing": Case(_index(""), r"names files that are no safetensors: ''"),
    "code and an auto_map": Case(_code, None),
    "code for a model of its own": Case(_foreign_code, r"model_type 'evil' is not supported"),
    "code for a tokenizer of its own": Case(_tokenizer_class, r"cannot load a tokenizer from .*contains custom code"),
    "a header that claims 2^60 bytes": Case(
        lambda directory: _write_weights(directory, b"{}", b"", claimed=2**60), _WEIGHTS + "claims 1,152,921"
    ),
    "a header of 200 MB": Case(_large_header, _WEIGHTS + "claims 200,000,000 bytes"),
    "a header of 20,000 tensors": Case(_many_tensors, r"do not fit its config: .* and \d+ more"),
    "a header nested 100,000 deep": Case(_deep, _WEIGHTS),
    "tensors that overlap": Case(_overlap, _WEIGHTS),
    "a tensor beyond the end": Case(_beyond, _WEIGHTS),
    "two tensors of one name": Case(_twice, _WEIGHTS + r"its header names \S+ twice"),
    "weights without their last byte": Case(_cut, _WEIGHTS),
    "weights that are a link out": Case(_link("model.safetensors"), r"is a link to .*outside, .* copy them"),
    "a companion that is a link out": Case(
        _link("tokenizer_notes.txt"), r"tokenizer_notes\.txt is a link to .*outside"
    ),
    "a folder that contains itself": Case(_loop_of_links, r"additional_chat_templates is a link to"),
    "a config that is a pipe": Case(_pipe("config.json"), r"config\.json is no regular file"),
    "a tokenizer that is a pipe": Case(_pipe("tokenizer.json"), r"tokenizer\.json is no regular file"),
    "a config of a gigabyte": Case(_hole("config.json", 2**30), _NO_JSON + "1,073,741,824 bytes, and at most"),
    "a tokenizer of a gigabyte": Case(_hole("tokenizer.json", 2**30), r"tokenizer\.json has 1,073,741,824 bytes"),
    "a config nested 200,000 deep": Case(_nested("config.json"), _NO_JSON + "recursion"),
    "a tokenizer nested 200,000 deep": Case(_nested("tokenizer.json"), r"cannot load a tokenizer from"),
    "settings nested 200,000 deep": Case(_nested("tokenizer_config.json"), r"cannot load a tokenizer from .*recursion"),
    "a width of 10^12": Case(_config(hidden_size=10**12), r"width=1000000000000 is beyond the largest"),
    "a vocabulary of 2^31 - 1": Case(_config(vocab_size=2**31 - 1), r"embed_tokens\.weight has shape \(259, 16\)"),
    "10^12 layers": Case(
        _config(num_hidden_layers=10**12, layer_types=["full_attention"]), r"layers=1000000000000 is beyond the largest"
    ),
    "an endless norm": Case(_config_text('{"model_type": "llama", "rms_norm_eps": NaN}'), _NO_JSON + "NaN is not JSON"),
    "a number of 5,000 digits": Case(
        _config_text('{"vocab_size": ' + "9" * 5000 + "}"), _NO_JSON + "Exceeds the limit"
    ),
    "a config that is a list": Case(_config_text("[]"), r"config\.json holds a list, expected a JSON object"),
    "a template that loops": Case(_template(LOOP), _TEMPLATE),
    "a template that calls itself": Case(_template(CALLS), _TEMPLATE),
    "a template that doubles a text": Case(_template(DOUBLING), _TEMPLATE),
    "a template that multiplies a text": Case(_template("{{ 'x' * 10 ** 11 }}"), _TEMPLATE),
    "a template that pads a text": Case(_template("{{ '%099999999999d' | format(1) }}"), _TEMPLATE),
    "a template that writes without an end": Case(
        _template("{% for i in range(90000) %}{{ 'x' * 99 }}{% endfor %}"), _TEMPLATE + "|needs too much"
    ),
    "a template nested 100,000 deep": Case(_template("{{ " + "(" * 100_000), r"the chat template is nested too deeply"),
    "a template that calls itself for ever": Case(
        _template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"), r"the chat template is nested too deeply"
    ),
    "a template that is no Jinja": Case(_template("{% for %}"), r"is broken Jinja at its line 1"),
    **{name: Case(change, refusal) for name, (change, refusal) in tokenizer_bombs.BOMBS.items()},
} | {f"a template that escapes: {name}": Case(_escape(text), _NO_ESCAPE) for name, text in ESCAPES.items()}


def make(sound: Path, directory: Path, name: str) -> Case:
    """Write the directory of a case as a changed copy of a sound one."""
    directory.mkdir(parents=True)
    for path in sound.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    case = CASES[name]
    case.change(directory)
    return case


def folder(name: str) -> str:
    """Return a name as one of a folder."""
    return re.sub(r"\W+", "_", name)
