"""Files that are not JSON: Parquet, Arrow, CSV, folders of them, and one sentence for every other kind."""

import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from fpo_jax import data
from fpo_jax.data import decontamination, loading
from fpo_jax.trainer import run_inputs
from tests import tiny

ROWS = [
    {"prompt": "p0", "chosen": " c0", "rejected": " r0"},
    {"prompt": "p1", "chosen": ' c1, "and"\nmore', "rejected": " NA"},
    {"prompt": "01", "chosen": " 1.50", "rejected": " null"},
]
CSV = 'prompt,chosen,rejected\np0, c0, r0\np1," c1, ""and""\nmore", NA\n01, 1.50, null\n'
TURNS = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
OTHER = [TURNS[0], {"role": "assistant", "content": "b"}]


def write(path, rows=ROWS):
    """Write rows as the kind that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    elif path.suffix == ".arrow":  # a stream, as datasets writes them
        with pyarrow.ipc.new_stream(path, table.schema) as file:
            file.write_table(table)
    elif path.suffix == ".feather":
        with pyarrow.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.name.endswith(".csv.gz"):
        path.write_bytes(gzip.compress(CSV.encode()))
    else:
        path.write_text(CSV if path.suffix == ".csv" else CSV.replace(",", "\t").replace("c1\t", "c1,"))
    return path


def read(path, **options):
    return data.read(path, format=options.pop("format", "json"), **options)


def plain(found):
    return [
        dict(zip(("prompt", "chosen", "rejected"), (row.prompt, *row.completions), strict=True)) for row in found.rows
    ]


@pytest.mark.parametrize("name", ["d.parquet", "d.arrow", "d.feather", "d.csv", "d.tsv", "d.csv.gz", "d.jsonl"])
def test_each_kind_has_the_same_rows(tmp_path, name):
    path = write(tmp_path / name)
    found = read(path)
    assert plain(found) == ROWS
    places = [row.source.removeprefix(str(path)) for row in found.rows]
    lines = name.split(".")[1] in ("csv", "tsv")
    assert places == ([":2", ":3", ":5"] if lines else [":1", ":2", ":3"] if "json" in name else ["[0]", "[1]", "[2]"])
    assert plain(read(path, start=1, stop=2)) == ROWS[1:2]


def test_the_kind_is_that_of_the_first_bytes_before_the_name(tmp_path):
    write(tmp_path / "d.parquet").rename(tmp_path / "d.jsonl")
    assert plain(read(tmp_path / "d.jsonl")) == ROWS


def test_messages_lists_and_nulls_of_a_table(tmp_path):
    groups = [{"prompt": TURNS[:1], "completions": ["x", "y"], "rewards": [1.0, 2.0], "tools": None}]
    pairs = [{"chosen": TURNS, "rejected": OTHER, "score": 1.5}]
    for kind in ("parquet", "arrow"):
        [row] = read(write(tmp_path / f"g.{kind}", groups)).rows
        assert (row.prompt, row.completions, row.rewards) == (TURNS[:1], ["x", "y"], [1.0, 2.0])
        found = read(write(tmp_path / f"p.{kind}", pairs), format="chat_pairs")
        assert found.rows[0].completions == [TURNS[1], OTHER[1]]
        assert found.noted == {"column_not_used:score": [f"{tmp_path}/p.{kind}[0]"]}
    both = [groups[0] | {"chosen": None, "rejected": None}, {**ROWS[0], "prompt": TURNS[:1], "completions": None}]
    rows = read(write(tmp_path / "both.parquet", both)).rows
    assert [row.rewards for row in rows] == [[1.0, 2.0], [1.0, 0.0]]


def test_an_empty_cell_is_missing_and_other_texts_are_texts(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("\ufeffprompt,chosen,rejected,note\r\np,,r,\r\n\r\nq,NA,0,x\r\n", newline="")
    with pytest.raises(ValueError, match=r"d.csv:2: missing or null: chosen; wanted prompt, chosen, rejected"):
        read(path)
    found = read(path, on_bad_row="skip")
    assert plain(found) == [{"prompt": "q", "chosen": "NA", "rejected": "0"}]
    assert found.noted == {"column_not_used:note": [f"{path}:4"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"prompt,chosen,rejected\np,c\n", r"d.csv:2: 2 cells under a header of 3 columns"),
        (b"prompt,chosen,chosen\np,c,r\n", r"d.csv:1: the header needs one name for each column, none twice"),
        (b"prompt,,rejected\np,c,r\n", r"d.csv:1: the header needs one name for each column"),
        (b'prompt,chosen,rejected\np,c,r\np,"c,r\n', r"d.csv:3: broken CSV \(unexpected end of data\)"),
        (b"prompt,chosen,rejected\np,c,\xff\n", r"d.csv:2: not UTF-8 .*; save the table as UTF-8"),
        (
            b"prompt;chosen;rejected\np;c;r\n",
            r"d.csv:2: missing or null: prompt, chosen, rejected; .* found prompt;chosen",
        ),
        (b"prompt,chosen,rejected\n", r"d.csv: no rows"),
        (b"", r"d.csv: no rows"),
    ],
)
def test_damaged_csv_is_told_by_its_line(tmp_path, content, message):
    (tmp_path / "d.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "d.csv")


@pytest.mark.parametrize("name", ["d.parquet", "d.arrow", "d.feather"])
def test_damaged_tables_are_one_sentence(tmp_path, name):
    path = write(tmp_path / name)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:16], b"nothing of the kind"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{name}.*(cannot be read as \w+ after \d rows|no rows)") as error:
            read(path)
        assert "\n" not in str(error.value)


# --- folders


def hub_copy(folder):
    """What `huggingface-cli download` leaves."""
    for split, row in (("train", ROWS[0]), ("test", ROWS[1])):
        write(folder / "data" / f"{split}-00000-of-00001.parquet", [row])
    (folder / "README.md").write_text("# card")
    (folder / "dataset_infos.json").write_text("{}")
    (folder / ".cache").mkdir()
    write(folder / ".cache" / "train.jsonl", [ROWS[2]])
    return folder


def test_a_copy_of_a_hub_data_set_is_read_by_its_splits(tmp_path, caplog):
    folder = hub_copy(tmp_path / "copy")
    assert plain(read(folder, split="train")) == plain(read(folder / "data", split="train")) == ROWS[:1]
    assert plain(read(folder, split="test")) == ROWS[1:2]
    with caplog.at_level("INFO", "fpo_jax"):
        assert plain(read(folder)) == [ROWS[1], ROWS[0]]
    assert "no split is named, and all of its 2 files are read" in caplog.text
    with pytest.raises(
        ValueError, match=r"has no file validation\.\* or .* it has data/test-00000-of-00001\.parquet, "
    ):
        read(folder, split="validation")


def test_a_split_may_be_a_folder(tmp_path):
    for number, split in enumerate(("train", "test")):
        write(tmp_path / "default" / split / "0000.parquet", [ROWS[number]])
    assert plain(read(tmp_path, split="train")) == ROWS[:1]


def test_files_beside_folders_are_read_alone(tmp_path):
    write(tmp_path / "a.jsonl", ROWS[:1])
    write(tmp_path / "old" / "b.jsonl", ROWS[1:])
    assert plain(read(tmp_path)) == ROWS[:1]


def test_a_folder_that_mixes_kinds_or_has_none_names_what_is_there(tmp_path):
    write(tmp_path / "mixed" / "train.jsonl")
    write(tmp_path / "mixed" / "train.parquet")
    with pytest.raises(
        ValueError, match=r"mixes kinds of files, train.jsonl \(json\), train.parquet \(parquet\); name"
    ):
        read(tmp_path / "mixed", split="train")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="has no file with rows of JSON, .*; it has none"):
        read(tmp_path / "none")
    for number in range(10):
        (tmp_path / "none" / f"{number}.zip").write_text("")
    with pytest.raises(ValueError, match=r"it has 0\.zip, .*7\.zip and 2 more$"):
        read(tmp_path / "none")


# --- every other kind


@pytest.mark.parametrize(
    ("name", "head", "message"),
    [
        ("d.zip", b"PK\x03\x04", "d.zip is a ZIP archive or an Excel workbook; unpack it, or save the sheet as CSV"),
        ("d.xlsx", b"PK\x03\x04", "d.xlsx is a ZIP archive or an Excel workbook"),
        ("d.xls", b"\xd0\xcf\x11\xe0", "d.xls is an Excel workbook; save the sheet as CSV"),
        ("d.jsonl.zst", b"\x28\xb5\x2f\xfd", "packed by zstd; unpack it"),
        ("d.jsonl.bz2", b"BZh9", "packed by bzip2; unpack it"),
        ("d.jsonl.xz", b"\xfd7zXZ\x00", "packed by xz; unpack it"),
        ("d.db", b"SQLite format 3\x00", "an SQLite database; write its table as CSV"),
        ("d.tar.gz", b"\x1f\x8b", "a tar archive; unpack it"),
        ("d.parquet", b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS, not the data; fetch the"),
    ],
)
def test_other_kinds_are_named_with_the_way_out(tmp_path, name, head, message):
    (tmp_path / name).write_bytes(head + b"\x00" * 40)
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value) and "What is read: JSON, JSON Lines, CSV" in str(error.value)


# --- everywhere


def test_a_run_trains_on_a_copy_of_a_hub_data_set(tmp_path):
    tiny.write_model(tmp_path / "model", layers=1)
    folder = hub_copy(tmp_path / "copy")
    c = tiny.config(tmp_path / "model", folder, data__train_split="train", data__eval_split="test")
    inputs = run_inputs.prepare(c)
    assert (inputs.train.prepared.groups, inputs.evaluation.prepared.groups) == (1, 1)
    assert inputs.train.prepared.sources == (f"{folder}/data/train-00000-of-00001.parquet[0]",)


def test_benchmarks_and_prompts_come_from_tables(tmp_path):
    for name in ("b.parquet", "b.csv"):
        path = write(tmp_path / name)
        assert decontamination.texts(f"{path}=prompt") == [row["prompt"] for row in ROWS]
        assert [row.prompt for row in read(path, format="prompts").rows] == [row["prompt"] for row in ROWS]


def test_what_datasets_caches_is_read(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    [file] = (tmp_path / "saved").glob("*.arrow")
    assert [row for _, row in loading.rows(str(file), split=None, data_dir=None, revision=None)] == ROWS
