"""Tasks from files and from the hub (whose library is played by a stand-in)."""

from __future__ import annotations

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
    with pytest.raises(ValueError, match=r"^source: expected a file, one of MATH-500, AIME24, GSM8K, or owner/name"):
        load_tasks("nothing.jsonl")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"tts-kernels\[data\]"):
        load_tasks("MATH-500")
