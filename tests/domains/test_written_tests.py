"""Tests that a policy wrote: CodeT's rule against the vote that implements it, and the effect of hostile tests."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tts_search import SearchConfig, Step, TextPolicy, search
from tts_search.domains.code import (
    CodeGrader,
    CodeTask,
    Level,
    ProgramJudge,
    Sandbox,
    Verdict,
    ask_for_tests,
    written_tests,
)
from tts_search.domains.code.tasks import PROGRAMS, Asserts, Call
from tts_search.evaluation.evaluate import Experiment, evaluate
from tts_search.evaluation.records import read_records
from tts_search.evaluation.suites import questions, write_suites
from tts_search.evaluation.tasks import Task, load_tasks
from tts_search.verifiers.execution import ExecutionVerifier

needs_sandbox = pytest.mark.skipif(
    not sys.platform.startswith("linux") or Sandbox().level() < Level.FULL, reason="no sandbox of the full level"
)
MBPP = {
    "task_id": 11,
    "text": "Write a function to find the larger of two numbers.",
    "test_list": ["assert larger(2, 2) == 2", "assert larger(5, 2) == 5", "assert larger(-7, -3) == -3"],
}
RIGHT, LAST, FIRST = (f"def larger(a, b): return {what}\n" for what in ("max(a, b)", "b", "a"))


def codet_scores(programs, tests, passes):
    """The scores of dual execution agreement, as published: CodeT (Chen et al., arXiv 2207.10397), section 2.2.

    Programs that pass the same tests are one consensus set; the score of its members is the number of its programs
    times the number of the tests that these pass.
    """
    passed = {program: frozenset(number for number, test in enumerate(tests) if passes(program, test))
              for program in programs}  # fmt: skip
    return [sum(passed[other] == passed[program] for other in programs) * len(passed[program]) for program in programs]


class Table(ProgramJudge):
    """Knows what would become of programs, by what they return."""

    def __init__(self, passes):
        super().__init__()
        self.passes = passes

    def _run(self, _task, program, tests, written):
        assert written
        found = tuple(self.passes(program, f"assert f() == {test.expected}") for test in tests)
        return Verdict(found, tuple(map(str, found))) if tests else Verdict((True,), ("None",))


def said(program):
    return f"So:\n\n```python\n{program}```\n\nDone."


SOURCES = [f"def f():\n{indent}return {number}\n" for number in range(4) for indent in (" ", "  ")]


@settings(max_examples=300, deadline=None)
@given(
    programs=st.lists(st.sampled_from([*SOURCES, ""]), min_size=1, max_size=12),
    tests=st.lists(st.integers(0, 5), max_size=12),
    bits=st.lists(st.booleans(), min_size=48, max_size=48),
)
def test_the_weighted_vote_elects_what_codet_ranks_first(programs, tests, bits):
    """Programs and tests as often as they were drawn; some differ in white space alone, some completions have none."""

    def passes(program, test):
        return bits[6 * SOURCES.index(program) + int(test[-1])]

    drawn = tuple(f"assert f() == {number}" for number in tests)
    task = CodeTask("t", "p", "f", (), (), written=drawn)
    judge = Table(passes)
    grader = CodeGrader(task, judge)
    policy = TextPolicy(lambda _: [[Step(said(each) if each else "none", True) for each in programs]])
    config = SearchConfig("best_of_n", n=len(programs))
    options = {"extract_answer": grader.extract, "equal": grader.equal, "progress": False}
    (result,) = search([task.problem], policy, ExecutionVerifier([task], judge), config, **options)
    elected = result.answer("prm_vote")
    voters = [each for each in programs if each]
    scores = codet_scores(voters, drawn, passes)
    assert scores[voters.index(elected)] == max(scores) if voters else elected == ""


@needs_sandbox
def test_the_larger_agreement_wins():
    """The paper's figure: two right programs that pass two tests beat a wrong one that passes three of the others."""
    task = replace(
        PROGRAMS.read(MBPP, "0"),
        written=("assert larger(1, 2) == 2", "assert larger(3, 2) == 3", *["assert larger(0, 1) == 9"] * 3),
    )
    judge = ProgramJudge()
    grader, verifier = CodeGrader(task, judge), ExecutionVerifier([task], judge)
    texts = ["def larger(a, b): return 9\n", RIGHT, "def larger(a, b): return sorted((a, b))[1]\n"]
    policy = TextPolicy(lambda _: [[Step(said(text), True) for text in texts]])
    config = SearchConfig("best_of_n", n=3)
    options = {"extract_answer": grader.extract, "equal": grader.equal}
    (result,) = search([task.problem], policy, verifier, config, **options)
    assert [one.score for one in result.completions] == [3 / 5, 2 / 5, 2 / 5]
    assert result.answer("prm_vote") == RIGHT
    assert result.answer("prm_max") == texts[0]


@needs_sandbox
def test_hostile_tests_are_held():
    """Each costs itself: what is behind it is judged as if it were not there."""
    hostile = (
        "assert [0 for _ in iter(int, 1)] or f(1)",
        "assert f(-1) == 0",  # on which a program of those below does not end
        "assert exit() or f(1)",
        "assert f(1) == __import__('os')._exit(0)",
        "assert f(1) == open('/etc/passwd').read()",
        "assert print('x' * 10 ** 8) or f(1) == 1",
        "assert f(",
        "assert f(1) or True",
    )
    task = CodeTask("t", "p", "f", (), (), written=(*hostile, "assert f(3) == 3", "assert f(4) == 4"))
    judge = ProgramJudge()
    loops = "def f(x):\n    while x < 0: pass\n    return x\n"
    ends = "def f(x):\n    return x if x > 0 else exit()\n"
    noise, real = (False,) * 7 + (True,), (True, True)
    assert judge.written(task, loops).passed == noise + real
    assert judge.written(task, ends).passed == noise + real
    assert judge.written(task, "def f(x): return 3").passed == (*noise, True, False)
    assert judge.written(task, "def f(x): raise SystemExit").passed == (False,) * 10
    assert judge.written(task, "while True: pass").passed == (False,) * 10
    sleeps = replace(task, written=("assert __import__('time').sleep(60) or f(1)", "assert f(1) == 1"))
    assert judge.written(sleeps, ends).passed == (False, True)


@needs_sandbox
def test_methods_and_preambles():
    task = CodeTask("t", "p", "Solution.add", (), (), "import math", written=("assert Solution().add(1, 2) == 3",))
    program = "class Solution:\n    def add(self, a, b): return a + b\n"
    assert task.suite == (Call((1, 2), 3),)
    assert ProgramJudge().written(task, program).passed == (True,)
    code = replace(task, written=("assert Solution().add(math.floor(1.5), 2) > 2", "assert Solution().add(1, 2) < 0"))
    assert ProgramJudge().written(code, program).passed == (True, False)


def test_tests_in_a_text():
    text = "```\nassert f(1) == 2, 'a'\n  assert f('(') == ')'\nassert g(1)\nassert f(1) == 2, 'a'\nassert f((1\n```"
    assert written_tests(text, "f") == ["assert f(1) == 2, 'a'", "assert f('(') == ')'"]
    assert written_tests("\n".join(f"assert f({i})" for i in range(9)), "f", 3) == [f"assert f({i})" for i in range(3)]
    assert written_tests("assert f(1) == 2; import os\nassert x.f(1)\nassert f\nassert " + "(" * 10_000, "f") == []
    lines = "assert S().add(1) == 2\nassert add(1) == 2\nassert S(1).add(1) == 2"
    assert written_tests(lines, "S.add") == ["assert S().add(1) == 2"]


def test_a_suite_of_a_file():
    tests = ["assert larger(1, 2) == 2", "assert larger(1, 2) > 0"]
    task = PROGRAMS.read({**MBPP, "written_tests": tests}, "0")
    assert task.written == tuple(tests)
    assert task.suite == (Call((1, 2), 2), Asserts(tests[1]))
    assert task.fingerprint not in (PROGRAMS.read(MBPP, "0").fingerprint, replace(task, written=()).fingerprint)
    for wrong in ("assert larger(1, 2)", [1], {"a": 1}):
        with pytest.raises(ValueError, match="written_tests: expected a list of texts, got"):
            PROGRAMS.read({**MBPP, "written_tests": wrong}, "0")
    program = {"question_content": "q", "public_test_cases": "[]", "written_tests": []}
    with pytest.raises(ValueError, match="written_tests: expected none of a whole program"):
        PROGRAMS.read(program, "0")
    with pytest.raises(ValueError, match="two for"):
        ExecutionVerifier([task, PROGRAMS.read(MBPP, "0")])


@pytest.mark.parametrize(
    ("task", "named"),
    [
        (Task("a", "1 + 1", "2"), "tasks of programming, got a,"),
        (Task("a", "p", "", grader="code", details={**MBPP, "written_tests": []}), "without written_tests, got a,"),
        (
            Task("a", "p", "", grader="code", details={"question_content": "q", "public_test_cases": "[]"}),
            "ask for a function, got a,",
        ),
    ],
)
def test_tasks_that_no_tests_are_written_for(task, named):
    with pytest.raises(ValueError, match=named):
        questions([task])


class Writer:
    """A text policy that writes tests, most of them right, and programs, most of them wrong."""

    def __init__(self):
        self.asked = []
        self.policy = TextPolicy(lambda requests: [list(map(self.answer(each), each.seeds)) for each in requests])

    def answer(self, request):
        self.asked.append(request.problem)
        if "Write 5 tests" not in request.problem:
            texts = iter([said(LAST), said(LAST), said(FIRST), said(RIGHT), said(RIGHT)])
            return lambda _: Step(next(texts), True, 10)

        def tests(seed):
            own = f"assert larger({1 + seed % 1000}, 0) == {0 if seed % 3 == 0 else 1 + seed % 1000}"
            return Step(f"```python\nassert larger(1, 2) == 2\nassert larger(4, 3) == 4\n{own}\n```", True, 20)

        return tests


@needs_sandbox
def test_a_policy_writes_tests_and_then_programs(tmp_path):
    """The public test cannot tell the programs apart, and more of them are wrong; the written tests can."""
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps(MBPP) + "\n" + json.dumps({**MBPP, "task_id": 12, "text": "The larger one, please."}))
    tasks, writer = load_tasks(path), Writer()
    suites = write_suites(tasks, writer.policy, tmp_path / "written.jsonl", texts=3, progress=False)
    assert (suites.texts, suites.tests, suites.without, suites.failed, suites.tokens) == (3, 18, 0, 0, 120)
    assert str(suites).startswith("written tests: 18 in 3 texts for each of 2 tasks (0 without any); 120 tokens")
    code = [PROGRAMS.read(task.details, task.id) for task in suites.tasks]
    assert all(len(one.written) == 9 and len(one.suite) == 5 for one in code)
    assert all(one.answer == own.fingerprint for one, own in zip(suites.tasks, code, strict=True))

    config = SearchConfig("best_of_n", n=5)
    plain = Experiment(
        "plain", config, writer.policy, ExecutionVerifier([PROGRAMS.read(one.details, "") for one in tasks])
    )
    run = Experiment("codet", config, writer.policy, ExecutionVerifier(code))
    before = evaluate(tasks, [plain], tmp_path / "results.jsonl", progress=False)
    after = evaluate(suites.tasks, [run], tmp_path / "results.jsonl", progress=False)
    assert [one.correct["prm_vote"] for one in before] == [False, False]
    assert [one.correct["prm_vote"] for one in after] == [True, True]
    assert {one.answers["prm_vote"] for one in after} == {RIGHT}

    asked = len(writer.asked)
    again = write_suites(tasks, writer.policy, tmp_path / "written.jsonl", texts=3, progress=False)
    assert again == suites
    assert len(evaluate(again.tasks, [run], tmp_path / "results.jsonl", progress=False)) == 2
    assert len(writer.asked) == asked, "nothing is drawn or run again"
    other = write_suites(tasks, writer.policy, tmp_path / "written.jsonl", texts=3, seed=5, progress=False)
    assert other.tasks != suites.tasks
    assert len(read_records(tmp_path / "written.jsonl")) == 4
    assert {one.gold for one in after}.isdisjoint(one.answer for one in other.tasks)


def test_a_policy_that_fails_writes_no_tests(tmp_path):
    def fail(_):
        raise RuntimeError("no")

    task = Task("a", PROGRAMS.read(MBPP, "a").problem, "", grader="code", details=MBPP)
    suites = write_suites([task], TextPolicy(fail), tmp_path / "w.jsonl", texts=2, progress=False)
    assert suites.tasks[0].details["written_tests"] == []
    assert "(1 without any, 1 because the policy failed)" in str(suites)


def test_what_is_asked_for_names_the_call():
    assert "`assert larger(...) == ...`" in ask_for_tests(PROGRAMS.read(MBPP, "0"))
    assert "`assert S().add(...) == ...`" in ask_for_tests(CodeTask("t", "p", "S.add", (), ()))
