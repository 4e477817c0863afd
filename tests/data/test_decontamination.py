"""Records that repeat a benchmark are dropped and counted, in whatever layout, in the prompt or in a completion."""

import json
import unicodedata

import pytest

from fpo_jax import data
from fpo_jax.data import decontamination
from fpo_jax.trainer import run_inputs
from tests import tiny
from tests.paths import shared_data

PROBLEM = '''def has_close(numbers, threshold):
    """ Check if in given list of numbers, are any two numbers closer to each other than given threshold.
    >>> has_close([1.0, 2.0, 3.0], 0.5)
    False
    """
'''
COPY = "Please CHECK if, in given list of numbers, are any two numbers\n# closer to each other than given threshold!"
SHORT = "Name three things that rivers and roads share."


def records(*rows):
    return data.Records([data.Record(p, r, [1.0, 0.0], f"f:{i}") for i, (p, r) in enumerate(rows, 1)])


def test_what_is_dropped():
    turns = [{"role": "user", "content": COPY}]
    found = decontamination.clean(
        records(
            ("a prompt", ["x", "y"]),
            (COPY, ["x", "y"]),
            (turns, [{"role": "assistant", "content": "z"}] * 2),
            ("a prompt", ["x", f"as you say: {COPY}"]),
            (COPY.replace("closer to", "closer than"), ["x", "y"]),  # twelve words in a row
            (SHORT.upper(), ["x", "y"]),
            (SHORT.removesuffix("share."), ["x", "y"]),
            ("def add(x, y): return x + y", ["x", "y"]),
        ),
        [PROBLEM, SHORT, "    return x + y\n"],
    )
    assert [row.source for row in found.rows] == ["f:1", "f:5", "f:7", "f:8"]
    assert found.dropped == {"contaminated": ["f:2", "f:3", "f:4", "f:6"]}


CHINESE = "从山坡上滚下来的石头有多少块落进了河里，请写出计算的步骤。"  # 27 characters
JAPANESE = "この文章の中で最も古い町の名前を答えてください。"  # 23, with dakuten
THAI = "จงอธิบายว่าทำไมท้องฟ้าจึงเป็นสีฟ้าในเวลากลางวัน"


@pytest.mark.parametrize(
    ("text", "copy", "other"),
    [
        (CHINESE, f"问题：{CHINESE.replace('，', ' ').removesuffix('。')}\n谢谢", CHINESE.replace("河", "湖")),
        (JAPANESE, unicodedata.normalize("NFD", f"「{JAPANESE}」"), JAPANESE.replace("古い", "新しい")),
        (THAI, f"{THAI} ครับ", THAI.replace("ฟ้า", "ดำ")),
        ("Écrivez à la fenêtre ce que vous avez déjà vu", "ECRIVEZ A LA FENETRE CE QUE VOUS AVEZ DEJA VU!", SHORT),
    ],
    ids=["Chinese", "Japanese, decomposed", "Thai", "accents"],
)
def test_scripts_without_word_spaces_and_other_ways_to_write_the_same(text, copy, other):
    found = decontamination.clean(records((copy, ["x", "y"]), (other, ["x", "y"])), [text, PROBLEM])
    assert found.dropped == {"contaminated": ["f:1"]}


def test_a_benchmark_is_compared_or_refused_and_what_is_too_short_is_counted(tmp_path, caplog):
    """What is not compared of one benchmark does not hide behind the texts of another."""
    caplog.set_level("INFO", "fpo_jax")
    tiny.write_model(tmp_path / "model", layers=1)
    path = write(tmp_path / "d.jsonl", [{"prompt": t, "chosen": " a", "rejected": " b"} for t in ("Hi", CHINESE)])
    long, short = (write(tmp_path / f"{n}.jsonl", [{"q": t}]) for n, t in (("long", PROBLEM), ("short", "天空的颜色")))
    mixed = write(tmp_path / "mixed.jsonl", [{"q": CHINESE}, {"q": "天空的颜色"}, {"q": "a b c"}])
    c = tiny.config(tmp_path / "model", path, data__decontaminate=(f"{long}=q", f"{short}=q"))
    with pytest.raises(ValueError, match=r"no text of '.*short.jsonl=q' has 8 words, or 16 characters of a script"):
        run_inputs.prepare(c)
    c = tiny.config(tmp_path / "model", path, data__decontaminate=(f"{mixed}=q",), data__max_length=64)
    c.data.train_rows = "0:2"
    assert run_inputs.prepare(c).train.audit.dropped["contaminated"] == (f"{path}:2",)
    assert "2 of 3 texts of" in caplog.text and "are not compared" in caplog.text


def test_texts_too_short_to_compare_with():
    with pytest.raises(ValueError, match="no benchmark text has 8 words or more"):
        decontamination.clean(records(("p", ["x", "y"])), ["return x + y"])


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_columns(tmp_path):
    path = write(tmp_path / "b.jsonl", [{"turns": ["a", "b"], "prompt": "c", "id": 1}])
    assert decontamination.texts(f"{path}=turns") == ["a", "b"]
    assert decontamination.texts(f"{path}=prompt") == ["c"]
    for column in ("id", "nothing"):
        with pytest.raises(
            ValueError, match=rf"b.jsonl:1: the column '{column}' is neither .*it has turns, prompt, id"
        ):
            decontamination.texts(f"{path}={column}")
    with pytest.raises(ValueError, match="'b.jsonl' is not source=column"):
        decontamination.texts("b.jsonl")


def test_a_run_leaves_them_out_of_training_and_not_of_evaluation(tmp_path):
    tiny.write_model(tmp_path / "model", layers=1)
    rows = [{"prompt": text, "chosen": " a", "rejected": " b"} for text in ("Hi", COPY, "Ho")]
    path, benchmark = write(tmp_path / "d.jsonl", rows), write(tmp_path / "b.jsonl", [{"prompt": PROBLEM}])
    c = tiny.config(tmp_path / "model", path, data__eval=path, data__decontaminate=(f"{benchmark}=prompt",))
    inputs = run_inputs.prepare(c)
    assert inputs.train.audit.dropped["contaminated"] == (f"{path}:2",)
    assert inputs.evaluation.prepared.groups == 3
    with pytest.raises(ValueError, match="data.decontaminate: 'x' is not source=column"):
        run_inputs.check(tiny.config(tmp_path / "model", path, data__decontaminate=("x",)))


def test_real_benchmarks_against_real_conversations():
    """MT-Bench's own questions are found in themselves, and in none of the real preference data here."""
    questions = shared_data("mt_bench", "question.jsonl")
    texts = decontamination.texts(f"{questions}=turns")
    assert len(texts) == 160
    own = decontamination.clean(records(*((text, ["x", "y"]) for text in texts)), texts)
    assert {row.prompt for row in own.rows} == {t for t in texts if len(decontamination._words(t)) < 8}
    real = data.read(shared_data("pref_chat", "ultrafeedback_shaped.jsonl.gz"), format="chat_pairs", stop=500)
    assert "contaminated" not in decontamination.clean(real, texts).dropped
