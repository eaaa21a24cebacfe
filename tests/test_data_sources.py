"""Files of every kind, good and bad; the cache."""

import json
import os

from dschat.data.sources import load_examples, parse_source
from dschat.errors import UserError

import datasets
import pyarrow
import pyarrow.parquet
import pytest


def pair(n):
    return {"prompt": f"question {n}", "chosen": f"good {n}", "rejected": f"bad {n}"}


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.fixture
def load(tmp_path):
    def load(path, stage="preference", part="train", skip=False):
        options = {"cache_dir": str(tmp_path / "cache"), "seed": 0, "skip_bad_records": skip}
        return load_examples([str(path)], part, stage, **options)

    return load


def questions(table):
    return [row["prompt"][0]["content"] for row in table]


def test_parse_source():
    assert parse_source("a/b.jsonl:0.5") == ("a/b.jsonl", 0.5)
    assert parse_source("a/b.jsonl") == ("a/b.jsonl", 1.0)
    assert parse_source("C:data") == ("C:data", 1.0)
    for bad in ("a:0", "a:-1", "a:inf", "a:nan", ":2"):
        with pytest.raises(UserError, match="weight after the colon must be above 0"):
            parse_source(bad)


CELL = ',"{""limit"": 0.5, ""tests"": [""1 < 2"", ""é""]}"'


def test_every_kind_of_file_gives_the_same_examples(tmp_path, load):
    records = [pair(n) for n in range(3)] + [{"prompt": "a,\nb", "chosen": 'é "x"', "rejected": ""}]
    for record in records:
        record["metadata"] = {"tests": ["1 < 2", "é"], "limit": 0.5}
    write(tmp_path / "a.jsonl", records)
    (tmp_path / "lines.json").write_text((tmp_path / "a.jsonl").read_text())
    (tmp_path / "list.json").write_text(" \n" + json.dumps(records, indent=1))
    (tmp_path / "a.csv").write_text(
        "prompt,chosen,rejected,metadata\n"
        + "".join(f"question {n},good {n},bad {n}{CELL}\n" for n in range(3))
        + f'"a,\nb","é ""x""",{CELL}\n',
        encoding="utf-8",
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    datasets.Dataset.from_list(records).save_to_disk(tmp_path / "folder")
    expected = None
    for name in ("a.jsonl", "lines.json", "list.json", "a.csv", "a.parquet", "folder"):
        table, counter = load(tmp_path / name)
        rows = [{key: row[key] for key in ("prompt", "responses", "ranks", "margin", "metadata")} for row in table]
        expected = expected or rows
        assert rows == expected and not counter, name
        assert table[0]["source"] == str(tmp_path / name)
    assert expected[3] == {
        "prompt": [{"role": "user", "content": "a,\nb"}],
        "responses": ['é "x"', ""],
        "ranks": [1, 2],
        "margin": None,
        "metadata": '{"limit":0.5,"tests":["1 < 2","é"]}',
    }


def test_a_long_json_list_is_read_through_a_small_window(tmp_path, load):
    records = [pair(n) | {"filler": "x" * (n % 7 * 20_000)} for n in range(40)]
    (tmp_path / "list.json").write_text(json.dumps(records))
    assert questions(load(tmp_path / "list.json")[0]) == [f"question {n}" for n in range(40)]


def test_bom_crlf_and_blank_lines_are_read(tmp_path, load):
    lines = [json.dumps(pair(0)), "", json.dumps(pair(1))]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n")
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfprompt,chosen,rejected\r\nquestion 0,a,b\r\n\r\nquestion 1,c,d\r\n")
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf[" + ",\r\n".join(filter(None, lines)).encode() + b"]\r\n")
    for name in ("a.jsonl", "a.csv", "a.json"):
        assert questions(load(tmp_path / name)[0]) == ["question 0", "question 1"]


GOOD = json.dumps(pair(0)).encode()
BAD_FILES = {
    "wrong key": ("a.jsonl", GOOD + b'\n{"promt": "a", "chosen": "b"}\n', 2, "expected prompt"),
    "empty answer": ("a.jsonl", GOOD + b'\n\n{"prompt": "a", "response": " "}\n', 3, "the answer is empty"),
    "broken line in the middle": ("a.jsonl", GOOD + b'\n{"prompt": "a"\n' + GOOD, 2, "not JSON"),
    "bad UTF-8": ("a.jsonl", GOOD + b'\n{"prompt": "\xff", "response": "b"}\n', 2, "not UTF-8 .byte 13"),
    "metadata that is no object": ("a.jsonl", GOOD + b'\n{"prompt": "a", "metadata": 3}\n', 2, "object with keys"),
    "NaN in metadata": ("a.jsonl", GOOD + b'\n{"prompt": "a", "metadata": {"x": NaN}}\n', 2, "object that JSON can"),
    "bad UTF-8 in metadata": ("a.json", b'[{"prompt": "a", "metadata": {"x": "\xff"}}]', 1, "not UTF-8"),
    "bad pattern": ("a.csv", b'prompt,metadata\na,"{""masked_pattern"": ""(""}"\n', 2, "not a regular expression"),
    "a list on a line": ("a.jsonl", GOOD + b"\n[1]\n", 2, "must be a JSON object with keys, found list"),
    "empty file": ("a.jsonl", b"", 1, "the file is empty"),
    "only blank lines": ("a.json", b"\n \n", 1, "the file is empty"),
    "empty list": ("a.json", b"[]", 1, "the file is empty"),
    "broken element": ("a.json", b"[" + GOOD + b', {"prompt": }]', 2, "not JSON"),
    "trailing comma": ("a.json", b"[" + GOOD + b",]", 2, "not JSON"),
    "missing comma": ("a.json", b"[" + GOOD + GOOD + b"]", 1, 'no ","'),
    "list not closed": ("a.json", b"[" + GOOD, 1, "not closed"),
    "text after the list": ("a.json", b"[" + GOOD + b"] x", 1, "after the end of the list"),
    "number in a list": ("a.json", b"[" + GOOD + b", 3]", 2, "found int"),
    "bad UTF-8 in a list": ("a.json", b"[" + GOOD + b', {"prompt": "\xff", "response": "b"}]', 2, "not UTF-8"),
    "csv with a missing field": ("a.csv", b"prompt,response\na,b\nc\n", 3, "1 fields where the header has 2"),
    "csv with an open quote": ("a.csv", b'prompt,response\na,b\n"c,d\n', 3, "not CSV"),
    "csv, bad UTF-8, after a record of two lines": (
        "a.csv",
        b'prompt,response\n"a\nb",c\n\xff,d\n',
        4,
        "not UTF-8",
    ),
    "csv without a header": ("a.csv", b"", 1, "the file is empty"),
    "not parquet": ("a.parquet", b"PAR?", 1, "not a parquet file"),
    "unknown suffix": ("a.txt", GOOD, 1, "unknown kind of file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_named_with_its_line(name, tmp_path, load):
    file, content, line, message = BAD_FILES[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path / file, stage="sft")
    assert str(caught.value).startswith(f"{tmp_path / file}:{line}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["missing.jsonl", "./missing", "/no/such/folder", "some/folder/deeper"])
def test_missing_file_is_not_looked_for_on_the_hub(path, load):
    with pytest.raises(UserError, match=f"^{path}:1: no such file; check the path"):
        load(path)


def test_folder_that_was_not_saved_by_datasets(tmp_path, load):
    write(tmp_path / "a.jsonl", [pair(0)])
    with pytest.raises(UserError, match="not a save_to_disk folder"):
        load(tmp_path)


def test_bad_records_are_dropped_and_counted_on_request(tmp_path, load):
    lines = [GOOD, b"{", b'{"prompt": "a\xff"}', b'{"x": 1}', b"7", json.dumps(pair(1)).encode()]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    table, counter = load(tmp_path / "a.jsonl", skip=True)
    assert questions(table) == ["question 0", "question 1"] and counter == {"bad record": 4}
    assert load(tmp_path / "a.jsonl", skip=True)[1] == {"bad record": 4}, "the count comes with the cache"
    with pytest.raises(UserError, match="a.jsonl:2: .*--skip_bad_records"):
        load(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b"\n".join(lines[1:5]))
    with pytest.raises(UserError, match=r"b.jsonl:1: none of its records can be used \(4 x bad record\)"):
        load(tmp_path / "b.jsonl", skip=True)


def test_each_stage_keeps_what_it_can_use(tmp_path, load):
    records = [pair(0), {"prompt": "question 1"}, {"prompt": "question 2", "response": "a"}]
    records.append({"prompt": "question 3", "responses": ["a", "b"], "ranks": [1, 1]})
    path = write(tmp_path / "a.jsonl", records)
    for stage, kept, dropped in [
        ("sft", [0, 2, 3], {"no response": 1}),
        ("preference", [0], {"no preference between responses": 3}),
        ("prompt", [0, 1, 2, 3], {}),
    ]:
        table, counter = load(path, stage)
        assert questions(table) == [f"question {n}" for n in kept] and counter == dropped
    with pytest.raises(UserError, match="nothing left for the preference stage, 1 with no preference.*chosen and"):
        load(write(tmp_path / "b.jsonl", records[1:2]))


def test_cache_follows_the_content(tmp_path, load, monkeypatch):
    path = tmp_path / "a.jsonl"
    write(path, [pair(0)])
    assert questions(load(path)[0]) == ["question 0"]
    stamp = os.stat(path)
    write(path, [pair(7)])
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # same size, same time: only the byte differs
    assert questions(load(path)[0]) == ["question 7"]

    def no_reading(record):
        raise AssertionError("read again")

    monkeypatch.setattr("dschat.data.tables.to_example", no_reading)
    assert questions(load(path)[0]) == ["question 7"], "unchanged: from the cache"
    monkeypatch.setattr("dschat.data.tables.READING_VERSION", "next")
    with pytest.raises(Exception, match="generating the dataset"):
        load(path)


def test_files_appear_only_under_the_cache_folder(tmp_path, load, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "in"
    folder.mkdir()
    path = write(folder / "a.jsonl", [pair(0)])
    datasets.Dataset.from_list([pair(0)]).save_to_disk(folder / "saved")
    before = {str(file): file.stat().st_mtime_ns for file in folder.rglob("*")}
    load(path), load(folder / "saved")
    assert {str(file): file.stat().st_mtime_ns for file in folder.rglob("*")} == before
    assert {file.name for file in tmp_path.iterdir()} == {"in", "cache"}
    assert not [file for file in tmp_path.rglob("*") if file.suffix in (".pt", ".pkl")], "no pickle of data"


@pytest.mark.parametrize("name", ["test", "validation", "eval", "dev"])
def test_names_of_eval_splits(name, tmp_path, load):
    tables = {split: datasets.Dataset.from_list([pair(split)]) for split in ("train", name)}
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "saved")
    assert questions(load(tmp_path / "saved", part="eval")[0]) == [f"question {name}"]
    assert questions(load(tmp_path / "saved")[0]) == ["question train"]
