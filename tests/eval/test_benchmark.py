"""Answers to benchmarks: what a model is asked, at which temperature, and the files that the harnesses read."""

import gzip
import json

import pytest

from fpo_jax.cli import generate
from fpo_jax.cli import openai_client as servers
from fpo_jax.eval.benchmarks import answer
from tests import tiny
from tests.answer_server import AnswerServer
from tests.paths import shared_data

ROWS = {
    "alpaca_eval": [
        {"instruction": "Say a.", "dataset": "koala", "output": "-"},
        {"instruction": "b?", "dataset": "x"},
    ],
    "arena_hard": [{"uid": "u1", "category": "c", "prompt": "one"}, {"uid": "u2", "category": "c", "prompt": "two"}],
    "arena_hard_first": [{"question_id": "q1", "turns": [{"content": "one"}]}],
    "mt_bench": [
        {"question_id": 81, "category": "writing", "turns": ["w1", "w2"]},
        {"question_id": 91, "category": "math", "turns": ["m1", "m2"]},
        {"question_id": 92, "category": "roleplay", "turns": ["r1", "r2"]},
    ],
}


def questions(tmp_path, name):
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
    return str(path)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def with_server(tmp_path, name, server, **changed):
    which = name.removesuffix("_first")
    given = {"server": server.url, "server_model": "org/m", "name": "mine", "concurrency": 1}
    given |= {"max_new_tokens": 5} | ({} if which == "mt_bench" else {"temperature": 0.5}) | changed
    return answer.run(answer.Options(benchmark=which, data=questions(tmp_path, name), out=tmp_path / "o", **given))


def said(text):
    return f" re: {text}\n"


def test_two_turns_at_the_temperature_of_the_category(tmp_path):
    server = AnswerServer(lambda number, body: None, said)
    with server.served():
        [path] = with_server(tmp_path, "mt_bench", server)
        asked = len(server.bodies)
        before = path.read_bytes()
        assert with_server(tmp_path, "mt_bench", server) == [path] and len(server.bodies) == asked == 6
    assert path == tmp_path / "o" / "model_answer" / "mine.jsonl" and path.read_bytes() == before
    temperatures = {body["messages"][-1]["content"]: body["temperature"] for body in server.bodies}
    assert temperatures == {"w1": 0.7, "r1": 0.7, "m1": 0.0, "w2": 0.7, "r2": 0.7, "m2": 0.0}
    [second] = [body["messages"] for body in server.bodies if body["messages"][-1]["content"] == "m2"]
    assert [turn["role"] for turn in second] == ["user", "assistant", "user"] and second[1]["content"] == said("m1")
    found = lines(path)
    assert [line["question_id"] for line in found] == [81, 91, 92]
    assert found[1]["choices"] == [{"index": 0, "turns": ["re: m1", "re: m2"]}]
    assert found[0].keys() == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert len({line["answer_id"] for line in found}) == 3


def test_every_turn_carries_all_sampling_fields(tmp_path):
    neutral = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0}
    neutral |= {"frequency_penalty": 0.0, "min_tokens": 0, "stop": [], "stop_token_ids": [], "n": 1, "max_tokens": 5}
    server = AnswerServer(lambda number, body: None, said)
    with server.served():
        with_server(tmp_path, "mt_bench", server)
        assert len(server.bodies) == 6 and all(body.items() >= neutral.items() for body in server.bodies)
        with_server(tmp_path / "o", "mt_bench", server, server_api="openai")
    assert all("top_k" not in body and body["presence_penalty"] == 0 for body in server.bodies[6:])
    with pytest.raises(ValueError, match="--server-api=openai cannot carry --stop-ids; leave it out, or ask a vLLM"):
        with_server(tmp_path, "mt_bench", server, server_api="openai", recipe="llama3_base", max_new_tokens=0)


def test_arena_hard_of_both_forms(tmp_path):
    server = AnswerServer(lambda number, body: None, said)
    with server.served():
        [path] = with_server(tmp_path, "arena_hard", server)
        [first] = with_server(tmp_path / "o", "arena_hard_first", server)
    found = lines(path)
    real = json.loads(gzip.open(shared_data("arena_hard", "answer.v0.1.gpt-4-0314.jsonl.gz"), "rt").readline())
    assert found[0].keys() == real.keys() and found[0]["uid"] == "u1" and found[0]["model"] == "mine"
    assert found[0]["messages"] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": {"answer": said("one")}},
    ]
    assert lines(first)[0]["choices"] == [{"index": 0, "turns": [{"content": said("one")}]}]


def test_a_model_here_answers_alpaca_eval(tmp_path):
    tiny.write_model(tmp_path / "model", layers=1)
    given = {"model": str(tmp_path / "model"), "max_new_tokens": 4, "temperature": 0.0, "compute_dtype": "float32"}
    options = answer.Options(
        benchmark="alpaca_eval", data=questions(tmp_path, "alpaca_eval"), out=tmp_path / "o", batch_size=1, **given
    )
    [path] = answer.run(options)
    found = json.loads(path.read_text())
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": row["instruction"]}) + "\n" for row in ROWS["alpaca_eval"]))
    given |= {"batch_size": 1, "rule": "chat"}
    generate.run(generate.Options(out=tmp_path / "g.jsonl", data=str(prompts), **given))
    expected = [line["completions"][0] for line in lines(tmp_path / "g.jsonl")]
    assert [(row["dataset"], row["instruction"], row["output"], row["generator"]) for row in found] == [
        ("koala", "Say a.", expected[0], "model"),
        ("x", "b?", expected[1], "model"),
    ]


def test_recipes_decode_as_the_original():
    shown = {name: (r.chat_template, *r.alpaca_eval, *r.arena_hard) for name, r in answer.RECIPES.items()}
    assert shown == {
        "mistral_base": ("zephyr", 0.7, 2048, 0.0, 4096),
        "mistral_instruct": ("mistral", 0.5, 2048, 0.0, 4096),
        "llama3_base": ("llama3", 0.9, 4096, 0.0, 4096),
        "llama3_instruct": ("llama3", 0.9, 4096, 0.0, 4096),
    }


def test_a_recipe_sets_what_is_asked(tmp_path):
    server = AnswerServer(lambda number, body: None, said)
    with server.served():
        with_server(tmp_path, "alpaca_eval", server, recipe="llama3_base", max_new_tokens=0, temperature=float("nan"))
    body = server.bodies[0]
    assert (body["temperature"], body["max_tokens"], body["stop_token_ids"]) == (0.9, 4096, [128001, 128009])


def test_questions_without_an_answer_are_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr(servers, "LONGEST_WAIT_S", 0.02)
    broken = [True]
    server = AnswerServer(
        lambda number, body: 400 if broken[0] and body["messages"][-1]["content"] == "two" else None, said
    )
    with server.served():
        assert with_server(tmp_path, "arena_hard", server) == []
        assert not (tmp_path / "o" / "model_answer").exists()
        broken[0] = False
        [path] = with_server(tmp_path, "arena_hard", server)
    assert len(lines(path)) == 2 and len(server.bodies) == 3


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("alpaca_eval", {"benchmark": "mt"}, "--benchmark='mt' is not one of alpaca_eval"),
        ("alpaca_eval", {"recipe": "x"}, "--recipe='x' is not one of mistral_base"),
        ("alpaca_eval", {"max_new_tokens": 5}, "give --temperature or --recipe"),
        ("alpaca_eval", {"temperature": 1.0}, "--max-new-tokens=0 must be at least 1"),
        ("mt_bench", {"temperature": 1.0, "max_new_tokens": 5}, "--temperature is not for mt_bench"),
        ("alpaca_eval", {"recipe": "llama3_base", "temperature": 1.0}, "--temperature is what --recipe=llama3_base"),
        ("alpaca_eval", {"recipe": "llama3_base", "name": "../x"}, "--name='../x' must be a plain name"),
        ("alpaca_eval", {"recipe": "llama3_base", "rows": "5:"}, "has no question in rows 5:"),
    ],
)  # fmt: skip
def test_refusals(tmp_path, name, changed, message):
    given = {"benchmark": name, "data": questions(tmp_path, name), "out": tmp_path / "o", "model": "m"} | changed
    with pytest.raises(ValueError, match=message):
        answer.run(answer.Options(**given))
    assert not (tmp_path / "o").exists()


def test_rows_of_another_benchmark(tmp_path):
    given = {"benchmark": "mt_bench", "out": tmp_path / "o", "model": "m", "max_new_tokens": 5}
    with pytest.raises(ValueError, match="2 rows are no questions of mt_bench:\n.*jsonl:1: no column 'category'"):
        answer.run(answer.Options(data=questions(tmp_path, "alpaca_eval"), **given))


@pytest.mark.parametrize(
    ("name", "file", "count"),
    [
        ("mt_bench", "question.jsonl", 80),
        ("arena_hard", "question.v0.1.jsonl", 500),
        ("arena_hard", "question.v2.0.jsonl", 750),
    ],
)
def test_the_real_questions_are_read(name, file, count):
    path = shared_data(name, file)
    options = answer.Options(benchmark=name, data=str(path), out=path.parent)
    assert len(answer._questions(options, 0.0)) == count
