"""Readers: the real files with exact counts, every source, every kind of damage with its file and line."""

import codecs
import gzip
import json
import re

import datasets
import numpy as np
import pytest

from fpo_jax import data
from fpo_jax.data import formats, hh_rlhf
from fpo_jax.io import jsonl
from tests.paths import shared_data

PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
USER, ASSISTANT = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}


def rewarded(completions, rewards):
    return {"prompt": "p", "completions": completions, "rewards": rewards}


def lines(*rows, end="\n"):
    return end.join(json.dumps(row, ensure_ascii=False) for row in rows) + end


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def read_text(tmp_path, content, **options):
    return data.read(write(tmp_path / "d.jsonl", content), format=options.pop("format", "json"), **options)


def numbers(places):
    """0-based rows of "file:line" places."""
    return [int(place.rpartition(":")[2]) - 1 for place in places]


class TestHH:
    @pytest.fixture(scope="class")
    def path(self):
        return shared_data("hh_rlhf", "harmless-base.1800.jsonl.gz")

    def test_last_turn_counts_are_exact(self, path):
        records = data.read(path, format="hh")
        assert len(records.rows) == 1798
        assert {reason: numbers(places) for reason, places in records.dropped.items()} == {
            "prompts_differ": [1254, 1688]
        }
        assert {note: numbers(places) for note, places in records.noted.items()} == {
            "odd_turns": [667, 763, 1254, 1319, 1688]
        }
        empty = [row.source for row in records.rows if not all(completion.strip() for completion in row.completions)]
        assert numbers(empty) == [86, 516, 925, 1103]
        assert records.rows[86].completions[0] == " " and records.rows[86].rewards == [1.0, 0.0]

    def test_shape_of_every_row(self, path):
        raw = [json.loads(line) for line in gzip.open(path, "rt", encoding="utf-8")]
        for row in data.read(path, format="hh").rows:
            [number] = numbers([row.source])
            assert row.prompt.startswith("\n\nHuman:") and row.prompt.endswith("\n\nAssistant:")
            for name, completion in zip(("chosen", "rejected"), row.completions, strict=True):
                assert re.match(r" (\S|$)", completion) and "\n\nHuman:" not in completion
                if number not in (1254,):  # its answer began with two spaces
                    assert row.prompt + completion == raw[number][name]

    def test_prompt_is_not_the_common_prefix(self, path):
        beyond = 0
        for row in data.read(path, format="hh").rows:
            beyond += row.completions[0][:2] == row.completions[1][:2] != " "
            assert row.prompt.endswith("\n\nAssistant:")
        assert beyond == 331  # 18.4 % of the rows: answers that begin alike, a common prefix would be longer

    def test_first_difference_counts_are_exact(self, path):
        records = data.read(path, format="hh", hh_split="first_difference")
        assert len(records.rows) == 1800 and not records.dropped
        assert numbers(records.noted["odd_turns"]) == [667, 763, 1254, 1319, 1688]
        empty = [row.source for row in records.rows if not all(completion.strip() for completion in row.completions)]
        assert numbers(empty) == [86, 516, 925, 1103]
        for row in records.rows:
            assert row.prompt.startswith("\n\nHuman: ") and row.prompt.endswith("\n\nAssistant:")
            assert all(re.match(r" (\S|$)", completion) for completion in row.completions)

    def test_report_is_stable(self, path):
        assert data.read(path, format="hh") == data.read(path, format="hh")

    def test_start_and_stop(self, path):
        whole = data.read(path, format="hh").rows
        head, tail = (data.read(path, format="hh", start=start, stop=stop) for start, stop in ((0, 1600), (1600, None)))
        assert [*head.rows, *tail.rows] == list(whole)
        assert (len(head.rows), len(tail.rows)) == (1599, 199)
        assert numbers(head.dropped["prompts_differ"]) == [1254] and numbers(tail.dropped["prompts_differ"]) == [1688]

    @pytest.mark.parametrize(
        "transcript, message",
        [
            ("Human: Hi\n\nAssistant: Yo", r"d\.jsonl:1: chosen is no HH transcript: it must start with"),
            ("\n\nHuman: Hi", r"d\.jsonl:1: chosen is no HH transcript: .* have a turn '\\n\\nAssistant:'"),
            (["\n\nHuman: Hi"], r"d\.jsonl:1: chosen must be a text, not a list"),
        ],
    )
    def test_not_a_transcript(self, tmp_path, transcript, message):
        for split in hh_rlhf.SPLITS:
            with pytest.raises(ValueError, match=message):
                read_text(tmp_path, lines({"chosen": transcript, "rejected": transcript}), format="hh", hh_split=split)


class TestTranscripts:
    @pytest.mark.parametrize("gap", ["", " ", "  ", "\n\n"])
    def test_completion_begins_with_one_space(self, gap):
        head = "\n\nHuman: a\n\nAssistant:"
        splits = [hh_rlhf.split_last_turn, *([hh_rlhf.split_first_difference] if gap else [])]
        for split in splits:  # the original, and so the second, wants a space after "Assistant:"
            assert split(f"{head}{gap}b ", f"{head} c\n\nd") == (head, " b ", " c\n\nd")

    def test_last_turn_is_a_human_one(self):
        side = "\n\nHuman: Hi\n\nAssistant: Yo\n\nHuman: Bye"
        assert hh_rlhf.split_last_turn(side, side).reason == "last_turn_not_assistant"

    def test_first_difference_literally(self):
        chosen = (
            "\n\nHumans: a\n\nb\n\nAssistant: same\n\nHuman: c\n\nAssistant: Human: yes Human: no\n\nmore\n\nHuman: x"
        )
        rejected = "\n\nHuman: a\n\nb\n\nAssistant: same\n\nHuman: c\n\nAssistant:  no"
        assert hh_rlhf.split_first_difference(chosen, rejected) == (
            "\n\nHuman: a\n\nb\n\nAssistant: same\n\nHuman: c\n\nAssistant:",
            " yes  no\n\nmore",
            " no",
        )

    @pytest.mark.parametrize(
        "chosen, rejected, reason",
        [
            ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant:  b", "identical"),
            ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: c\n\nAssistant: d", "differ_at_human_turn"),
            ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "no_differing_turn"),
        ],
    )
    def test_first_difference_drops(self, chosen, rejected, reason):
        assert hh_rlhf.split_first_difference(chosen, rejected).reason == reason


class TestChatPairs:
    TURNS = (
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": "b"},
    )

    def test_real_file(self):
        records = data.read(shared_data("pref_chat", "ultrafeedback_shaped.jsonl.gz"), format="chat_pairs")
        assert len(records.rows) == 300 and not records.dropped
        assert {reason: len(places) for reason, places in records.noted.items()} == {"column_not_used:prompt": 300}
        assert {len(row.prompt) for row in records.rows} == {1, 2, 3, 5, 7, 9, 13}
        assert sum(row.prompt[0]["role"] == "system" for row in records.rows) == 80
        assert all(row.completions[0]["role"] == row.completions[1]["role"] == "assistant" for row in records.rows)

    def test_one_pair(self, tmp_path):
        u, a, b = self.TURNS
        text = lines({"chosen": [u, a | {"name": None}], "rejected": [u, b]})
        [row] = read_text(tmp_path, text, format="chat_pairs").rows
        assert row[:3] == ([u], [a, b], [1.0, 0.0]) and row.source.endswith("d.jsonl:1")

    def test_prompts_that_differ_are_dropped_and_counted(self, tmp_path):
        u, a, b = self.TURNS
        text = lines({"chosen": [u, a], "rejected": [u, b]}, {"chosen": [u, a], "rejected": [u | {"content": "v"}, b]})
        records = read_text(tmp_path, text, format="chat_pairs")
        assert len(records.rows) == 1 and numbers(records.dropped["prompts_differ"]) == [1]

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"chosen": "a"}, r"chosen must be a list of messages, not a text"),
            ({"chosen": []}, r"chosen must be a list of messages, not an empty list"),
            ({"chosen": ["a"]}, r"chosen\[0\] must be an object with role and content, not a text"),
            (
                {"chosen": [{"from": "human", "value": "x"}]},
                r"chosen\[0\] must be .*, not an object with the keys from, value",
            ),
            (
                {"rejected": [TURNS[0], {"role": "assistant", "content": None}]},
                r"rejected\[1\]\.content must be a text, not null",
            ),
            (
                {"rejected": [TURNS[0], TURNS[1] | {"tool_calls": [1]}]},
                r"rejected\[1\]\.tool_calls must be a list of objects, or .*, not a list with something",
            ),
            (
                {"chosen": [TURNS[1]]},
                r"chosen must be a prompt and an assistant turn last, but its turns are assistant",
            ),
            ({"chosen": [TURNS[1], TURNS[0]]}, r"chosen must be .* but its turns are assistant, user"),
        ],
    )
    def test_bad_rows(self, tmp_path, change, message):
        u, a, b = self.TURNS
        text = lines({"chosen": [u, a], "rejected": [u, b]}, {"chosen": [u, a], "rejected": [u, b]} | change)
        with pytest.raises(ValueError, match=r"d\.jsonl:2: " + message):
            read_text(tmp_path, text, format="chat_pairs")


class TestJson:
    @pytest.mark.parametrize(
        "other",
        [
            {"rewards": [0.9, 0.4]},  # as fpo label --pairing best_worst writes it
            {"rewards": 0.5},
            {"rewards": "good"},
            {"completions": ["x", "y", "z"]},
            {"completions": ["x", "y"], "rewards": [1.0, 2.0]},
            {"completions": None, "rewards": None},  # of a table whose other rows are groups
        ],
    )
    def test_a_row_with_chosen_and_rejected_is_a_pair_whatever_else_it_has(self, tmp_path, other):
        [row] = read_text(tmp_path, lines(PAIR | other)).rows
        assert (row.completions, row.rewards) == (["c", "r"], [1.0, 0.0])

    def test_a_row_without_a_pair_is_a_group_whatever_else_it_has(self, tmp_path):
        group = rewarded(["a", "b"], [1, 2])
        for other in ({"chosen": None, "rejected": None}, {"chosen": "a"}):
            [row] = read_text(tmp_path, lines(group | other)).rows
            assert (row.completions, row.rewards) == (["a", "b"], [1.0, 2.0])

    def test_pairs_and_rewards(self, tmp_path):
        rewarded = {"prompt": "p", "completions": ["a", "b", "c"], "rewards": [1, -0.5, 2e3]}
        first, second = read_text(tmp_path, lines(PAIR, rewarded)).rows
        assert first[:3] == ("p", ["c", "r"], [1.0, 0.0])
        assert second[:3] == ("p", ["a", "b", "c"], [1.0, -0.5, 2000.0])
        assert [row.source.rpartition(":")[2] for row in (first, second)] == ["1", "2"]

    def test_json_list_with_indent(self, tmp_path):
        path = write(tmp_path / "train.json", json.dumps([PAIR, PAIR], indent=4))
        assert [row.source for row in data.read(path, format="json").rows] == [f"{path}[0]", f"{path}[1]"]

    def test_gzip_is_told_by_content(self, tmp_path):
        path = write(tmp_path / "d.jsonl", gzip.compress(lines(PAIR).encode()))
        assert len(data.read(path, format="json").rows) == 1

    def test_messages(self, tmp_path):
        u, a, b = TestChatPairs.TURNS
        rows = read_text(
            tmp_path,
            lines(
                {"prompt": [u], "chosen": a, "rejected": [b]},
                {"prompt": [u], "chosen": [u, a], "rejected": [u, b]},
                {"prompt": "u", "chosen": [u, a], "rejected": [b]},
                {"prompt": [u], "chosen": "x", "rejected": "y"},
            ),
        ).rows
        assert [row.prompt for row in rows] == [[u], [u], "u", [u]]
        assert [row.completions for row in rows] == [[a, b], [a, b], [a, b], ["x", "y"]]

    @pytest.mark.parametrize(
        "row, message",
        [
            ({"prompt": "p", "chosen_text": "c", "rejected": "r"},
             r"missing or null: chosen; wanted prompt, chosen, rejected; found prompt, chosen_text, rejected"),
            ({}, r"missing or null: prompt, chosen, rejected; wanted .*; found none"),
            (rewarded(["a", "b"], None), r"missing or null: rewards; wanted prompt, completions, rewards"),
            (PAIR | {"chosen": None}, r"missing or null: chosen"),
            (PAIR | {"chosen": 3}, r"completion 0\[0\] must be an object with role and content, not a number"),
            (PAIR | {"prompt": 3.5}, r"prompt must be a list of messages, not a number"),
            (rewarded(["a", "b"], [1]), r"completions and rewards must be lists of one length"),
            (rewarded("ab", [1, 2]), r"completions and rewards must be lists"),
            (rewarded(["a"], [1]), r"1 completions; a group needs at least 2"),
            (rewarded(["a", "b"], [1, "2"]), r"reward 1 must be a number, not a text"),
            (rewarded(["a", "b"], [1, True]), r"reward 1 must be a number, not true/false"),
            (PAIR | {"rejected": ASSISTANT}, r"some completions are texts and some are messages"),
            (PAIR | {"rejected": USER}, r"completion 1 must be an assistant turn, not .* 'user'"),
            (PAIR | {"chosen": [USER, ASSISTANT]}, r"completion 0 is a conversation that does not begin with"),
            ([PAIR], r"a row must be a JSON object, not a list"),
            ("text", r"a row must be a JSON object, not a text"),
            (None, r"a row must be a JSON object, not null"),
        ],
    )  # fmt: skip
    def test_bad_rows(self, tmp_path, row, message):
        with pytest.raises(ValueError, match=r"d\.jsonl:3: .*(" + message + ")"):
            read_text(tmp_path, lines(PAIR, PAIR, row, PAIR))


class TestText:
    """What a text file may do without being wrong, and what it may not."""

    @pytest.mark.parametrize(
        "content",
        [
            codecs.BOM_UTF8 + lines(PAIR, PAIR).encode(),
            lines(PAIR, PAIR, end="\r\n"),
            lines(PAIR, PAIR).rstrip("\n"),
            "\n" + lines(PAIR) + " \n\n" + lines(PAIR) + "\n\n",
            codecs.BOM_UTF8 + json.dumps([PAIR, PAIR]).encode(),
        ],
        ids=["bom", "crlf", "no final newline", "blank lines", "bom before a list"],
    )
    def test_harmless(self, tmp_path, content):
        assert [row[:3] for row in read_text(tmp_path, content).rows] == [("p", ["c", "r"], [1.0, 0.0])] * 2

    def test_line_separators_inside_a_text(self, tmp_path):
        odd = "a\u2028b\u2029c\x85d\x0be\x00f"
        text = (
            '{"prompt": "'
            + odd.replace("\x0b", "\\u000b").replace("\x00", "\\u0000")
            + '", "chosen": "c", "rejected": "r"}'
        )
        rows = read_text(tmp_path, text + "\n" + lines(PAIR)).rows
        assert rows[0].prompt == odd and rows[1].source.endswith(":2")

    def test_line_of_ten_megabytes(self, tmp_path):
        rows = read_text(tmp_path, lines(PAIR, PAIR | {"chosen": "x" * 10_000_000}, PAIR)).rows
        assert len(rows[1].completions[0]) == 10_000_000 and rows[2].source.endswith(":3")

    @pytest.mark.parametrize(
        "line, message",
        [
            (b'{"prompt": "p", "chosen": "c"', r"broken JSON: Expecting ',' delimiter at column 30"),
            (b'{"prompt": "p"} {"x": 1}', r"broken JSON: Extra data at column 17"),
            (b'{"prompt": "p\xff", "chosen": "c", "rejected": "r"}', r"not UTF-8: byte 0xff at byte 14 of the line"),
            (b'{"prompt": "p\x00", "chosen": "c", "rejected": "r"}', r"broken JSON: Invalid control .* at column 14$"),
            (b"\x00\x00\x00\x00", r"broken JSON: Expecting value at column 1"),
            (b'{"prompt": "a", "prompt": "b", "chosen": "c", "rejected": "r"}', r"the key 'prompt' stands twice"),
            (b'{"prompt": "p", "completions": ["a", "b"], "rewards": [1, NaN]}', r"NaN is not JSON"),
            (b'{"prompt": "p", "completions": ["a", "b"], "rewards": [1, -Infinity]}', r"-Infinity is not JSON"),
            (b'{"prompt": "p", "completions": ["a", "b"], "rewards": [1, 1e999]}', r"reward 1 is inf; rewards must be"),
            (b'{"prompt": "p", "chosen": "\\ud800", "rejected": "r"}', r"completion 0 holds half a surrogate pair"),
            (b'{"prompt": ' + b"[" * 100_000, r"broken JSON: "),
            (b'{"prompt": ' + b"1" * 5000 + b"}", r"broken JSON: Exceeds the limit"),
        ],
    )  # fmt: skip
    def test_bad_line(self, tmp_path, line, message):
        content = lines(PAIR).encode() + line + b"\n" + lines(PAIR).encode()
        with pytest.raises(ValueError, match=r"d\.jsonl:2: " + message):
            read_text(tmp_path, content)

    def test_unused_column_may_hold_nan(self, tmp_path):
        assert len(read_text(tmp_path, json.dumps(PAIR | {"score": float("nan")})).rows) == 1

    @pytest.mark.parametrize(
        "content, message",
        [
            ('[\n {"prompt": "p"},\n {"prompt": }\n]', r"d\.jsonl:3: broken JSON: Expecting value at column 13"),
            (b'\n[\n {"prompt": "\xe9"}\n]', r"d\.jsonl:3: not UTF-8: byte 0xe9 at byte 14 of the line"),
            (
                "[" + json.dumps(PAIR) + ', {"prompt": "a", "prompt": "b"}]',
                r"d\.jsonl\[1\]: the key 'prompt' stands twice",
            ),
            ("[" + json.dumps(PAIR), r"d\.jsonl:1: broken JSON: Expecting ',' delimiter"),
        ],
    )
    def test_bad_json_list(self, tmp_path, content, message):
        with pytest.raises(ValueError, match=message):
            read_text(tmp_path, content)

    @pytest.mark.parametrize("content", ["", "\n\n", "[]", codecs.BOM_UTF8])
    def test_nothing_inside(self, tmp_path, content):
        with pytest.raises(ValueError, match=r"d\.jsonl: no rows"):
            read_text(tmp_path, content)

    def test_selection_beyond_the_end(self, tmp_path):
        with pytest.raises(ValueError, match=r"d\.jsonl: no rows from row 5 on"):
            read_text(tmp_path, lines(PAIR), start=5)
        with pytest.raises(ValueError, match=r"start=2, stop=2 selects no rows; need 0 <= start < stop"):
            read_text(tmp_path, lines(PAIR), start=2, stop=2)


class TestGzip:
    def test_every_cut_is_noticed(self, tmp_path):
        plain = lines(*(PAIR | {"prompt": f"prompt {number * 7919}"} for number in range(50)))
        packed = gzip.compress(plain.encode())
        for size in range(1, len(packed), 7):
            path = write(tmp_path / "cut.jsonl.gz", packed[:size])
            with pytest.raises(
                ValueError, match=r"cut\.jsonl\.gz:\d+: the gzip stream is cut .* after \d+ whole lines"
            ):
                data.read(path, format="json")

    def test_no_flipped_bit_changes_a_record(self, tmp_path):
        packed = gzip.compress(lines(*(PAIR | {"prompt": f"prompt {number * 7919}"} for number in range(50))).encode())
        whole = data.read(write(tmp_path / "good.jsonl.gz", packed), format="json").rows
        random, caught = np.random.default_rng(0), 0
        for _ in range(100):
            damaged = bytearray(packed)
            damaged[random.integers(len(packed))] ^= 1 << random.integers(8)
            try:
                rows = data.read(write(tmp_path / "bad.jsonl.gz", bytes(damaged)), format="json").rows
            except ValueError as error:
                assert re.search(r"bad\.jsonl\.gz:\d+: ", str(error))
                caught += 1
            else:  # the time stamp of the header, say
                assert [row[:3] for row in rows] == [row[:3] for row in whole]
        assert caught > 80

    def test_line_number_of_the_cut(self, tmp_path):
        path = write(tmp_path / "d.jsonl.gz", gzip.compress(lines(PAIR, PAIR, PAIR).encode())[:-4])
        with pytest.raises(ValueError, match=r"d\.jsonl\.gz:4: the gzip stream is cut or damaged after 3 whole lines"):
            data.read(path, format="json")

    def test_name_without_content(self, tmp_path):
        with pytest.raises(ValueError, match=r"d\.jsonl\.gz:1: the gzip stream is cut or damaged .*Not a gzipped file"):
            data.read(write(tmp_path / "d.jsonl.gz", lines(PAIR)), format="json")

    def test_real_file_cut(self, tmp_path):
        packed = shared_data("hh_rlhf", "harmless-base.1800.jsonl.gz").read_bytes()
        path = write(tmp_path / "hh.jsonl.gz", packed[: len(packed) // 2])
        with pytest.raises(ValueError, match=r"hh\.jsonl\.gz:\d{3}: the gzip stream is cut"):
            data.read(path, format="hh")


class TestPolicy:
    BAD = "{broken\n"

    def test_error_names_the_first_ten(self, tmp_path):
        with pytest.raises(ValueError, match="rows are bad") as caught:
            read_text(tmp_path, lines(PAIR) + self.BAD * 12)
        message = str(caught.value).splitlines()
        assert message[0] == "10 of the first 11 rows are bad:"
        assert [re.search(r"d\.jsonl:(\d+): broken JSON", line).group(1) for line in message[1:]] == [
            str(number) for number in range(2, 12)
        ]

    def test_a_named_format_that_no_row_has_is_one_sentence(self, tmp_path):
        found = "missing or null: messages; wanted messages; found prompt, chosen, rejected"
        with pytest.raises(
            ValueError, match=f"d.jsonl:1: {found}, and the first 3 rows are alike: the format 'messages' is"
        ):
            read_text(tmp_path, lines(PAIR, PAIR, PAIR), format="messages")
        with pytest.raises(ValueError, match="rows are bad"):
            read_text(tmp_path, lines(PAIR, PAIR) + self.BAD, format="messages")

    def test_skip_drops_and_counts(self, tmp_path):
        records = read_text(tmp_path, lines(*[PAIR] * 1998) + self.BAD + self.BAD, on_bad_row="skip")
        assert len(records.rows) == 1998 and numbers(records.dropped["bad_row"]) == [1998, 1999]
        assert len(read_text(tmp_path, lines(PAIR) + self.BAD, on_bad_row="skip").rows) == 1

    def test_skip_has_a_limit(self, tmp_path):
        with pytest.raises(
            ValueError, match=r"3 of 1999 rows are bad, and on_bad_row='skip' allows 0\.1%:\n.*d\.jsonl:1997"
        ):
            read_text(tmp_path, lines(*[PAIR] * 1996) + self.BAD * 3, on_bad_row="skip")

    @pytest.mark.parametrize(
        "options, message",
        [
            (dict(format="jsonl"), r"format='jsonl' is not one of auto, hh, chat_pairs, chat_groups, json"),
            (dict(hh_split="prefix", format="hh"), r"hh_split='prefix' is not one of last_turn, first_difference"),
            (dict(hh_split="first_difference"), r"hh_split='first_difference' applies to format='hh' only"),
            (dict(on_bad_row="ignore"), r"on_bad_row='ignore' is not one of error, skip"),
            (dict(split="train"), r"split='train' applies to directories and hub data sets, and .* is one file"),
            (dict(revision="abc"), r"data_dir and revision apply to hub data sets only"),
        ],
    )
    def test_options(self, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            read_text(tmp_path, lines(PAIR), **options)


class TestSources:
    @pytest.fixture
    def directory(self, tmp_path):
        write(tmp_path / "train-00001.jsonl", lines(PAIR | {"prompt": "1"}))
        write(tmp_path / "train-00000.jsonl.gz", gzip.compress(lines(PAIR | {"prompt": "0"}).encode()))
        write(tmp_path / "test.json", json.dumps([PAIR | {"prompt": "t"}]))
        write(tmp_path / "train_sft.jsonl", lines(PAIR | {"prompt": "s"}))
        write(tmp_path / "README.md", "no rows")
        (tmp_path / "nested.jsonl").mkdir()
        return tmp_path

    @pytest.mark.parametrize("split, prompts", [("train", "01"), ("test", "t"), (None, "t01s")])
    def test_directory(self, directory, split, prompts):
        assert "".join(row.prompt for row in data.read(directory, format="json", split=split).rows) == prompts

    def test_directory_without_the_split(self, directory):
        with pytest.raises(
            ValueError, match=r"has no file dev\.\* or dev-\*.*; it has test\.json, train-00000\.jsonl\.gz"
        ):
            data.read(directory, format="json", split="dev")

    def test_saved_data_sets(self, tmp_path):
        table = datasets.Dataset.from_list([PAIR, PAIR | {"prompt": "q"}])
        table.save_to_disk(str(tmp_path / "one"))
        datasets.DatasetDict(train=table, test=table).save_to_disk(str(tmp_path / "two"))
        one = data.read(tmp_path / "one", format="json").rows
        assert [row.prompt for row in one] == ["p", "q"] and one[1].source == f"{tmp_path / 'one'}[1]"
        assert len(data.read(tmp_path / "two", format="json", split="test").rows) == 2
        with pytest.raises(ValueError, match=r"split='' is not one of train, test"):
            data.read(tmp_path / "two", format="json")
        with pytest.raises(ValueError, match=r"split='test', but the data set saved in .* has no splits"):
            data.read(tmp_path / "one", format="json", split="test")

    def test_saved_chat_pairs(self, tmp_path):
        u, a, b = TestChatPairs.TURNS
        datasets.Dataset.from_list([{"chosen": [u, a], "rejected": [u, b]}]).save_to_disk(str(tmp_path / "saved"))
        assert data.read(tmp_path / "saved", format="chat_pairs").rows[0].completions == [a, b]

    @pytest.mark.parametrize(
        "source",
        ["/no/such/file.jsonl", "data/hh.jsonl", "hh.jsonl.gz", "./hh", "../a/b", "a/b/c", "folder", "a/b.parquet"],
    )
    def test_missing_path_is_never_looked_up_on_the_hub(self, source, monkeypatch):
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
        with pytest.raises(ValueError, match=r"no file or directory .* \(a hub data set is named owner/name\)"):
            data.read(source, format="json", split="train")

    def test_hub_name(self, monkeypatch):
        asked = []

        def load(name, **options):
            asked.append((name, options))
            return datasets.Dataset.from_list([PAIR] * 3)

        monkeypatch.setattr(datasets, "load_dataset", load)
        records = data.read("owner/set-v0.1", format="json", split="train", data_dir="helpful", revision="abc", start=1)
        assert [row.source for row in records.rows] == ["owner/set-v0.1[1]", "owner/set-v0.1[2]"]
        assert asked == [("owner/set-v0.1", {"split": "train", "data_dir": "helpful", "revision": "abc"})]

    def test_hub_name_without_split(self):
        with pytest.raises(ValueError, match=r"the hub data set 'owner/name' needs a split, for example split='train'"):
            data.read("owner/name", format="json")

    def test_hub_out_of_reach(self):
        with pytest.raises(
            ValueError, match=r"no local path 'owner/name', and the hub data set of that name cannot be"
        ):
            data.read("owner/name", format="json", split="train")

    def test_bad_row_knows_its_line(self):
        assert jsonl.BadRow("x", 3).line == 3 and jsonl.BadRow("x").line == 1


# --- formats with one completion, or more than two

POST = {"subreddit": "tifu", "title": "t", "post": "p"}
TWO = [{"text": "a"}, {"text": "b"}]
ANSWERS = {"prompt": "p", "all_generated_responses": ["a", "b"]}


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("format", "row", "expected"),
    [
        (
            "tldr",
            {"info": POST, "summaries": [{"text": " a "}, {"text": "b"}], "choice": 1},
            [("SUBREDDIT: r/tifu\nTITLE: t\nPOST: p\nTL;DR:", [" b", " a"], [1.0, 0.0])],
        ),
        (
            "tldr_sft",
            {**POST, "summary": "s\n"},
            [("SUBREDDIT: r/tifu\nTITLE: t\nPOST: p\nTL;DR:", [" s"], [1.0])],
        ),
        (
            "messages",
            {"messages": [user("a"), bot("b"), user("c"), bot("d")]},
            [([user("a")], [bot("b")], [1.0]), ([user("a"), bot("b"), user("c")], [bot("d")], [1.0])],
        ),
        ("demonstrations", {"prompt": "p", "completion": " c"}, [("p", [" c"], [1.0])]),
        ("demonstrations", {"prompt": "p", "chosen": bot("c")}, [("p", [bot("c")], [1.0])]),
        (
            "chat_groups",
            {"prompt": "p", "all_generated_responses": ["a", "b", "c"], "all_rm_scores": [0.1, 0.3, 0.2]},
            [("p", ["a", "b", "c"], [0.1, 0.3, 0.2])],
        ),
        ("prompts", {"prompt": [user("a")], "else": 1}, [([user("a")], [], [])]),
    ],
)
def test_what_a_format_makes_of_a_row(tmp_path, format, row, expected):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    found = data.read(path, format=format)
    assert [(r.prompt, list(r.completions), list(r.rewards)) for r in found.rows] == expected
    assert len({r.source for r in found.rows}) == len(expected)


@pytest.mark.parametrize(
    ("format", "row", "message"),
    [
        ("tldr", {"info": POST, "summaries": [{"text": "a"}], "choice": 0}, "summaries must be a list of two"),
        ("tldr", {"info": POST, "summaries": TWO, "choice": 2}, "choice must be 0 or 1, not 2"),
        ("tldr", {"info": "x", "summaries": [], "choice": 0}, "info must be an object, not a text"),
        ("tldr", {"info": {"post": "p"}, "summaries": TWO, "choice": 0}, "missing or null: subreddit"),
        ("tldr_sft", {**POST, "summary": None}, "missing or null: summary"),
        ("messages", {"messages": [bot("a")]}, "messages must be a prompt and an assistant turn after it"),
        ("messages", {"messages": []}, "messages must be a list of messages, not an empty list"),
        ("demonstrations", {"prompt": "p"}, "missing or null: completion"),
        ("demonstrations", {"prompt": "p", "completion": user("c")}, "must be an assistant turn"),
        ("chat_groups", {**ANSWERS, "all_rm_scores": [1]}, "lists of one length"),
        ("chat_groups", {**ANSWERS, "all_rm_scores": [1, None]}, "reward 1 must be a number"),
        ("prompts", {"prompt": 3}, "prompt must be a list of messages, not a number"),
    ],
)  # fmt: skip
def test_rows_that_are_not_what_the_format_says(tmp_path, format, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=f"rows.jsonl:1: .*{message}"):
        data.read(path, format=format)


def test_the_summary_s_own_leading_space_is_noted_and_news_without_a_post_are_dropped(tmp_path):
    (tmp_path / "s.jsonl").write_text(json.dumps({**POST, "summary": " s"}) + "\n")
    assert dict(data.read(tmp_path / "s.jsonl", format="tldr_sft").noted) == {
        "leading_space": [f"{tmp_path}/s.jsonl:1"]
    }
    news = {"info": {"article": "a"}, "summaries": TWO, "choice": 0}
    (tmp_path / "n.jsonl").write_text(json.dumps(news) + "\n")
    assert list(data.read(tmp_path / "n.jsonl", format="tldr").dropped) == ["no_post"]


# --- columns that a format does not read


LEFT = {
    "system": "Answer in French.",
    "functions": [{"name": "add"}],
    "chat_template_kwargs": {"enable_thinking": False},
}
LEFT |= {"margin": 0.5, "images": ["a.png"], "prompt_id": "x"}
ROWS = {  # format -> a row, and the columns beside those that it reads
    "hh": {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    "chat_pairs": {"chosen": [USER, ASSISTANT], "rejected": [USER, bot("b")]},
    "chat_groups": ANSWERS | {"all_rm_scores": [1, 0]},
    "json": PAIR,
    "tldr": {"info": POST, "summaries": TWO, "choice": 0},
    "tldr_sft": {**POST, "summary": "s"},
    "messages": {"messages": [USER, ASSISTANT, USER, ASSISTANT]},
    "demonstrations": {"prompt": "p", "completion": "c"},
    "prompts": {"prompt": "p"},
}


def test_every_format_has_such_a_row():
    common = {"sharegpt", "alpaca", "text", "labelled", "liked", "rankings", "scored_pairs", "text_pairs"}
    elsewhere = {"imdb", "transcript_chats", *common}  # in test_reviews and test_auto_format
    assert {*ROWS, *elsewhere} == set(formats._PARSERS)


@pytest.mark.parametrize("format", sorted(ROWS))
def test_columns_that_a_format_does_not_read_are_named_with_their_rows(tmp_path, format, caplog):
    rows = [
        ROWS[format],
        ROWS[format] | LEFT,
        ROWS[format] | dict.fromkeys(LEFT, None),
        ROWS[format] | {"functions": []},
    ]
    found = read_text(tmp_path, lines(*rows), format=format)
    used = {"system"} if format in ("chat_pairs", "messages") else set()
    assert {reason: numbers(places) for reason, places in found.noted.items()} == {
        f"column_not_used:{name}": [1] for name in LEFT if name not in used
    }
    (warning,) = caplog.messages
    assert all(f"{name} (1 rows)" in warning for name in sorted({"functions", "margin", "images"} - used))
    assert ("system (1 rows)" in warning) == (not used) and "prompt_id" not in warning


def test_columns_of_the_other_kind_of_row_are_named_too(tmp_path, caplog):
    found = read_text(tmp_path, lines(PAIR | {"completions": ["x"], "rewards": [1.0], "score": float(1)}))
    assert list(found.noted) == ["column_not_used:completions", "column_not_used:rewards", "column_not_used:score"]
    assert not caplog.messages, "none of them changes what the model is asked"


SYSTEM = {"role": "system", "content": "Answer in French."}


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("json", {"prompt": [USER], "chosen": "c", "rejected": "r"}),
        ("json", {"prompt": [USER], "completions": ["c", "r"], "rewards": [1, 0]}),
        ("chat_pairs", ROWS["chat_pairs"]),
        ("chat_groups", {**ROWS["chat_groups"], "prompt": [USER]}),
        ("messages", ROWS["messages"]),
        ("demonstrations", {"prompt": [USER], "completion": [USER, ASSISTANT]}),
        ("prompts", {"prompt": [USER]}),
    ],
)
def test_a_system_column_is_the_first_turn_of_a_prompt_of_messages(tmp_path, format, row, caplog):
    plain = read_text(tmp_path, lines(row), format=format)
    found = read_text(tmp_path, lines(row | {"system": SYSTEM["content"]}), format=format)
    assert [one.prompt for one in found.rows] == [[SYSTEM, *one.prompt] for one in plain.rows]
    assert [one.completions for one in found.rows] == [one.completions for one in plain.rows]
    assert not found.noted and not caplog.messages


def test_a_system_column_beside_a_system_turn_is_named_unless_it_says_the_same(tmp_path, caplog):
    row = {"prompt": [SYSTEM, USER], "chosen": "c", "rejected": "r"}
    both = read_text(tmp_path, lines(row | {"system": SYSTEM["content"]}, row | {"system": "Answer in Greek."}))
    assert [one.prompt for one in both.rows] == [[SYSTEM, USER]] * 2
    assert {reason: numbers(places) for reason, places in both.noted.items()} == {"column_not_used:system": [1]}
    assert "system (1 rows)" in caplog.text


def test_a_system_column_that_is_no_text_is_named(tmp_path, caplog):
    row = {"prompt": [USER], "chosen": "c", "rejected": "r"}
    found = read_text(tmp_path, lines(row | {"system": ["Answer in French."]}, row | {"system": "  "}))
    assert [one.prompt for one in found.rows] == [[USER]] * 2 and "system (1 rows)" in caplog.text
    assert {reason: numbers(places) for reason, places in found.noted.items()} == {"column_not_used:system": [0]}
