"""Policies and verifiers for callers that pass whole texts and keep no branches.

Other frameworks submit a prompt with all of the text so far, whenever they want its next step or its scores. A
:class:`StepSampler` stands in front of a policy, and a :class:`StepScorer` in front of a verifier. They remember which
text is which branch, and ask only for what is new. The adapters to those frameworks are made of these two classes.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from tts_search.errors import SearchError
from tts_search.search.protocol import Expand, Policy, Score, Usage, Verifier
from tts_search.search.seeds import Seeds
from tts_search.search.steps import split_steps
from tts_search.search.types import Step, StepParams

__all__ = ["Continuation", "StepSampler", "StepScorer", "before_delimiter"]

# Numbers of the problems of all samplers and scorers. Searches that share the policy or the verifier have others.
_NUMBERS: Final = itertools.count(1 << 40)
_GREEDY: Final = -1  # the last number of a greedy child's path
_STRANGE: Final = -2  # the first number of a path for a text that was not sampled here

Paths = list[tuple[int, ...]]
Tree = TypeVar("Tree")


@dataclass(frozen=True, slots=True)
class Continuation:
    """A text to continue, and how.

    Attributes
    ----------
    problem : str
        The problem for the policy.
    text : str
        The text generated so far.
    params : StepParams
        How to sample.
    num_samples : int
        How many independent samples.
    """

    problem: str
    text: str
    params: StepParams
    num_samples: int = 1


def before_delimiter(text: str, delimiter: str | None) -> str:
    r"""Return a step's text before the delimiter that ended it, and the text of its last token after the delimiter.

    Examples
    --------
    >>> before_delimiter("\n\n1 + 1 = 2.\n\n\n", "\n\n")
    '\n\n1 + 1 = 2.'
    """
    if delimiter is None:
        return text
    end = text.find(delimiter, len(text) - len(text.lstrip()) + 1)
    return text if end < 0 else text[:end]


class _Problems(Generic[Tree]):
    """The problems in flight, least recently used first. If there are too many, they are ended in this order."""

    def __init__(self, driver: Policy | Verifier, max_problems: int) -> None:
        if isinstance(max_problems, bool) or not isinstance(max_problems, int) or max_problems < 1:
            raise ValueError(f"max_problems: expected an int >= 1, got {max_problems!r}")
        self.lock = threading.Lock()
        self.trees: OrderedDict[str, tuple[int, Tree]] = OrderedDict()
        self._driver = driver
        self._max = max_problems
        self._ended = Usage()

    def open(self, text: str, tree: Tree) -> tuple[int, Tree]:
        """The number and the tree of a problem. A new problem begins with ``tree``."""
        if text not in self.trees:
            if not isinstance(text, str) or not text.strip():
                raise SearchError(f"expected a problem that is not empty, got {text!r:.200}")
            number = next(_NUMBERS)
            self._driver.begin(number, text)
            self.trees[text] = (number, tree)
        self.trees.move_to_end(text)
        return self.trees[text]

    def make_room(self, in_use: Iterable[str]) -> None:
        """End problems that are not in use, until there are not too many."""
        wanted = set(in_use)
        for text in [text for text in self.trees if text not in wanted]:
            if len(self.trees) <= self._max:
                return
            self.end(text)

    def end(self, text: str) -> None:
        number, _ = self.trees.pop(text)
        self._ended += self._driver.end(number)

    def close(self) -> Usage:
        for text in list(self.trees):
            self.end(text)
        ended, self._ended = self._ended, Usage()
        return ended


@dataclass(slots=True)
class _Sampled:
    """The branch of a text, and the number of its children so far.

    Callers name a branch by its text only. When a text is first seen, it gets a number for the policy, and the path
    that fixes its draws. (The policy itself looks for a branch by its number first, see `models.known`.)
    """

    branch: int
    path: tuple[int, ...]
    steps: tuple[str, ...]
    num_children: int = 0


@dataclass(slots=True)
class _SampleTree:
    seeds: Seeds
    texts: dict[str, _Sampled] = field(default_factory=lambda: {"": _Sampled(0, (), ())})
    num_branches: int = 1
    num_strange: int = 0

    def sampled(self, text: str) -> _Sampled:
        if text not in self.texts:  # an unknown or edited text: the policy continues the longest part it knows
            self.texts[text] = _Sampled(self.num_branches, (_STRANGE, self.num_strange), (text,))
            self.num_branches += 1
            self.num_strange += 1
        return self.texts[text]


class StepSampler:
    """Samples continuations of texts.

    If a text is one that this sampler returned earlier, appended to the text that it continued, the policy has its
    branch. A local policy then processes no token of it again. Any other text is read from the end of its longest known
    part. The k-th sample of a text has the same draws as the k-th child of this branch in a search with the same seed,
    even if other texts are sampled at the same time.

    Parameters
    ----------
    policy : Policy
        Generates steps. Searches may use it, too, but not at the same time.
    seed : int
        Fixes every draw.
    max_problems : int
        If this many problems are known, the least recently used one is forgotten. (The policy itself decides what KV it
        drops.)

    Raises
    ------
    ValueError
        If `max_problems` is no int of at least 1.
    """

    def __init__(self, policy: Policy, *, seed: int = 0, max_problems: int = 256) -> None:
        self.policy = policy
        self.seed = seed
        self._problems: _Problems[_SampleTree] = _Problems(policy, max_problems)

    def split(self, prompt: str) -> tuple[str, str]:
        """Split a whole prompt into problem and generated text. A new prompt is a problem and nothing else."""
        with self._problems.lock:
            known = [text for text in self._problems.trees if prompt.startswith(text)]
        problem = max(known, key=len, default=prompt)
        return problem, prompt[len(problem) :]

    def sample(self, continuations: Sequence[Continuation]) -> list[list[Step]]:
        """Sample for all continuations in one call of the policy.

        Returns
        -------
        list of list of Step
            ``num_samples`` steps for each continuation.

        Raises
        ------
        SearchError
            If the policy cannot serve one of them (its text is too long, say).
        """
        with self._problems.lock:
            requests: dict[tuple[str, str, StepParams], list[int]] = {}
            for index, asked in enumerate(continuations):
                if asked.num_samples < 1:
                    raise SearchError(f"num_samples: expected at least 1, got {asked.num_samples}")
                requests.setdefault((asked.problem, asked.text, asked.params), []).append(index)
            plans = [
                self._expand(problem, text, params, sum(continuations[index].num_samples for index in indices))
                for (problem, text, params), indices in requests.items()
            ]
            answers = self.policy.expand([expand for expand, _ in plans]) if plans else []
            results: list[list[Step]] = [[] for _ in continuations]
            for ((problem, text, _), indices), (expand, paths), steps in zip(
                requests.items(), plans, answers, strict=True
            ):
                if isinstance(steps, Exception):
                    raise SearchError(f"{type(steps).__name__}: {steps}") from steps
                if len(steps) != len(expand.children):
                    raise SearchError(f"policy: expected {len(expand.children)} samples, got {len(steps)}")
                self._remember(problem, text, expand, steps, paths)
                rest = iter(steps)
                for index in indices:
                    results[index] = [next(rest) for _ in range(continuations[index].num_samples)]
            self._problems.make_room(asked.problem for asked in continuations)
            return results

    def close(self) -> Usage:
        """Forget all problems, and return the cost since the last call."""
        with self._problems.lock:
            return self._problems.close()

    def _expand(self, problem: str, text: str, params: StepParams, count: int) -> tuple[Expand, Paths]:
        """The request to the policy, and the paths of the children."""
        number, tree = self._problems.open(problem, _SampleTree(Seeds(self.seed, problem)))
        parent = tree.sampled(text)
        if params.temperature == 0:  # without draws, the next samples of the branch are not affected
            paths = [(*parent.path, _GREEDY)] * count
        else:
            paths = [(*parent.path, parent.num_children + offset) for offset in range(count)]
            parent.num_children += count
        children = tuple(range(tree.num_branches, tree.num_branches + count))
        tree.num_branches += count
        seeds = tuple(tree.seeds.of(path) for path in paths)
        return Expand(number, parent.branch, children, parent.steps, seeds, params), paths

    def _remember(self, problem: str, text: str, expand: Expand, steps: Sequence[Step], paths: Paths) -> None:
        """Record the text of each new branch. Among equal texts the first branch is kept."""
        number, tree = self._problems.trees[problem]
        parent = tree.texts[text]
        again: list[int] = []
        for child, path, step in zip(expand.children, paths, steps, strict=True):
            if step.finished or not step.text:
                continue
            if text + step.text in tree.texts:
                again.append(child)
            else:
                tree.texts[text + step.text] = _Sampled(child, path, (*parent.steps, step.text))
        if again:
            self.policy.release(number, again)


@dataclass(slots=True)
class _ScoreTree:
    """The branches that were scored, by their steps."""

    branches: dict[tuple[str, ...], int] = field(default_factory=lambda: {(): 0})
    scores: dict[tuple[str, ...], list[float]] = field(default_factory=lambda: {(): []})
    num_branches: int = 1

    def parent(self, steps: tuple[str, ...]) -> int:
        return next(self.branches[steps[:end]] for end in range(len(steps) - 1, -1, -1) if steps[:end] in self.branches)


class StepScorer:
    """Scores the steps of texts.

    Steps are compared without surrounding white space. Steps with known scores are not read again: a text costs only
    the steps after its longest prefix that was scored before.

    Parameters
    ----------
    verifier : Verifier
        Scores steps. Searches may use it, too, but not at the same time.
    delimiter : str
        The text between steps.
    max_problems : int
        As in :class:`StepSampler`.

    Raises
    ------
    ValueError
        If the delimiter is empty, or `max_problems` no int of at least 1.
    """

    def __init__(self, verifier: Verifier, *, delimiter: str = "\n\n", max_problems: int = 256) -> None:
        if not isinstance(delimiter, str) or not delimiter:
            raise ValueError(f"delimiter: expected a text that is not empty, got {delimiter!r}")
        self.verifier = verifier
        self.delimiter = delimiter
        self._problems: _Problems[_ScoreTree] = _Problems(verifier, max_problems)

    def score(self, items: Sequence[tuple[str, str | Sequence[str]]]) -> list[list[float]]:
        """Score the steps of each (problem, text) or (problem, steps), all in one call of the verifier.

        Returns
        -------
        list of list of float
            For a text, one score for each of its steps, without blank ones. For steps, one for each: a blank step has
            the score of the step before it; if it is the first, 0.0.

        Raises
        ------
        SearchError
            If the verifier cannot serve one of them, or returns too few scores or one that is not finite.
        """
        with self._problems.lock:
            cut = [(problem, self._cut(text)) for problem, text in items]
            requests: dict[tuple[str, tuple[str, ...]], Score] = {}
            for problem, pieces in cut:
                steps = tuple(piece for piece in pieces if piece)
                number, tree = self._problems.open(problem, _ScoreTree())
                if steps not in tree.scores and (problem, steps) not in requests:
                    requests[problem, steps] = Score(number, tree.num_branches, steps, tree.parent(steps))
                    tree.num_branches += 1
            self._serve(requests)
            results = [_spread(pieces, self._problems.trees[problem][1].scores) for problem, pieces in cut]
            self._problems.make_room(problem for problem, _ in cut)
            return results

    def close(self) -> Usage:
        """Forget all problems, and return the cost since the last call."""
        with self._problems.lock:
            return self._problems.close()

    def _cut(self, text: str | Sequence[str]) -> tuple[str, ...]:
        pieces = split_steps(text, self.delimiter)[0] if isinstance(text, str) else text
        return tuple(piece.strip() for piece in pieces)

    def _serve(self, requests: dict[tuple[str, tuple[str, ...]], Score]) -> None:
        answers = self.verifier.score(list(requests.values())) if requests else []
        for ((problem, steps), request), scores in zip(requests.items(), answers, strict=True):
            if isinstance(scores, Exception):
                raise SearchError(f"{type(scores).__name__}: {scores}") from scores
            if len(scores) != len(steps) or not all(math.isfinite(score) for score in scores):
                raise SearchError(
                    f"verifier: expected {len(steps)} finite scores, one per step, got {list(scores)!r:.200}"
                )
            tree = self._problems.trees[problem][1]
            tree.branches[steps] = request.branch
            tree.scores[steps] = [float(score) for score in scores]


def _spread(pieces: tuple[str, ...], known: dict[tuple[str, ...], list[float]]) -> list[float]:
    """The scores of all steps, including blank ones."""
    scores = iter(known[tuple(piece for piece in pieces if piece)])
    spread: list[float] = []
    for piece in pieces:
        spread.append(next(scores) if piece else (spread[-1] if spread else 0.0))
    return spread
