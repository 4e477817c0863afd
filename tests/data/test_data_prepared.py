"""Records to rows: groups, what is dropped, the audit's exact counts, the fingerprint, the decoded sample."""

import json

import numpy as np
import pytest

from fpo_jax import data, tokenization
from fpo_jax.data import Record, Records
from tests import real_tokenizers, toy_tokenizers
from tests.paths import shared_data

RAW = dict(max_length=40, max_completion_length=12)
CHAT = dict(max_length=40, max_prompt_length=20)
HEAD = "\n\nHuman: Hi\n\nAssistant:"


@pytest.fixture(scope="module")
def toy():
    return toy_tokenizers.byte_bpe(bos="<s>")


def pair(chosen=" Yes", rejected=" No", prompt=HEAD, source="f:1"):
    return Record(prompt, [chosen, rejected], [1.0, 0.0], source)


def raw(tokenizer):
    return tokenization.encoder(tokenizer, tokenization.PromptFormat(rule="raw"))


def prepare(records, tokenizer, **options):
    return data.prepare(records, raw(tokenizer), **(RAW | options))


class TestRows:
    def test_flat_storage(self, toy):
        records = [pair(), pair(" an the", " a", source="f:2"), pair(" the", " an", "the a", "f:3")]
        prepared, _ = prepare(records, toy)
        assert (prepared.groups, prepared.group_size, prepared.sources) == (3, 2, ("f:1", "f:2", "f:3"))
        encoder = tokenization.encoder(toy)
        for group, record in enumerate(records):
            head = tokenization.encode(encoder, [record.prompt])[0]
            for index, completion in enumerate(record.completions):
                ids, prompt_length = prepared.row(group * 2 + index)
                assert ids.tolist() == head + tokenization.encode(encoder, [completion])[0] + [encoder.eos_id]
                assert prompt_length == len(head)
        np.testing.assert_array_equal(prepared.rewards_BK, [[1, 0]] * 3)
        kinds = [array.dtype for array in prepared[:5]]
        assert kinds == [np.int32, np.int64, np.int32, np.int32, np.float32]

    def test_consecutive_groups_of_many_candidates(self, toy):
        record = Record(HEAD, [" a", " b", " c", " d", " e", " f"], [6.0, 5.0, 4.0, 3.0, 2.0, 1.0], "f:9")
        prepared, audit = prepare([record], toy, group_size=3)
        np.testing.assert_array_equal(prepared.rewards_BK, [[6, 5, 4], [3, 2, 1]])
        assert prepared.sources == ("f:9#0", "f:9#1") and audit.groups_formed == 2
        last = [toy.decode(prepared.row(row)[0][prepared.row(row)[1] :]) for row in range(6)]
        assert last == [f" {letter}</s>" for letter in "abcdef"]

    def test_group_size_must_divide(self, toy):
        record = Record(HEAD, [" a", " b", " c"], [1.0, 2.0, 3.0], "f:9")
        with pytest.raises(ValueError, match=r"f:9: 3 completions with 3 rewards do not make groups of 2"):
            prepare([record], toy)
        with pytest.raises(ValueError, match=r"f:9: 3 completions with 2 rewards"):
            prepare([record._replace(rewards=[1.0, 0.0])], toy, group_size=3)
        with pytest.raises(ValueError, match=r"group_size=0 is no number of completions"):
            prepare([record], toy, group_size=0)
        assert prepare([record], toy, group_size=1)[0].groups == 3  # demonstrations

    @pytest.mark.parametrize("reward", [float("nan"), float("-inf"), 1e39])
    def test_rewards_must_be_finite(self, toy, reward):
        with pytest.raises(ValueError, match=r"f:1: rewards \[1\.0, .*\] are not all finite float32 numbers"):
            prepare([pair()._replace(rewards=[1.0, reward])], toy)

    def test_chunks_join_seamlessly(self, toy):
        records = [pair(f" {number}", f" {number + 1}", source=f"f:{number}") for number in range(600)]
        prepared, _ = prepare(records, toy)
        alone = [prepare([record], toy)[0] for record in (records[255], records[256], records[599])]
        for group, single in zip((255, 256, 599), alone, strict=True):
            for completion in range(2):
                np.testing.assert_array_equal(prepared.row(group * 2 + completion)[0], single.row(completion)[0])

    def test_messages_need_the_chat_rule(self, toy):
        record = Record([{"role": "user", "content": "u"}], ["a", "b"], [1.0, 0.0], "f:4")
        with pytest.raises(ValueError, match=r"f:4: rule='raw' takes plain text, .* use rule='chat'"):
            prepare([record], toy)

    def test_chat_rule_needs_a_template(self, toy):
        with pytest.raises(ValueError, match=r"^the tokenizer .* has no chat template"):
            data.prepare([pair()], tokenization.encoder(toy, tokenization.PromptFormat()), **CHAT)

    def test_error_inside_a_chunk_names_its_record(self):
        tokenizer = toy_tokenizers.byte_bpe(bos="<s>", template=tokenization.CHAT_TEMPLATES["gemma2"])
        good = pair(source="f:1")
        bad = pair(prompt=[{"role": "system", "content": "s"}], source="f:2")
        encoder = tokenization.encoder(tokenizer)
        with pytest.raises(ValueError, match=r"^f:2: the chat template leaves out the text of a turn of role 'system'"):
            data.prepare([good, bad, good], encoder, **CHAT)
        refused = pair(prompt=[{"role": "critic", "content": "c"}], source="f:3")
        with pytest.raises(
            ValueError, match=r"^f:3: the chat template refuses a conversation of the turns critic: Gemma"
        ):
            data.prepare([good, refused], encoder, **CHAT)
        prepared, audit = data.prepare([good, bad, refused, good], encoder, on_bad_row="skip", **CHAT)
        assert prepared.sources == ("f:1", "f:1")
        assert audit.dropped == {"text_lost": ("f:2",), "template_refuses": ("f:3",)}


class TestPolicies:
    def test_empty_completions(self, toy):
        records = [pair(), pair("", source="f:2"), pair(rejected=" \n", source="f:3")]
        prepared, audit = prepare(records, toy)
        assert prepared.groups == 1 and audit.dropped == {"empty_completion": ("f:2", "f:3")}
        with pytest.raises(
            ValueError, match=r"f:3: completion 1 is empty; remove the row, or on_empty_completion='drop'"
        ):
            prepare(records[2:], toy, on_empty_completion="error")

    @pytest.mark.parametrize("cut", [0, 1, 2])
    def test_long_prompts(self, toy, cut):
        record = pair(" a", " an", source="f:5")
        [[row], _] = tokenization.raw_rows(
            tokenization.encoder(toy), [HEAD] * 2, [[" a"], [" an"]], max_length=90, max_completion_length=9
        )
        limits = dict(max_length=len(row.ids) - cut)
        kept, audit = prepare([record, pair(" a", " an", "an")], toy, **limits)
        assert kept.groups == 2 and audit.prompts_cut == (cut > 0)
        kept, audit = prepare([record, pair(" a", " an", "an")], toy, on_long_prompt="drop", **limits)
        assert kept.groups == 2 - (cut > 0) and audit.prompts_cut == 0
        assert audit.dropped == ({"long_prompt": ("f:5",)} if cut else {})
        if cut:
            with pytest.raises(ValueError, match=rf"f:5: the prompt does not fit into max_length=\d+ .* {cut} of its"):
                prepare([record], toy, on_long_prompt="error", **limits)
        else:
            prepare([record], toy, on_long_prompt="error", **limits)

    def test_identical_completions(self, toy):
        same, long = pair(" Yes", " Yes", source="f:6"), pair(" Yes a", " Yes b", source="f:7")
        prepared, audit = prepare([pair(), same, long], toy, max_completion_length=3)
        assert audit.dropped == {"identical": ("f:6",), "identical_after_cut": ("f:7",)} and prepared.groups == 1
        prepared, audit = prepare([pair(), same, long], toy, max_completion_length=3, on_identical="keep")
        assert audit.noted == {"identical": ("f:6",), "identical_after_cut": ("f:7",)} and prepared.groups == 3

    def test_two_equal_of_three_are_not_identical(self, toy):
        record = Record(HEAD, [" a", " a", " b"], [1.0, 1.0, 0.0], "f:8")
        prepared, audit = prepare([record], toy, group_size=3)
        assert prepared.groups == 1 and not audit.dropped and audit.ties == 1

    def test_prompt_without_a_token(self, toy):
        prepared, audit = prepare([pair(), pair(prompt="", source="f:2")], toy)
        assert prepared.groups == 1 and audit.dropped == {"empty_prompt": ("f:2",)}

    def test_every_kept_row_has_a_prompt_and_a_scored_token(self, toy):
        random = np.random.default_rng(0)
        records = [
            pair(*("an the a " * n for n in random.integers(0, 6, 2)), prompt="the " * random.integers(0, 30))
            for _ in range(300)
        ]
        prepared, _ = prepare(records, toy, max_length=12, max_completion_length=11)
        assert prepared.prompt_lengths_N.min() == 1
        assert (prepared.lengths_N > prepared.prompt_lengths_N).all() and prepared.lengths_N.max() == 12

    def test_nothing_left(self, toy):
        with pytest.raises(ValueError, match=r"no group is left of 3 rows read: prompts_differ 1, empty_completion 2"):
            prepare(Records([pair(""), pair(rejected=" ")], {"prompts_differ": ["f:9"]}), toy)
        with pytest.raises(ValueError, match=r"no group is left of 0 rows read: there were none"):
            prepare([], toy)

    @pytest.mark.parametrize(
        "options, message",
        [
            (dict(on_bad_row="drop"), r"on_bad_row='drop' is not one of error, skip"),
            (dict(on_empty_completion="skip"), r"on_empty_completion='skip' is not one of drop, error"),
            (dict(on_long_prompt="cut"), r"on_long_prompt='cut' is not one of truncate, drop, error"),
            (dict(on_identical="error"), r"on_identical='error' is not one of drop, keep"),
            (dict(truncation_mode="left"), r"truncation_mode='left' is not one of keep_end, keep_start"),
            (
                dict(max_completion_length=None),
                r"rule='raw' needs max_completion_length, a number of tokens below max_length=40",
            ),
            (dict(max_completion_length=40), r"max_completion_length=40 with max_length=40 leaves no room"),
        ],
    )
    def test_options(self, toy, options, message):
        with pytest.raises(ValueError, match=message):
            prepare([pair()], toy, **options)


class TestVocabulary:
    def test_token_outside_the_model(self, toy):
        tail = max((index, toy.decode([index])) for index in toy.get_vocab().values() if index > 256)[1]
        records = [
            pair(" a", " an", "a"),
            pair(" a", " an", prompt=tail + " a", source="f:2"),
        ]  # first token of its row
        largest = prepare(records, toy)[1].largest_token_id
        assert largest == len(toy) - 1
        prepare(records, toy, vocab_size=largest + 1)
        with pytest.raises(
            ValueError, match=rf"f:2: token id {largest} is outside the model's vocabulary of {largest}"
        ):
            prepare(records, toy, vocab_size=largest)

    def test_pad_is_eos_where_there_is_none(self, toy):
        prepared, audit = prepare([pair()], toy)
        assert prepared.pad_id == toy.eos_token_id and "= EOS as the model knows no pad token" in audit.pad
        assert audit.missing_eos == 0  # EOS is scored although it is pad too

    def test_pad_outside_the_model_is_not_used(self):
        tokenizer = toy_tokenizers.byte_bpe()
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        assert prepare([pair()], tokenizer)[0].pad_id == len(tokenizer) - 1
        assert prepare([pair()], tokenizer, vocab_size=len(tokenizer) - 1)[0].pad_id == tokenizer.eos_token_id


class TestAudit:
    def test_gpt_neox_on_the_hh_rows(self):
        tokenizer = real_tokenizers.encoder("neox").tokenizer
        records = data.read(shared_data("hh_rlhf", "harmless-base.1800.jsonl.gz"), format="hh")
        limits = dict(max_length=512, max_completion_length=200, cut_prompts_together=False)
        prepared, audit = data.prepare(records, raw(tokenizer), buckets=(128, 256, 512), **limits)
        found = {name: len(places) for name, places in (audit.dropped | audit.noted).items()}
        assert found == {"prompts_differ": 2, "empty_completion": 4, "odd_turns": 5}
        counts = audit._asdict()
        expected = dict(rows_read=1800, groups_formed=1798, groups=1794, tokens=593105, scored_tokens=161587)
        expected |= dict(prompts_cut=54, completions_cut=48, missing_eos=48, missing_eos_unexplained=0)
        expected |= dict(merged=0, double_bos=0, no_bos=0, ties=0)
        assert {name: counts[name] for name in expected} == expected
        assert [bucket[:2] for bucket in audit.buckets] == [(128, 733), (256, 664), (512, 397)]
        assert audit.lengths["row"].most == 512 and audit.lengths["completion"].most == 200
        assert sum(audit.lengths["prompt"].counts) == 3588
        once, twice = (data.prepare(records.rows[:90], raw(tokenizer), **limits)[0].fingerprint() for _ in range(2))
        assert once == twice != prepared.fingerprint()
        assert (prepared.tokens_S[prepared.starts_N + prepared.lengths_N - 1] == 0).sum() == 3588 - 48

    @pytest.mark.parametrize(
        "name, template, prompts, completions, no_bos, scored",
        [
            ("phi3", None, 95, 119, 0, 201682),
            ("mistral1", "mistral", 94, 95, 188, 197268),
            ("mistral1", "zephyr", 99, 103, 198, 200806),
        ],
    )
    def test_chat_pairs(self, name, template, prompts, completions, no_bos, scored):
        encoder = real_tokenizers.encoder(name, template, real_tokenizers.ORIGINAL)
        records = data.read(shared_data("pref_chat", "ultrafeedback_shaped.jsonl.gz"), format="chat_pairs")
        prepared, audit = data.prepare(records, encoder, max_length=1024, max_prompt_length=512, truncate_together=True)
        assert (audit.groups, audit.prompts_cut, audit.completions_cut) == (300, prompts, completions)
        assert (audit.double_bos, audit.no_bos, audit.missing_eos_unexplained, audit.merged) == (0, no_bos, 0, 0)
        assert audit.scored_tokens == scored and prepared.lengths_N.max() == 1024
        assert (prepared.lengths_N - prepared.prompt_lengths_N).min() > 1

    def test_counts_of_a_drawn_set(self):
        tokenizer = toy_tokenizers.byte_bpe(bos="<s>", pad="<pad>", adds_bos=True)
        records = Records(
            [
                pair(" an", " the", "a", "d/f:1"),
                pair(" an an an an", " the", "a a a", "d/f:2"),
                pair("a", "an", "a ", "d/f:3"),
            ],
            dropped={"prompts_differ": ["d/f:4"]},
            noted={"odd_turns": ["d/f:2", "d/f:4"]},
        )
        options = dict(max_length=7, max_completion_length=3, buckets=(5, 7))
        prepared, audit = prepare(records, tokenizer, **options)
        # <s> a | an </s>   <s> a | the </s>   <s> a a a | an an an (EOS cut)   <s> a a a | the </s>
        # <s> a | " a" </s> and so on: the space at the end of the prompt merges, so it is scored
        assert prepared.lengths_N.tolist() == [4, 4, 7, 6, 4, 4]
        assert (audit.rows_read, audit.groups) == (4, 3)
        assert (audit.completions_cut, audit.missing_eos, audit.prompts_cut) == (1, 1, 0)
        assert audit.merged == 2 and audit.no_bos == 0 and audit.double_bos == 0
        assert audit.buckets[1][:2] == (7, 1) and audit.buckets[1].padding == 1 - 13 / 14
        text = audit.text()
        assert "prompts_differ: f:4" in text and "odd_turns: f:2, 4" in text and "boundary merges         2" in text
        assert json.loads(json.dumps(audit.as_dict()))["dropped"] == {"prompts_differ": ["d/f:4"]}

    def test_repeated_bos_is_counted(self):
        """One that opens every turn is no fault (Llama-2's template; ChatML, where <|im_start|> is BOS)."""
        for opens, count in (("bos_token", 0), ("'a' + bos_token + bos_token", 2)):
            template = f"{{% for m in messages %}}{{{{ {opens} + m.content + eos_token }}}}{{% endfor %}}"
            tokenizer = toy_tokenizers.byte_bpe(bos="<s>", template=template)
            _, audit = data.prepare([pair()], tokenization.encoder(tokenizer), **CHAT)
            assert audit.double_bos == count

    def test_text_is_compact(self, toy):
        records = [pair(), *(pair("", source=f"some/long/path/file.jsonl.gz:{n}") for n in range(2, 9))]
        text = prepare(records, toy)[1].text()
        assert "empty_completion: file.jsonl.gz:2, 3, 4, 5, ..." in text
        assert max(map(len, text.splitlines())) < 120 and len(text.splitlines()) == 18


class TestFingerprint:
    def test_every_part_matters(self, toy):
        prepared, _ = prepare([pair(), pair(" an", " the")], toy)
        seen = {prepared.fingerprint()}
        for name in ("tokens_S", "lengths_N", "prompt_lengths_N", "rewards_BK"):
            changed = getattr(prepared, name).copy()
            changed.reshape(-1)[0] += 1
            seen.add(prepared._replace(**{name: changed}).fingerprint())
        seen.add(prepared._replace(rewards_BK=prepared.rewards_BK.reshape(1, 4)).fingerprint())
        assert len(seen) == 6
        assert prepared._replace(sources=("a", "b"), pad_id=7).fingerprint() == prepared.fingerprint()

    def test_value_is_pinned(self, toy):
        prepared, _ = prepare([pair()], toy)
        fixed = prepared._replace(
            tokens_S=np.array([5, 6, 7, 5, 8], np.int32),
            starts_N=np.array([0, 3]),
            lengths_N=np.array([3, 2], np.int32),
            prompt_lengths_N=np.array([1, 1], np.int32),
        )
        assert fixed.fingerprint() == "23d594ce9a4690bce7aada659be585c32634d0761727babf2bd561b0f79cb278"


class TestMaskedSample:
    def test_drawn(self):
        tokenizer = toy_tokenizers.byte_bpe(bos="<s>", adds_bos=True)
        prepared, _ = prepare([pair(), pair(" Sure </s>", " No", "Why?", "f:2")], tokenizer)
        assert data.masked_sample(prepared, tokenizer) == "<s>\n\nHuman: Hi\n\nAssistant:⟦ Yes</s>⟧"
        assert data.masked_sample(prepared, tokenizer, group=1) == "<s>Why?⟦ Sure </s></s>⟧"

    def test_sentencepiece_keeps_the_space_of_the_completion(self):
        encoder = real_tokenizers.encoder("mistral1", "mistral", real_tokenizers.ORIGINAL)
        prepared, _ = data.prepare([pair("Yes", "No", "Hi")], encoder, **CHAT)
        assert data.masked_sample(prepared, encoder.tokenizer) == "<s> [INST] Hi [/INST]⟦ Yes </s>⟧"

    def test_boundary_inside_a_character(self, toy):
        prepared, _ = prepare([pair()], toy)
        [ids] = tokenization.encode(tokenization.encoder(toy), ["é"])
        assert len(ids) == 2
        split = prepared._replace(
            tokens_S=np.array(ids, np.int32),
            starts_N=np.array([0]),
            lengths_N=np.array([2]),
            prompt_lengths_N=np.array([1]),
        )
        assert data.masked_sample(split, toy) == "\ufffd⟦\ufffd⟧"

    def test_group_outside(self, toy):
        prepared, _ = prepare([pair()], toy)
        with pytest.raises(ValueError, match=r"group=1 is outside the 1 groups prepared"):
            data.masked_sample(prepared, toy, group=1)
