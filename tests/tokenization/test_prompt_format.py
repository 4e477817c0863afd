"""One rendering for every program: the ids of a conversation, program by program and template by template.

The right value is always what `transformers` makes of the same conversation: from the start model's directory where the
run goes that model's own way, and from the export in every case.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers

from fpo_jax import checkpoint, data, hf, tokenization
from fpo_jax.cli import generate, label
from fpo_jax.eval.benchmarks import answer as benchmark
from fpo_jax.eval.judge import winrate
from fpo_jax.eval.stats import kl
from fpo_jax.inference import reward_model, sampler
from fpo_jax.trainer import export, run_inputs, sample_completions, trainer
from tests import tiny

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}" + CHATML
)
REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML
# as Qwen-3: an empty thought before the last answer, and in the generation prompt where thinking is switched off
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last and '<think>' not in m.content %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
CLOSED = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}" + (
    "{{ 'assistant: ' if add_generation_prompt else '' }}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|other_end|>")
OFF = '{"enable_thinking": false}'
ORIGINAL = {
    "tokenizer__chat_template": "zephyr", "data__auto_insert_empty_system": True, "data__prepend_bos": True,
    "data__assistant_header": "completion", "data__append_eos": "unless_last", "data__truncate_together": True,
}  # fmt: skip
# name -> the start model's template, what the run sets, whether it goes the start model's own way
FORMATS = {
    "own": (DEFAULT_SYSTEM, {}, True),
    "recipe": (DEFAULT_SYSTEM, ORIGINAL, False),
    "eos set apart": (CLOSED, {"tokenizer__eos_token": "<|other_end|>"}, False),
    "thinking": (THINKING, {"tokenizer__chat_template_kwargs": OFF}, True),
    "refuses system": (REFUSES_SYSTEM, {}, True),
    "raw": (None, {"data__rule": "raw", "data__max_completion_length": 60, "data__max_prompt_length": 140}, True),
}
CHAT_ROWS = [
    {"prompt": [{"role": "user", "content": q}], "chosen": a, "rejected": b}
    for q, a, b in (
        ("1+1?", "2", "three"),
        ("Sky?", "blue", "green"),
        ("Hi", "Hello!", "No."),
        ("Cat?", "meow", "woof"),
    )
]
TURNS = [
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Go"},
]


def write_tokenizer(folder, template, *, adds_bos=False):
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL))
    if adds_bos:
        core.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    made.chat_template = template
    made.save_pretrained(folder)


def write_model(folder, template, *, generation=None, **changed):
    changed = {"vocab_size": 260, "layers": 1, "max_positions": 512} | changed
    tiny.write_model(folder, **changed)
    for path in folder.glob("*token*"):
        path.unlink()
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    write_tokenizer(folder, template)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_config(model, rows, **changed):
    options = {"data__rule": "chat", "data__max_length": 160, "data__max_prompt_length": 100}
    options |= {"data__max_completion_length": None, "data__eval": "", "train__batch_size": 2, "train__max_steps": 1}
    options |= {"train__micro_batch_per_device": 2, "mesh__data": 1, "mesh__fsdp": 1, "loss__name": "sigmoid"}
    options |= {"loss__alpha": None, "loss__beta_pi": None, "data__shuffle": False}
    return tiny.config(model, rows, **(options | changed))


class Case:
    """A run of one step in one prompt format, its export, and what transformers makes of its conversations."""

    def __init__(self, root: Path, name: str):
        template, self.changed, self.own = FORMATS[name]
        self.raw = template is None
        self.root, self.model = root, write_model(root / "model", template)
        rows = CHAT_ROWS
        if self.raw:
            rows = [{**row, "prompt": row["prompt"][0]["content"]} for row in CHAT_ROWS]
        self.config = run_config(self.model, write_rows(root / "rows.jsonl", rows), **self.changed)
        self.workdir, self.export = root / "run", root / "export"
        trainer.run(self.config, self.workdir, devices=_one_device())
        export.export(self.workdir, self.export, step=None, dtype=None)
        self.kwargs = json.loads(self.changed.get("tokenizer__chat_template_kwargs", "{}"))
        self.prompt = "Go" if self.raw else TURNS

    def theirs(self, directory=None):
        return transformers.AutoTokenizer.from_pretrained(directory or self.export)

    def opened(self, messages, directory=None):
        tokenizer = self.theirs(directory)
        if self.raw:
            return tokenizer(messages)["input_ids"]
        given = self.kwargs if directory == self.model else {}  # the export needs to be told nothing
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **given)

    def whole(self, messages, answer, directory=None):
        tokenizer = self.theirs(directory)
        if self.raw:
            return tokenizer(messages + answer)["input_ids"]
        turns = [*messages, {"role": "assistant", "content": answer}]
        given = self.kwargs if directory == self.model else {}
        return tokenizer.apply_chat_template(turns, return_dict=False, **given)


def _one_device():
    import jax

    return jax.devices()[:1]


@pytest.fixture(scope="module", params=FORMATS)
def case(request, tmp_path_factory):
    return Case(tmp_path_factory.mktemp("format"), request.param)


_OK = [len(SPECIAL) + sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()).index(letter) for letter in "ok"]


@pytest.fixture
def drawn(monkeypatch):
    """What is sampled from: the prompts of every call, each of which is answered by "ok" and an end token."""
    seen = []

    def sampled(_weights, prompts, *, num_return=1, decoding, done=lambda _: None, **_options):
        seen.append((list(prompts), decoding))
        completions = [[[*_OK, decoding.stop_ids[0]]] * num_return for _ in prompts]
        done(dict(enumerate(completions)))
        return completions

    monkeypatch.setattr(sampler, "sample", sampled)
    return seen


@pytest.fixture
def scored(monkeypatch):
    """The rows that a reward model is given."""
    seen = []

    class Rewarder:
        def __init__(self, source, **_options):
            self.config = hf.read_config(source)

        def __call__(self, rows):
            seen.extend([list(row) for row in rows])
            return np.arange(len(rows), dtype=np.float32)

    monkeypatch.setattr(reward_model, "Rewarder", Rewarder)
    return seen


def prompts_file(case, tmp_path):
    return write_rows(tmp_path / "prompts.jsonl", [{"prompt": case.prompt}])


# --- the matrix


@pytest.mark.sampled(4)
@pytest.mark.slow  # a training of one step for each prompt format
def test_rows_of_the_training_are_those_of_transformers(case):
    prepared = run_inputs.prepare(case.config).train.prepared
    for number, row in enumerate(CHAT_ROWS):
        prompt = row["prompt"][0]["content"] if case.raw else row["prompt"]
        for completion, answer in enumerate((row["chosen"], row["rejected"])):
            ids, prompt_length = prepared.row(2 * number + completion)
            for directory in [case.export, *([case.model] if case.own else [])]:
                opened, whole = case.opened(prompt, directory), case.whole(prompt, answer, directory)
                assert ids.tolist()[: len(opened)] == opened
                ends = hf.end_ids(case.export)
                if case.config.data.append_eos == "unless_last":  # behind the newline, which transformers has, too
                    assert ids.tolist() == [*whole, ends[0]] and case.theirs().decode(whole[-2:]) == "<|im_end|>\n"
                elif case.raw:
                    assert ids.tolist() == [*whole, ends[0]]
                else:  # up to the one end token; what the template writes behind it nobody samples
                    place = next(i for i in range(len(opened), len(whole)) if whole[i] in ends)
                    assert ids.tolist() == whole[: place + 1]
                    assert case.theirs().decode(whole[place + 1 :]).strip() == ""
                header = case.config.data.assistant_header == "completion"
                assert prompt_length == len(opened) - (len("<|assistant|>\n") if header else 0)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["workdir", "export"])
def test_sampling_is_from_what_was_trained(case, by, drawn, tmp_path):
    source = {"workdir": str(case.workdir)} if by == "workdir" else {"model": str(case.export)}
    options = generate.Options(
        out=tmp_path / "o.jsonl", data=str(prompts_file(case, tmp_path)), max_new_tokens=4, keep_ids=1,
        compute_dtype="float32", **source,
    )  # fmt: skip
    generate.run(options)
    (line,) = [json.loads(line) for line in options.out.read_text().splitlines()]
    assert line["prompt_ids"] == drawn[0][0][0] == case.opened(case.prompt)
    assert line["completions"] == ["ok"] and set(hf.end_ids(case.export)) <= set(drawn[0][1].stop_ids)
    if case.own:
        assert line["prompt_ids"] == case.opened(case.prompt, case.model)
    # the divergence is of those very ids
    other = [line | {"index": 1}, line]
    prepared = kl._prepared(options.out, other, 260)
    assert prepared.row(0)[0].tolist() == line["prompt_ids"] + line["ids"][0]


@pytest.mark.slow
def test_sample_completions_of_the_training_begin_there_too(case, tmp_path):
    c = case.config.copy_and_resolve_references()
    with c.unlocked():
        c.completions.count, c.completions.max_new_tokens = 1, 4
        c.completions.prompts = str(prompts_file(case, tmp_path))
    answers = sample_completions.SampleCompletions(c, tmp_path, run_inputs.prepare(c))
    assert answers._ids == [case.opened(case.prompt)]
    assert set(hf.end_ids(case.export)) <= set(answers._decoding.stop_ids)


@pytest.mark.slow
def test_a_benchmark_asks_in_the_same_way(case, drawn, tmp_path):
    if case.raw:
        pytest.skip("benchmarks ask chat models")
    question = write_rows(tmp_path / "q.jsonl", [{"instruction": "Go"}])
    options = benchmark.Options(
        benchmark="alpaca_eval", data=str(question), out=tmp_path / "o", model=str(case.export), temperature=0.0,
        max_new_tokens=4, compute_dtype="float32",
    )  # fmt: skip
    benchmark.run(options)
    assert drawn[0][0] == [case.opened([{"role": "user", "content": "Go"}])]


@pytest.mark.sampled(6)
@pytest.mark.slow
@pytest.mark.parametrize("program", ["label", "winrate"])
def test_a_reward_model_reads_what_transformers_reads(case, program, scored, tmp_path):
    """The whole text of the template, up to the last token that is not pad, whatever the rule of rows of a policy."""
    c = case.config.copy_and_resolve_references()
    with c.unlocked():
        c.stage, c.loss.name = "reward", "bradley_terry"
    workdir, out = case.root / "reward", case.root / "reward_export"
    if not out.exists():
        trainer.run(c, workdir, devices=_one_device())
        export.export(workdir, out, step=None, dtype=None)
    assert json.loads((out / "config.json").read_text())["pad_token_id"] == 0
    rows = [{"prompt": case.prompt, "completions": [" a"]}, {"prompt": case.prompt, "completions": [" the"]}]
    wanted = [case.whole(case.prompt, text, out) for text in (" a", " the")]
    if program == "label":
        given = write_rows(tmp_path / "a.jsonl", rows)
        label.run(label.Options(model=str(out), data=given, out=tmp_path / "o.jsonl", compute_dtype="float32"))
    else:
        ours, theirs = (write_rows(tmp_path / f"{i}.jsonl", [row]) for i, row in enumerate(rows))
        options = winrate.Options(candidate=ours, baseline=str(theirs), out=tmp_path / "w", reward_model=str(out))
        winrate.run(options)
    assert scored == wanted and all(row[-1] != 0 for row in wanted)
    # and so did its training
    prepared = run_inputs.prepare(c).train.prepared
    prompt = CHAT_ROWS[0]["prompt"][0]["content"] if case.raw else CHAT_ROWS[0]["prompt"]
    assert prepared.row(0)[0].tolist() == case.whole(prompt, CHAT_ROWS[0]["chosen"], out)


@pytest.mark.slow
def test_an_export_carries_the_record_and_every_end_token(case):
    settled, example = tokenization.prompt_format.read(case.export)
    assert settled == tokenization.prompt_format.read(case.workdir / checkpoint.SOURCE_FOLDER)[0]
    assert settled.rule == ("raw" if case.raw else "chat") and example["ids"]
    eos = "<|other_end|>" if "tokenizer__eos_token" in case.changed else "<|im_end|>"
    tokenizer = case.theirs()
    assert tokenizer.eos_token == settled.eos_token == eos
    for name in ("config.json", "generation_config.json"):
        listed = json.loads((case.export / name).read_text())["eos_token_id"]
        assert set(settled.end_ids) == set(listed if isinstance(listed, list) else [listed])
        assert settled.end_ids[0] == tokenizer.eos_token_id


@pytest.mark.slow
def test_a_program_that_is_told_something_else_refuses(case, tmp_path):
    data_file, model = str(prompts_file(case, tmp_path)), str(case.export)
    other = write_model(tmp_path / "other", CHATML)
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text().replace('"Z":', '"ZZ":'))
    wrong = {"rule": "chat" if case.raw else "raw", "eos_token": "<|endoftext|>", "tokenizer": str(other)}
    if not case.raw:
        wrong |= {"chat_template": "llama3", "chat_template_kwargs": '{"x": 1}'}
    for name, value in wrong.items():
        options = generate.Options(out=tmp_path / "o.jsonl", data=data_file, model=model, **{name: value})
        with pytest.raises(ValueError, match=f"was trained with another prompt format.*--{name.replace('_', '-')}"):
            generate.run(options)
    same = {"rule": "raw" if case.raw else "chat", "tokenizer": str(case.model)}
    tokenization.resolve(case.export, tokenization.Given(**same))  # what the model says already may be said again


# --- what a model without a record is taken for


def test_a_strange_model_is_read_as_transformers_reads_it(tmp_path):
    own = tokenization.resolve(write_model(tmp_path / "a", CHATML))
    assert own.format == tokenization.PromptFormat(
        chat_template=CHATML, eos_token="<|im_end|>", end_ids=(2,), tokenizer=own.format.tokenizer
    )
    assert tokenization.resolve(write_model(tmp_path / "b", None)).format.rule == "raw"
    given = tokenization.Given(rule="raw")
    assert tokenization.resolve(tmp_path / "a", given).format.rule == "raw"
    with pytest.raises(ValueError, match="has no chat template"):
        tokenization.resolve(tmp_path / "b", tokenization.Given(rule="chat"))
    with pytest.raises(ValueError, match="--chat-template would change nothing under rule raw"):
        tokenization.resolve(tmp_path / "a", tokenization.Given(rule="raw", chat_template="zephyr"))
    with pytest.raises(ValueError, match="chat_template_kwargs='x' is not JSON"):
        tokenization.resolve(tmp_path / "a", tokenization.Given(chat_template_kwargs="x"))
    with pytest.raises(ValueError, match="may not set messages"):
        tokenization.resolve(tmp_path / "a", tokenization.Given(chat_template_kwargs='{"messages": []}'))


def test_every_listed_end_token_ends_an_answer(tmp_path):
    folder = write_model(tmp_path / "m", CHATML, generation={"eos_token_id": [3, 0]}, eos_ids=(2,))
    assert hf.end_ids(folder) == (3, 0, 2)
    encoder = tokenization.resolve(folder, end_ids=hf.end_ids(folder))
    assert encoder.format.end_ids == (2, 3, 0)
    (folder / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ValueError, match="eos_token_id='</s>' must be a token id"):
        hf.end_ids(folder)


def test_a_broken_record_is_refused(tmp_path):
    folder = write_model(tmp_path / "m", CHATML)
    for text in ("{", "[]", '{"example": null}', '{"example": null, "end_ids": [2], "rule": "both"}'):
        (folder / tokenization.prompt_format.FILE).write_text(text)
        with pytest.raises(ValueError, match="is no record of a prompt format"):
            tokenization.resolve(folder)
    tokenization.prompt_format.write(folder, tokenization.PromptFormat(eos_token="<|im_end|>", tokenizer="0"))
    with pytest.raises(ValueError, match="is not the one that prompt_format.json there was written with"):
        tokenization.resolve(folder)


# --- one end, no lost text, thoughts


def rows(template, prompt="Hi?", completions=("Yes",), *, end_ids=(), tmp_path, **changed):
    folder = tmp_path / "tokenizer"
    folder.mkdir(exist_ok=True)
    write_tokenizer(folder, template)
    encoder = tokenization.encoder(
        tokenization.load_tokenizer(folder), tokenization.PromptFormat(**changed), end_ids=end_ids
    )
    [found] = tokenization.chat_rows(encoder, [prompt], [list(completions)], max_length=400, max_prompt_length=200)
    shown = [
        (encoder.tokenizer.decode(row.ids[: row.prompt_length]), encoder.tokenizer.decode(row.ids[row.prompt_length :]))
        for row in found
    ]
    return shown if len(shown) > 1 else shown[0]


def test_a_completion_has_one_end_token(tmp_path):
    opened = "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
    assert rows(CHATML, tmp_path=tmp_path) == (opened, "Yes<|im_end|>")
    # the original: a second one behind the newline, both scored
    original = dict(append_eos="unless_last", assistant_header="completion")
    head = opened.removesuffix("<|im_start|>assistant\n")
    assert rows(CHATML, tmp_path=tmp_path, **original) == (
        head,
        "<|im_start|>assistant\nYes<|im_end|>\n<|im_end|>",
    )
    # Phi-3 closes a turn and the text; sampling stops at the first that generation_config.json lists
    twice = CHATML.replace("<|im_end|>\n", "<|other_end|>\n") + "{{ '' if add_generation_prompt else eos_token }}"
    assert rows(twice, tmp_path=tmp_path, end_ids=(3,))[1] == "Yes<|other_end|>"
    assert rows(twice, tmp_path=tmp_path)[1] == "Yes<|other_end|>\n<|im_end|>"
    # and a template without any: EOS is taught
    bare = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    assert (
        rows(bare + "{{ 'assistant: ' if add_generation_prompt else '' }}", tmp_path=tmp_path)[1] == "Yes\n<|im_end|>"
    )


def test_a_system_turn_is_only_what_the_template_makes_of_it(tmp_path):
    assert rows(DEFAULT_SYSTEM, tmp_path=tmp_path)[0].startswith("<|im_start|>system\nBe helpful.<|im_end|>")
    inserted = rows(DEFAULT_SYSTEM, tmp_path=tmp_path, auto_insert_empty_system=True)[0]
    assert inserted.startswith("<|im_start|>system\n<|im_end|>")
    assert rows(REFUSES_SYSTEM, tmp_path=tmp_path)[0].startswith("<|im_start|>user")
    with pytest.raises(
        tokenization.Refused, match=r"no system turn \(an empty system turn is put first, as data.auto_insert"
    ):
        rows(REFUSES_SYSTEM, tmp_path=tmp_path, auto_insert_empty_system=True)


@pytest.mark.parametrize(
    ("template", "prompt", "lost"),
    [
        ("{% for m in messages if m.role in ['user', 'assistant'] %}{{ m.content }}<|im_end|>{% endfor %}",
         [{"role": "tool", "content": " 42 "}, {"role": "user", "content": "Hi"}], "role 'tool' \\('42'\\)"),
        ("{% for m in messages[1:] %}{{ m.content }}<|im_end|>{% endfor %}", [{"role": "system", "content": "s"}],
         "role 'system'"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "Hi Yes", "role 'assistant'"),
        ("{% for m in messages %}{{ m.content[:3] }}{% endfor %}", "Hello", "role 'user' \\('Hello'"),
    ],
    ids=["unknown role", "system only", "answer", "shortened"],
)  # fmt: skip
def test_no_text_vanishes(template, prompt, lost, tmp_path):
    with pytest.raises(tokenization.Refused, match=f"leaves out the text of a turn of {lost}"):
        rows(template, prompt, tmp_path=tmp_path)


def test_thoughts_are_refused_kept_or_dropped_and_never_passed_over(tmp_path):
    thought = "<think>\nhm\n</think>\n\nYes"
    opened = "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(tokenization.Refused, match="a completion holds a thought"):
        rows(CHATML, completions=[thought], tmp_path=tmp_path)
    assert rows(CHATML, completions=[thought], tmp_path=tmp_path, thoughts="keep") == (opened, thought + "<|im_end|>")
    assert rows(CHATML, completions=[thought], tmp_path=tmp_path, thoughts="drop") == (opened, "Yes<|im_end|>")
    # one that the template writes
    empty = "<think>\n\n</think>\n\n"
    with pytest.raises(
        tokenization.Refused, match=r"the chat template writes a thought of its own .*<think>.*enable_thinking"
    ):
        rows(THINKING, completions=["n"], tmp_path=tmp_path)  # a letter that stands in the thought, too
    assert rows(THINKING, tmp_path=tmp_path, thoughts="keep") == (opened, f"{empty}Yes<|im_end|>")
    with pytest.raises(
        tokenization.Refused, match="which no sampling would put there"
    ):  # drop is for thoughts of the data
        rows(THINKING, completions=["n"], tmp_path=tmp_path, thoughts="drop")
    off = {"enable_thinking": False}
    assert rows(THINKING, tmp_path=tmp_path, chat_template_kwargs=off) == (f"{opened}{empty}", "Yes<|im_end|>")
    # and one that it takes away from an answer: nothing is left to train on in silence
    strips = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
    with pytest.raises(tokenization.Refused, match="leaves out the text of a turn of role 'assistant'"):
        rows(strips, completions=[thought], tmp_path=tmp_path, thoughts="keep")
    assert rows(strips, completions=[thought], tmp_path=tmp_path, thoughts="drop") == (opened, "Yes<|im_end|>")
    # all of them, and never a part of one
    several = "Sure. <think>a</think> A <think>b</think>B"
    assert rows(CHATML, completions=[several], tmp_path=tmp_path, thoughts="drop")[1] == "Sure. A B<|im_end|>"
    for cut, why in (("<think>\nI wonder", "not closed"), ("<think>a</think>", "nothing but a thought")):
        with pytest.raises(tokenization.Refused, match=why):
            rows(CHATML, completions=[cut], tmp_path=tmp_path, thoughts="drop")
    # of earlier turns the template may take it
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": thought},
        {"role": "user", "content": "b"},
    ]
    assert "hm" not in rows(strips, turns, tmp_path=tmp_path)[0]


def test_thoughts_that_the_generation_prompt_opens_are_whole(tmp_path):
    """As the thinking models of Qwen: `<think>` and a newline stand in the prompt, the answer closes it."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' and loop.last %}"
        "{% set parts = m.content.split('</think>') %}"
        "{% set thought = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' %}"
        "{{ '<think>\n' + thought + '\n</think>\n\n' }}"
        "{{ parts[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{{ '<|im_start|>assistant\n<think>\n' if add_generation_prompt else '' }}"
    )
    opened = "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    for said in ("<think>\nr\n</think>\n\nans", "<think>r</think>ans", "r\n</think>\n\nans"):
        got = rows(template, completions=[said], tmp_path=tmp_path, thoughts="keep")
        assert got == (opened, "r\n</think>\n\nans<|im_end|>")
    with pytest.raises(tokenization.Refused, match="opens a thought that this completion does not close"):
        rows(template, completions=["I wonder and"], tmp_path=tmp_path, thoughts="keep")  # cut by its length
    with pytest.raises(tokenization.Refused, match="opens a thought that this completion does not close"):
        rows(template, completions=["ans"], tmp_path=tmp_path, thoughts="drop")


def test_switches_that_a_template_obeys_are_no_lost_text(tmp_path):
    obeys = CHATML.replace("m.content", "m.content.replace('/no_think', '').rstrip()")
    prompt = [{"role": "system", "content": "Be brief. /no_think"}, {"role": "user", "content": "Hi?"}]
    assert "Be brief.<|im_end|>" in rows(obeys, prompt, tmp_path=tmp_path)[0]


def test_marks_of_thoughts_that_are_special_tokens_are_kept(tmp_path):
    folder = tmp_path / "t"
    folder.mkdir()
    write_tokenizer(folder, CHATML)
    made = transformers.AutoTokenizer.from_pretrained(folder)
    made.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]"]})
    made.save_pretrained(folder)
    settled = tokenization.PromptFormat(thoughts="keep")
    encoder = tokenization.encoder(tokenization.load_tokenizer(folder), settled)
    said = "[THINK]r[/THINK]ans"
    [[row]] = tokenization.chat_rows(encoder, ["Hi?"], [[said]], max_length=100, max_prompt_length=50)
    assert row.ids[row.prompt_length :] == [*made(said, add_special_tokens=False)["input_ids"], 2]
    assert tokenization.continuation(made, row.ids[: row.prompt_length], row.ids[row.prompt_length : -1]) == said
    assert tokenization.continuation(made, row.ids[: row.prompt_length], row.ids[row.prompt_length :]) == said


def test_an_end_token_that_is_not_special_ends_a_completion(tmp_path):
    folder = tmp_path / "t"
    folder.mkdir()
    write_tokenizer(folder, CHATML.replace("<|im_end|>", "<eot>"))
    made = transformers.AutoTokenizer.from_pretrained(folder)
    made.add_tokens(["<eot>"])
    made.save_pretrained(folder)
    encoder = tokenization.encoder(tokenization.load_tokenizer(folder), end_ids=[260])
    [[row]] = tokenization.chat_rows(encoder, ["Hi?"], [["a<eot>b"]], max_length=100, max_prompt_length=50)
    assert row.ids.count(260) == 2 and row.ids[-1] == 260, "the data cannot write it"
    assert tokenization.warnings(encoder) == []
    [given] = tokenization.warnings(
        tokenization.encoder(tokenization.load_tokenizer(folder, chat_template=CHATML, eos_token="<|endoftext|>"))
    )
    assert "closes an answer with '<|im_end|>', which is no end token of this model (EOS is '<|endoftext|>')" in given


def test_a_generation_prompt_that_answers_do_not_have_is_refused(tmp_path):
    opens_thought = CHATML.replace("'<|im_start|>assistant\n' if", "'<|im_start|>assistant\n<think>\n' if")
    with pytest.raises(tokenization.Refused, match=r"the completion has no beginning; .* chat_template_kwargs"):
        rows(opens_thought, tmp_path=tmp_path)


def test_what_of_a_template_will_surprise_is_said(tmp_path):
    folder = tmp_path / "t"
    folder.mkdir()
    write_tokenizer(folder, CHATML)
    given = tokenization.warnings(tokenization.encoder(tokenization.load_tokenizer(folder, chat_template="llama3")))
    assert (
        len(given) == 1
        and "<|end_header_id|>, <|eot_id|>, <|start_header_id|>, which this tokenizer does not" in given[0]
    )
    assert tokenization.warnings(tokenization.encoder(tokenization.load_tokenizer(folder))) == []
    headless = "{% for m in messages %}{{ m.role + '\n' + m.content + eos_token }}{% endfor %}"
    given = tokenization.warnings(tokenization.encoder(tokenization.load_tokenizer(folder, chat_template=headless)))
    assert len(given) == 1 and "has no generation prompt: it writes 'assistant' before an answer" in given[0]
    plain = "{% for m in messages %}{{ m.content + (eos_token if m.role == 'assistant' else ' ') }}{% endfor %}"
    assert tokenization.warnings(tokenization.encoder(tokenization.load_tokenizer(folder, chat_template=plain))) == []


# --- cuts


def prepared(rows, encoder, **limits):
    records = [data.Record(*row, f"f:{number}") for number, row in enumerate(rows, 1)]
    return data.prepare(records, encoder, **limits)


def test_candidates_of_a_group_follow_one_prompt(tmp_path):
    folder = tmp_path / "t"
    folder.mkdir()
    write_tokenizer(folder, None)
    encoder = tokenization.encoder(tokenization.load_tokenizer(folder))
    group = [("0123456789", ["a", "bcdef"], [1.0, 0.0])]
    limits = {"max_length": 12, "max_completion_length": 8}
    rows, audit = prepared(group, encoder, **limits)
    shown = [encoder.tokenizer.decode(rows.row(k)[0]) for k in (0, 1)]
    assert shown == ["456789a<|im_end|>", "456789bcdef<|im_end|>"]
    assert (audit.prompts_differ, audit.prompt_tokens_cut) == (0, 4)
    rows, audit = prepared(group, encoder, cut_prompts_together=False, **limits)
    shown = [encoder.tokenizer.decode(rows.row(k)[0]) for k in (0, 1)]
    assert shown == ["0123456789a<|im_end|>", "456789bcdef<|im_end|>"]  # the original
    assert (audit.prompts_differ, audit.prompt_tokens_cut) == (1, 4)
    assert "prompts differ          1  groups" in audit.text() and "of 1 groups, 4 tokens lost" in audit.text()


def test_answers_are_cut_to_the_room_that_is_left_and_a_header_is_no_answer(tmp_path):
    folder = tmp_path / "t"
    folder.mkdir()
    write_tokenizer(folder, CHATML)
    tokenizer = tokenization.load_tokenizer(folder)
    prompt, answers = "x", ["y" * 40, "z" * 10]
    opened = 1 + len("user\nx") + 2 + 1 + len("assistant\n")
    limits = {"max_length": opened + 40, "max_prompt_length": opened + 30}  # one token too few for the first
    group = [(prompt, answers, [1.0, 0.0])]
    _, audit = prepared(group, tokenization.encoder(tokenizer), **limits)
    assert (audit.completions_cut, audit.completion_tokens_cut) == (1, 1) and "rows, 1 tokens lost" in audit.text()
    _, audit = prepared(group, tokenization.encoder(tokenizer), truncate_together=True, **limits)
    assert (audit.completions_cut, audit.completion_tokens_cut) == (2, 32)  # the original: all keep what is left beside
    original = tokenization.PromptFormat(assistant_header="completion", append_eos="unless_last")
    header = 1 + len("assistant\n")
    short = {"max_length": 16 + header, "max_prompt_length": 16}
    with pytest.raises(ValueError, match="no_scored_token 1"):
        prepared([("x" * 40, answers, [1.0, 0.0])], tokenization.encoder(tokenizer, original), **short)
    rows, _ = prepared(
        [("x" * 40, answers, [1.0, 0.0])],
        tokenization.encoder(tokenizer, original),
        **(short | {"max_length": 17 + header}),
    )
    assert tokenizer.decode(rows.row(0)[0]).endswith("<|im_start|>assistant\ny")


# --- an export checks itself


def test_a_run_whose_export_would_be_asked_otherwise_does_not_start(tmp_path, monkeypatch):
    """The tokenizer on disk encodes otherwise than the one of the training: told before anything is trained."""
    model = write_model(tmp_path / "m", CHATML)
    c = run_config(model, write_rows(tmp_path / "rows.jsonl", CHAT_ROWS))
    write = hf.companions.prompt_format.write

    def other(directory, settled, **options):
        write(directory, settled, **options)
        path = directory / "tokenizer.json"
        path.write_text(path.read_text().replace('"add_prefix_space":false', '"add_prefix_space":true'))
        found = json.loads(path.read_text())
        found["pre_tokenizer"]["add_prefix_space"] = True
        path.write_text(json.dumps(found))

    monkeypatch.setattr(hf.companions.prompt_format, "write", other)
    with pytest.raises(
        ValueError, match="transformers would not render .* as it was trained: the conversation: trained"
    ):
        trainer.run(c, tmp_path / "w", devices=_one_device())
    assert not (tmp_path / "w" / "config.json").exists() and not (tmp_path / "w" / checkpoint.SOURCE_FOLDER).exists()
    monkeypatch.undo()
    trainer.run(c, tmp_path / "w", devices=_one_device())  # the same workdir is free


def test_an_adapter_carries_the_tokenizer_too(tmp_path):
    model = write_model(tmp_path / "m", DEFAULT_SYSTEM)
    changed = {"lora__rank": 2, "tokenizer__chat_template": "zephyr", "data__auto_insert_empty_system": True}
    c = run_config(model, write_rows(tmp_path / "rows.jsonl", CHAT_ROWS), **changed)
    trainer.run(c, tmp_path / "w", devices=_one_device())
    export.export(tmp_path / "w", tmp_path / "a", step=None, dtype=None, lora="adapter")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    text = theirs.apply_chat_template(CHAT_ROWS[0]["prompt"], tokenize=False, add_generation_prompt=True)
    assert text == "<|system|>\n<|im_end|>\n<|user|>\n1+1?<|im_end|>\n<|assistant|>\n"
    assert tokenization.prompt_format.read(tmp_path / "a")[0].auto_insert_empty_system
    found = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert found["base_model_name_or_path"] == str(model) and found["revision"] is None


def test_a_run_from_an_export_says_where_it_asks_otherwise(tmp_path, caplog):
    """The export of a run with an empty system turn has it in its template, and needs the field no more."""
    model = write_model(tmp_path / "m", DEFAULT_SYSTEM)
    data_file = write_rows(tmp_path / "rows.jsonl", CHAT_ROWS)
    trainer.run(
        run_config(model, data_file, data__auto_insert_empty_system=True), tmp_path / "w", devices=_one_device()
    )
    export.export(tmp_path / "w", tmp_path / "e", step=None, dtype=None)
    caplog.clear()
    run_inputs.prepare(run_config(tmp_path / "e", data_file))
    assert "another prompt format" not in caplog.text
    run_inputs.prepare(run_config(tmp_path / "e", data_file, tokenizer__chat_template="chatml"))
    assert "model.path was trained with another prompt format: chat template of" in caplog.text
