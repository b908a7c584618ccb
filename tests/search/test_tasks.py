"""Tasks from files and from the hub (whose library is replaced by a stand-in)."""

from __future__ import annotations

import gzip
import json
import sys
from types import SimpleNamespace

import pytest
from tts_search import MissingExtraError
from tts_search.evaluation.tasks import Task, load_tasks


def test_files(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(
        '{"problem": "a", "answer": "1", "level": 3, "unique_id": "x/1"}\n'
        "\n"
        '{"question": "b", "solution": "so \\\\boxed{2}", "id": 7}\n'
        '{"problem": "c", "answer": 3, "level": "Level 5"}\n'
        '{"problem": "c", "solution": "none", "extracted_groundtruth": "204"}\n'
        '{"question": "d", "answer": "12 / 3 = <<12/3=4>>4\\n#### 1,204"}\n'
    )
    assert load_tasks(path) == [
        Task("x/1", "a", "1", "3"),
        Task("7", "b", "2", ""),
        Task("3", "c", "3", "5"),
        Task("4", "c", "204", ""),
        Task("5", "d", "1,204", ""),
    ]
    assert len(load_tasks(path, limit=2)) == 2


@pytest.mark.parametrize(
    "line", ['{"problem": "b"}', "nonsense", "[]", '{"problem": "b", "answer": ""}', '{"problem": 1, "answer": 2}', "3"]
)
def test_a_line_that_is_no_task(tmp_path, line):
    path = tmp_path / "data.jsonl"
    path.write_text(f'{{"problem": "a", "answer": "1"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"data.jsonl, line 2: expected an object with problem and answer"):
        load_tasks(path)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("MATH-500", ("HuggingFaceH4/MATH-500", None, "test")),
        ("aime24", ("HuggingFaceH4/aime_2024", None, "train")),
        ("GSM8K", ("openai/gsm8k", "main", "test")),
        ("me/mine", ("me/mine", None, "test")),
        ("me/mine:train", ("me/mine", None, "train")),
        ("me/mine:hard:train", ("me/mine", "hard", "train")),
    ],
)
def test_the_hub(monkeypatch, name, call):
    calls = []

    def load_dataset(path, config, split):
        calls.append((path, config, split))
        return [{"problem": "a", "answer": 1}, {"problem": "b", "answer": 2}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_tasks(name, limit=1) == [Task("0", "a", "1")]
    assert calls == [call]


def test_what_is_no_source(monkeypatch):
    for name in ("nothing.jsonl", "/nothing", "folder/nothing.jsonl.gz"):
        with pytest.raises(
            ValueError, match=r"^source: expected a file, one of MATH-500, AIME24, GSM8K, or owner/name"
        ):
            load_tasks(name)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"tts-kernels\[data\]"):
        load_tasks("MATH-500")


LINE = '{"problem": "1 + 2", "answer": "3"}\n{"problem": "Zwölf?", "answer": "12"}\n'
READ = [Task("0", "1 + 2", "3"), Task("1", "Zwölf?", "12")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le with a mark"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("compressed", [False, True])
def test_byte_order_marks_line_ends_and_gzip_are_read(tmp_path, encoding, end, compressed):
    name, _, mark = encoding.partition(" with")
    data = (("\ufeff" if mark else "") + LINE.replace("\n", end)).encode(name)
    path = tmp_path / "data.jsonl"  # the name says nothing
    path.write_bytes(gzip.compress(data) if compressed else data)
    assert load_tasks(path) == READ


def test_files_put_together_keep_their_marks(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"".join(line.encode("utf-8-sig") for line in LINE.splitlines(keepends=True)))
    assert load_tasks(path) == READ


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (LINE.encode("latin-1"), r"data.jsonl, line 2: expected text in UTF-8, got byte 0xf6 .* iconv"),
        (LINE.encode("utf-16")[:-1], r"data.jsonl: expected text in UTF-16"),
        (gzip.compress(LINE.encode(), mtime=0)[:-9], r"data.jsonl: expected a whole gzip file"),
        (b"\x1f\x8bnonsense", r"data.jsonl: expected a whole gzip file"),
        (b"", r"data.jsonl: expected tasks, found none"),
        (b"\n \n\xef\xbb\xbf", r"data.jsonl: expected tasks, found none"),
        (b"[" * 100_000, r"data.jsonl, line 1: expected an object .* nested too deep"),
        (b'{"problem": "a", "answer": NaN}', r"data.jsonl, line 1: expected an object .* NaN is no number"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, data, message):
    path = tmp_path / "data.jsonl"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        load_tasks(path)


@pytest.mark.parametrize("field", ["answer", "expected_answer", "extracted_groundtruth", "id", "unique_id", "level"])
@pytest.mark.parametrize("value", [{"value": "2"}, ["3", "4"], [3], [], {}, True, False])
def test_what_is_neither_text_nor_number(tmp_path, field, value):
    path = tmp_path / "data.jsonl"
    entry = {"problem": "a", field: value} if "answer" in field or "truth" in field else {"problem": "a", "answer": "1"}
    path.write_text(json.dumps({"problem": "b", "answer": "1"}) + "\n" + json.dumps({**entry, field: value}))
    with pytest.raises(ValueError, match=rf"data.jsonl, line 2: .*; {field}: expected a text or a number, got a"):
        load_tasks(path)


@pytest.mark.parametrize(
    ("entry", "field"),
    [
        ({"problem": ["a"], "answer": 1}, "problem"),
        ({"problem": " ", "answer": 1}, "problem"),
        ({"question": {"text": "a"}, "answer": 1}, "question"),
        ({"answer": 1}, "problem"),
        ({"problem": "a", "solution": "no box"}, "solution"),
        ({"problem": "a", "solution": ["\\boxed{1}"]}, "solution"),
        ({"problem": "a", "answer": "  "}, "answer"),
        ({"problem": "a", "answer": None}, "answer"),
    ],
)
def test_errors_name_the_field(tmp_path, entry, field):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(entry))
    with pytest.raises(ValueError, match=rf"data.jsonl, line 1: expected an object .*; {field}: expected a text"):
        load_tasks(path)


def test_numbers_are_what_the_file_says(tmp_path):
    path = tmp_path / "data.jsonl"
    answers = ["0.50", "1e400", "12345678901234567890123", "-0", "0.1"]
    path.write_text("".join(f'{{"problem": "a", "answer": {one}, "level": {i}}}\n' for i, one in enumerate(answers)))
    assert [task.answer for task in load_tasks(path)] == [*answers[:3], "0", "0.1"]
    assert [task.level for task in load_tasks(path)] == list("01234")


@pytest.mark.parametrize(
    "ids", [["x", "y", "x"], [1, 2, "1"], [None, "z", "0"], ["", "a", 0]], ids=["texts", "kinds", "number", "empty"]
)
def test_ids_that_are_there_twice(tmp_path, ids):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"id": one, "problem": "a", "answer": 1}) + "\n" for one in ids))
    with pytest.raises(ValueError, match=r"data.jsonl, line 3: id: .* got '.*', which .*data.jsonl, line 1 has"):
        load_tasks(path)
    assert len(load_tasks(path, limit=2)) == 2


@pytest.mark.parametrize("limit", [0, -1])
def test_limits(tmp_path, limit):
    with pytest.raises(ValueError, match=r"^limit: expected an int >= 1, got"):
        load_tasks(tmp_path, limit)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ValueError, match="expected a file of tasks, got a folder"):
        load_tasks(tmp_path)


def test_the_hub_fails(monkeypatch):
    def load_dataset(*_, **__):
        raise RuntimeError("no\nconnection")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ValueError, match=r"^me/mine: expected a data set of the hub: RuntimeError: no"):
        load_tasks("me/mine")
