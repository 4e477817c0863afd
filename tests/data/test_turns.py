"""Rows with tools and completions of several turns: how they are read, what is scored, in every layout."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from fpo_jax import data, hf
from fpo_jax.cli import generate, init, label
from fpo_jax.data import values
from fpo_jax.inference import reward_model
from fpo_jax.models import params
from fpo_jax.trainer import dataset_cache, run_inputs, sample_completions
from tests import batches, tiny, tolerances
from tests.paths import REPO

# every token is a byte or a control token, so that a text and its parts have the same ids
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}</s>{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ADD = {"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "integer"}}}}
USER, AGAIN = {"role": "user", "content": "1+1?"}, {"role": "user", "content": "why?"}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]}
CALLED = CALL | {"content": None}
RESULT = {"role": "tool", "name": "add", "content": "2"}
CHAT = {"data__rule": "chat", "data__max_completion_length": None, "data__max_prompt_length": 150}
CHAT |= {"data__max_length": 240, "data__format": "auto", "tokenizer__chat_template": TEMPLATE, "data__eval": ""}
SFT = {"stage": "sft", "loss__name": "sft", "loss__alpha": None, "loss__beta_pi": None, "data__group_size": 1}


def bot(content):
    return {"role": "assistant", "content": content}


PAIR = {
    "prompt": [USER],
    "tools": [ADD],
    "chosen": [CALL, RESULT, bot("two")],
    "rejected": [bot("3"), AGAIN, bot("so")],
}
# the same by hand: texts, and whether they are scored
HEAD = json.dumps([ADD]) + "</s><user>1+1?</s>\n<assistant>"
CHOSEN = [
    (HEAD, False), ('{"name": "add", "arguments": {"a": 1}}</s>', True), ("\n<tool>2</s>\n<assistant>", False),
    ("two</s>", True),
]  # fmt: skip
REJECTED = [(HEAD, False), ("3</s>", True), ("\n<user>why?</s>\n<assistant>", False), ("so</s>", True)]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(tmp_path, *rows, **options):
    return data.read(write(tmp_path / "rows.jsonl", *rows), **{"format": "auto", **options})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("turns")
    tiny.write_model(root / "model", layers=1, max_positions=256)
    write(root / "pairs.jsonl", PAIR, PAIR | {"prompt": [AGAIN]}, PAIR | {"rejected": [bot("no")]})
    return root


def prepared_of(root, source="pairs.jsonl", **changed):
    return run_inputs.prepare(tiny.config(root / "model", root / source, **CHAT | changed)).train


class TestReading:
    @pytest.mark.parametrize(
        ("row", "prompt", "completions"),
        [
            (PAIR, [USER], [[CALLED, RESULT, bot("two")], [bot("3"), AGAIN, bot("so")]]),
            (PAIR | {"chosen": [USER, CALL, RESULT, bot("two")], "rejected": bot("3")}, [USER],
             [[CALLED, RESULT, bot("two")], bot("3")]),
            ({"chosen": [USER, CALL, RESULT, bot("two")], "rejected": [USER, bot("3")]}, [USER],
             [[CALLED, RESULT, bot("two")], bot("3")]),
            ({"chosen": [USER, CALL, RESULT, bot("2")], "rejected": [USER, CALL, RESULT, bot("3")]},
             [USER, CALLED, RESULT], [bot("2"), bot("3")]),
            ({"prompt": [USER], "completions": [[bot("a"), AGAIN, bot("b")], "c"], "rewards": [1, 0]}, None, None),
            ({"prompt": "p", "completion": [CALL, RESULT, bot("b")], "label": True}, "p",
             [[CALLED, RESULT, bot("b")]]),
            ({"messages": [USER, CALL, RESULT, bot("two")]}, [USER], [CALLED]),
        ],
        ids=["explicit", "with the prompt", "implicit", "implicit, later", "mixed", "label", "messages"],
    )  # fmt: skip
    def test_completions_of_several_messages(self, tmp_path, row, prompt, completions):
        if prompt is None:
            with pytest.raises(ValueError, match="some completions are texts and some are messages"):
                read(tmp_path, row)
            return
        first = read(tmp_path, row).rows[0]
        assert (first.prompt, list(first.completions)) == (prompt, completions)

    @pytest.mark.parametrize(
        ("chosen", "rejected"),
        [([USER, bot("a")], [AGAIN, bot("a")]), ([USER, bot("a"), USER, bot("b")], [USER, bot("a"), AGAIN, bot("b")]),
         ([USER, bot("a")], [USER, bot("a"), AGAIN, bot("b")]),
         ([bot("a"), AGAIN, bot("b")], [bot("c"), AGAIN, bot("b")])],
    )  # fmt: skip
    def test_conversations_that_do_not_part_in_an_assistant_turn_are_dropped(self, tmp_path, chosen, rejected):
        assert list(read(tmp_path, {"chosen": chosen, "rejected": rejected}).dropped) == ["prompts_differ"]

    @pytest.mark.parametrize(
        "tools", [[ADD], json.dumps([ADD]), [ADD | {"strict": None}]], ids=["list", "text", "null"]
    )
    @pytest.mark.parametrize(
        "row",
        [
            {"prompt": "p", "chosen": "a", "rejected": "b"},
            {"chosen": [USER, bot("a")], "rejected": [USER, bot("b")]},
            {"messages": [USER, bot("a"), USER, bot("b")]},
            {"prompt": "p", "completion": "a", "label": False},
            {"prompt": "p", "completions": ["a", "b"], "rewards": [0.1, 1]},
        ],
        ids=lambda row: "+".join(row),
    )
    def test_tools_of_any_format(self, tmp_path, row, tools, caplog):
        found = read(tmp_path, row | {"tools": tools})
        assert [one.tools for one in found.rows] == [[ADD]] * len(found.rows) and not found.noted and not caplog.text
        assert [one.tools for one in read(tmp_path, row | {"tools": []}).rows] == [None] * len(found.rows)
        memory = data.read([row | {"tools": tools}], format="auto")
        assert [one[:3] + one[4:] for one in memory.rows] == [one[:3] + one[4:] for one in found.rows]

    def test_arguments_in_a_text_are_read_and_nulls_of_tables_left_out(self):
        function = {"name": "add", "arguments": '{"a": null}', "strict": None}
        turn = {"role": "assistant", "content": "", "tool_calls": [{"id": None, "function": function}], "name": None}
        read_function = {"name": "add", "arguments": {"a": None}}
        assert values.message(turn, "m") == bot("") | {"tool_calls": [{"function": read_function}]}
        assert values.message(bot("a") | {"tool_calls": []}, "m") == bot("a")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"tools": "add"}, r"tools: broken JSON"),
            (
                {"tools": {"name": "add"}},
                r"tools must be a list of objects, or that list as a JSON text, not an object",
            ),
            ({"tools": [{"function": {}}]}, r"tools\[0\] has no name; write a JSON schema as transformers.utils.get"),
            ({"chosen": [bot(None), RESULT, bot("a")]}, r"completion 0\[0\].content must be a text, not null"),
            ({"chosen": [CALL, RESULT]}, r"completion 0 must be an assistant turn, not one of role 'tool'"),
            ({"chosen": CALL | {"tool_calls": [{"arguments": {}}]}}, r"\[0\].tool_calls\[0\] names no function; write"),
            (
                {"chosen": CALL | {"tool_calls": [{"name": "f", "arguments": [1]}]}},
                r"arguments must be an object, not a",
            ),
            ({"chosen": CALL | {"tool_calls": [{"name": "f", "arguments": "{"}]}}, r"arguments: broken JSON"),
            ({"chosen": USER | {"tool_calls": CALL["tool_calls"]}}, r"0\[0\] carries tool_calls, which no template"),
        ],
    )
    def test_bad_rows(self, tmp_path, change, message):
        with pytest.raises(ValueError, match=r"rows.jsonl:1: .*" + message):
            read(tmp_path, PAIR | change, format="json")


class TestRows:
    def test_what_is_scored_to_the_letter(self, root):
        found = prepared_of(root)
        texts = ["".join(f"⟦{text}⟧" if scored else text for text, scored in CHOSEN)]
        assert found.sample == texts[0]
        prepared = found.prepared
        assert prepared.prompt_lengths_N[0] == len(HEAD) - 3 * HEAD.count("</s>")
        assert found.audit.scored_tokens == prepared.loss_tokens_N.sum() and not found.audit.double_eos
        last = prepared_of(root, data__assistant_turns="last")
        assert last.sample == "".join(text for text, _ in CHOSEN[:-1]) + "⟦two</s>⟧"
        assert last.prepared.loss_tokens_N.tolist() == [4, 3, 4, 3, 4, 3]
        assert last.fingerprint() != found.fingerprint()

    def test_a_sample_of_the_groups_keeps_their_masks(self, root):
        prepared = prepared_of(root).prepared
        taken = prepared.take(np.array([2, 0]))
        for place, row in enumerate((4, 5, 0, 1)):
            assert taken.loss_places(place).tolist() == prepared.loss_places(row).tolist()

    def test_empty_turns_drop_the_row_and_calls_are_no_empty_turns(self, root):
        write(root / "empty.jsonl", PAIR, PAIR | {"rejected": [bot(" "), AGAIN, bot("so")]})
        found = prepared_of(root, "empty.jsonl")
        assert found.prepared.groups == 1 and list(found.audit.dropped) == ["empty_completion"]

    def test_tools_under_rule_raw_are_refused(self, root):
        write(root / "raw.jsonl", {"prompt": "p", "chosen": "a", "rejected": "b", "tools": [ADD]})
        with pytest.raises(ValueError, match=r"raw.jsonl:1: rule='raw' takes plain text, and tools are shown by"):
            run_inputs.prepare(tiny.config(root / "model", root / "raw.jsonl", data__format="auto", data__eval=""))

    def test_a_template_without_tools_is_refused_at_the_start(self, root):
        with pytest.raises(ValueError, match=r"pairs.jsonl:1: the chat template does not show the model the tools"):
            prepared_of(root, tokenizer__chat_template=TEMPLATE.replace("if tools", "if false"))

    def test_kept_data_are_those_of_these_tools(self, root):
        config = tiny.config(root / "model", root / "tools.jsonl", **CHAT)
        encoder, names = run_inputs.read_encoder(config, root / "model"), set()
        for name in ("add", "sum"):
            write(root / "tools.jsonl", {**PAIR, "tools": [{"name": name}], "chosen": [bot("a")]})
            sources = dataset_cache.sources(config, "train")
            found = dataset_cache.parts(
                config, "train", sources, encoder, hf.read_config(root / "model"), reward_pad_id=None
            )
            names.add(json.dumps(found, sort_keys=True))
        assert len(names) == 2

    def test_kept_data_are_read_as_they_were_made(self, root, tmp_path):
        made = prepared_of(root)
        for _ in range(2):  # written, then read
            kept = prepared_of(root, data__cache_dir=str(tmp_path))
            assert kept.fingerprint() == made.fingerprint() and kept.sample == made.sample
            assert kept.prepared.loss_places(0).tolist() == made.prepared.loss_places(0).tolist()

    def test_packed_demonstrations_have_the_turns_of_padded_ones(self, root):
        write(root / "sft.jsonl", *[{"prompt": "1", "completion": PAIR["rejected"]}] * 3)
        plain = prepared_of(root, "sft.jsonl", **SFT).prepared
        packed = prepared_of(root, "sft.jsonl", **SFT, data__packing=True).prepared
        assert packed.groups < plain.groups == 3 and packed.loss_tokens_N.sum() == plain.loss_tokens_N.sum()
        places = packed.loss_places(0)
        ids, _ = packed.row(0)
        assert ids[places].tolist()[: plain.loss_tokens_N[0]] == plain.row(0)[0][plain.loss_places(0)].tolist()


# --- the same numbers as a plain computation


@pytest.mark.parity
def test_log_probs_and_gradients_are_those_of_transformers_in_every_layout(root):
    torch = pytest.importorskip("torch", reason="torch, the other side of the parity tests, is not installed")
    import transformers

    twin = transformers.AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "model")
    weight_K, expected_K = np.array([1.0, -0.7], np.float32), []
    for parts, weight in zip((CHOSEN, REJECTED), weight_K.tolist(), strict=True):
        ids = [tokenizer.encode(text, add_special_tokens=False) for text, _ in parts]
        scored = torch.tensor([part[1] for part, own in zip(parts, ids, strict=True) for _ in own])
        tokens = torch.tensor([[token for own in ids for token in own]])
        logps = torch.log_softmax(twin(tokens).logits[0, :-1], -1).gather(-1, tokens[0, 1:, None])[:, 0]
        total = (logps * scored[1:]).sum()
        (weight * total).backward()
        expected_K.append(total.item())
    theirs = {name: parameter.grad.numpy() for name, parameter in twin.named_parameters()}

    config, weights = hf.read_config(root / "model"), None
    weights = hf.load_params(root / "model", config, dtype="float32")
    prepared = prepared_of(root).prepared
    for layout in ("padded", "packed", "shared"):
        options = {"batch_size": 3, "seed": 0}
        if layout == "padded":
            schedule = data.schedule(prepared, **options, buckets=(240,))
        else:
            packing = {"multiple": 1, "longest": 512, "head_cost": 0.1, "steps": 1}
            schedule = data.packed(prepared, layout=layout, **options, **packing)
        batch = data.batch_at(schedule, 0)
        assert batch.loss_mask_NR.sum() == prepared.loss_tokens_N.sum()
        group = int(np.flatnonzero(batch.row_ids_B == 0)[0])
        forward_fn = batches.forward_fn(config)

        def total(weights, batch=batch, group=group, forward_fn=forward_fn):
            logps_K = forward_fn(weights, batch).sum_N.reshape(batch.rewards_BK.shape)[group]
            return jnp.sum(weight_K * logps_K), logps_K

        grads, logps_K = jax.jit(jax.grad(total, has_aux=True))(weights)
        assert_allclose(logps_K, expected_K, rtol=tolerances.SHARED_LOGPS, err_msg=layout)
        grads = {path: np.asarray(grad) for path, grad in params.flatten(grads).items()}
        for entry in params.entries(config):
            for name, place in entry.tensors():
                own = params.to_hf(entry, grads[entry.path][place])
                atol = tolerances.PARITY_GRADIENT * np.abs(theirs[name]).max()
                assert_allclose(own, theirs[name], rtol=0, atol=atol, err_msg=f"{layout} {name}")


# --- programs


def test_the_example_of_the_documentation_is_read(tmp_path):
    page = (REPO / "docs" / "datasets.md").read_text().partition("## Tools")[2]
    [record] = read(tmp_path, json.loads(page.partition("```json\n")[2].partition("\n")[0])).rows
    assert [turn["role"] for turn in record.completions[0]] == ["assistant", "tool", "assistant"] and record.tools


def test_init_shows_tools_and_calls(root, capsys):
    model = root / "knows"
    tiny.write_model(model, layers=1, max_positions=256)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    assert init.main(["--data", str(root / "pairs.jsonl"), "--model", str(model), "--out", str(root / "own.py")]) == 0
    printed = capsys.readouterr().out
    assert "tools in 3 of the first 3 examples" in printed and "".join(t for t, s in CHOSEN if not s)[:60] in printed
    assert '⟦{"name": "add", "arguments": {"a": 1}}</s>⟧' in printed
    ignorant = ["--data", str(root / "pairs.jsonl"), "--model", str(root / "model"), "--out", str(root / "no.py")]
    assert init.main(ignorant) == 2 and not (root / "no.py").exists()
    assert "does not show the model the tools of this row (add)" in capsys.readouterr().err


def test_prompts_are_sampled_with_their_tools(root):
    encoder = run_inputs.read_encoder(tiny.config(root / "model", root / "pairs.jsonl", **CHAT), root / "model")
    [record, *_] = data.read(root / "pairs.jsonl", format="auto").rows
    prompts = [generate._Prompt(0, record), generate._Prompt(1, record._replace(tools=None))]
    generate._tokenize(prompts, encoder, 200)
    own = prepared_of(root).prepared.row(0)
    assert prompts[0].ids == own[0][: own[1]].tolist() and len(prompts[1].ids) < own[1]
    assert generate._head(prompts[0])["tools"] == [ADD] and "tools" not in generate._head(prompts[1])
    config = tiny.config(
        root / "model",
        root / "pairs.jsonl",
        **CHAT | {"data__eval": str(root / "pairs.jsonl"), "completions__count": 1},
    )
    assert [one.tools for one in sample_completions._prompts(config, encoder, {})][:1] == [[ADD]]
    with pytest.raises(ValueError, match="rows.jsonl:1 offers tools, whose calls a server writes in a form of its own"):
        offering = data.read(write(root / "rows.jsonl", PAIR), format="auto").rows[0]
        generate._with_server(None, [generate._Prompt(0, offering)], None)


def test_labels_read_the_tools_of_a_line(root):
    line = {"prompt": [USER], "completions": ["a", "b"], "tools": json.dumps([ADD])}
    [found] = label._lines(write(root / "answers.jsonl", line))
    encoder = run_inputs.read_encoder(tiny.config(root / "model", root / "pairs.jsonl", **CHAT), root / "model")
    options = {"pad_id": None, "window": 200}
    [[row, _]] = reward_model.rows(encoder, [[USER]], [found["completions"]], tools=[found["tools"]], **options)
    assert encoder.tokenizer.decode(row.ids).startswith(HEAD)
    pair = label.best_worst(found | {"rewards": [1.0, 0.0]})
    assert pair is not None and pair["tools"] == [ADD]
    with pytest.raises(ValueError, match=r"answers.jsonl:1: tools\[0\] has no name"):
        label._lines(write(root / "answers.jsonl", line | {"tools": [{}]}))
