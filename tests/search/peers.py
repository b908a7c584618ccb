"""The loops and votes of other frameworks, written again in plain Python from descriptions of their behaviour.

From our code they use only the step that a policy returns, and the seed of its draws, which gives a random tree's step.
Splitting a text into steps, aggregates and every decision are written independently. If a peer leaves an order open (an
unstable sort, a heap's equal entries), the earlier candidate wins; docs/semantics.md lists such places. A search
returns its entries, (text, step scores) in the peer's order, and the index of the one that the peer selects.
"""

from __future__ import annotations

import math
import random
import re
from copy import deepcopy
from dataclasses import dataclass, field
from fractions import Fraction

from scripted import RandomTree
from tts_search import Step, StepParams
from tts_search.search.seeds import seed_of

DELIMITER = "\n\n"

Entries = list[tuple[str, list[float]]]


def aggregate(scores: list[float], how: str) -> float:
    """One score of many; a text without any step loses against every other."""
    if not scores:
        return -math.inf
    return {"last": scores[-1], "min": min(scores), "prod": math.prod(scores)}[how]


def pieces_of(text: str, *, cut: bool) -> tuple[list[str], str]:
    """The steps of a text, and the white space at its end that belongs to none; uncut, all of it is one step."""
    steps, at = [], 0
    while cut and (end := text.find(DELIMITER, at)) >= 0:
        end += len(DELIMITER)
        if text[:end].strip():
            steps.append(text[:end])
            text, at = text[end:], 0
        else:
            at = end  # blank so far: it begins the next step
    return ([*steps, text], "") if text.strip() else (steps, text)


def selected(entries: Entries, how: str) -> tuple[Entries, int]:
    scores = [aggregate(scores, how) for _, scores in entries]
    return entries, scores.index(max(scores))


@dataclass
class World:
    """A problem, a policy and a verifier."""

    tree: RandomTree
    problem: str
    seed: int

    def sample(
        self, texts: list[str], path: tuple[int, ...], *, delimiter: str | None = DELIMITER, t: float = 1.0
    ) -> Step:
        params = StepParams(temperature=t, delimiter=delimiter)
        return self.tree.step(self.problem, tuple(texts), 0, seed_of(self.seed, self.problem, path), params)

    def score(self, texts: list[str], *, last: bool = False) -> list[float]:
        steps: list[str] = []
        blank = ""  # white space that no step follows yet
        for index, text in enumerate(texts):
            uncut = last and index == len(texts) - 1
            new, blank = pieces_of(blank + text, cut=uncut)
            steps += new
        return self.tree.scores(self.problem, tuple(steps))


@dataclass
class Beam:
    texts: list[str] = field(default_factory=list)
    path: tuple[int, ...] = ()
    pruned: bool = False
    completed: bool = False
    scores: list[float] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.texts)


def pad(items: list, n: int) -> list:
    return (items * (n // len(items) + 1))[:n]


def search_and_learn_beam(world, *, n, beam_width, num_iterations, agg_strategy, filter_duplicates, sort_completed):
    active = [Beam() for _ in range(n)]
    completed: list[Beam] = []
    for i in range(num_iterations):
        if i > 0:
            active = [beam for beam in active if not beam.pruned]
        active = [deepcopy(beam) for beam in pad(active, n)] if len(active) != n else active
        last = i == num_iterations - 1
        copies: dict[tuple[int, ...], int] = {}
        for beam in active:
            number = copies[beam.path] = copies.get(beam.path, -1) + 1
            step = world.sample(beam.texts, (*beam.path, number), delimiter=None if last else DELIMITER)
            beam.next_path = (*beam.path, number)  # type: ignore[attr-defined]
            if step.text:
                beam.texts = [*beam.texts, step.text]
            if step.finished or step.reason == "length" or step.text == "" or last:
                beam.completed = True
                completed.append(beam)
        for beam in active:
            beam.path = beam.next_path  # type: ignore[attr-defined]
            beam.scores = world.score(beam.texts, last=last)
        active = [beam for beam in active if not beam.completed]
        if not active:
            break
        if filter_duplicates:
            first = {beam.text: beam for beam in reversed(active)}
            active = [beam for beam in active if first[beam.text] is beam]
        k = n // beam_width
        aggregated = [aggregate(beam.scores, agg_strategy) for beam in active]
        order = sorted(range(len(active)), key=lambda j: (-aggregated[j], j))
        top = set(order[:k] if k else order)
        for j, beam in enumerate(active):
            beam.pruned = j not in top
    if sort_completed:
        completed = sorted(completed, key=lambda beam: aggregate(beam.scores, agg_strategy), reverse=True)
    completed = completed[:n]
    completed = pad(completed, n) if len(completed) != n else completed
    return selected([(beam.text, beam.scores) for beam in completed], agg_strategy)


def search_and_learn_dvts(world, *, n, beam_width, num_iterations, lookahead, agg_strategy):
    beams = [Beam() for _ in range(n // beam_width)]
    first = {id(beam): index * beam_width for index, beam in enumerate(beams)}  # all subtrees grow from one root
    report: dict[int, Entries] = {}
    for i in range(num_iterations):
        live = [beam for beam in beams if not beam.pruned]
        if not live:
            break
        last = i == num_iterations - 1
        for beam in live:
            candidates = []
            for j in range(beam_width):
                number = j + (first[id(beam)] if i == 0 else 0)
                step = world.sample(beam.texts, (*beam.path, number), delimiter=None if last else DELIMITER)
                texts = [*beam.texts, step.text] if step.text else list(beam.texts)
                stops = step.finished or step.reason == "length" or not step.text or last
                ahead, stopped = list(texts), stops
                for _ in range(0 if last else lookahead):
                    if stopped:
                        break
                    greedy = world.sample(ahead, (), t=0.0)
                    ahead += [greedy.text] if greedy.text else []
                    stopped = greedy.finished or greedy.reason == "length" or not greedy.text
                scores = world.score(ahead, last=last and bool(step.text))
                candidates.append((scores, texts, (*beam.path, number), stops))
            report[id(beam)], best = selected(
                [("".join(texts), scores) for scores, texts, *_ in candidates], agg_strategy
            )
            _, beam.texts, beam.path, stops = candidates[best]
            beam.pruned = stops or "boxed{" in beam.text
    return selected([entry for beam in beams for entry in report[id(beam)]], agg_strategy)


@dataclass
class Node:
    texts: list[str]
    path: tuple[int, ...]
    scores: list[float]
    terminated: bool = False
    depth: int = 0
    children: list[Node] = field(default_factory=list)

    @property
    def value(self) -> float:
        return aggregate(self.scores, "last")


def compute_optimal_beam(world, *, width, beam_size, max_depth, first_number=0):
    def grow(node: Node, count: int, number: int) -> None:
        sampled = [(world.sample(node.texts, (*node.path, number + j)), number + j) for j in range(count)]
        legal: list[tuple[Step, int]] = []
        for step, j in sampled:
            if step.text and step.reason != "length" and step.text not in [other.text for other, _ in legal]:
                legal.append((step, j))
        for step, j in legal or sampled:
            texts = [*node.texts, step.text] if step.text else node.texts
            child = Node(texts, (*node.path, j), world.score(texts))
            child.terminated = not step.text.endswith(DELIMITER) or "\\boxed" in step.text
            child.depth = node.depth + 1
            node.children.append(child)

    root = Node([], (), [])
    grow(root, width, first_number)
    end: list[Node] = []
    frontier = [root]
    for _ in range(max_depth + 1):
        k = 0
        heap: list[tuple[float, int, Node]] = []
        for node in frontier:
            if node.terminated:
                end.append(node)
                if len(end) == beam_size:
                    break
            elif len(end) < beam_size:
                k = beam_size - len(end)
                top = sorted(node.children, key=lambda child: child.value, reverse=True)[:k]
                heap += [(-child.value, len(heap) + j, child) for j, child in enumerate(_in_order(top, node.children))]
        if len(end) == beam_size:
            break
        frontier = [child for *_, child in sorted(heap, key=lambda entry: entry[:2])[:k]]
        for node in frontier:
            node.terminated = node.terminated or node.depth >= max_depth
            if not node.terminated:
                grow(node, width // beam_size, 0)
    return [("".join(node.texts), node.scores) for node in end]


def _in_order(chosen: list[Node], siblings: list[Node]) -> list[Node]:
    return [child for child in siblings if any(child is other for other in chosen)]


def compute_optimal(world, *, tree_max_width, num_sequence, num_q, tree_max_depth):
    """num_q searches of one problem; in ours their first steps are one root's children."""
    ends = []
    for q in range(num_q):
        ends += compute_optimal_beam(
            world,
            width=tree_max_width,
            beam_size=num_sequence,
            max_depth=tree_max_depth,
            first_number=q * tree_max_width,
        )
    return selected(ends, "last")


@dataclass
class Path:
    texts: list[str]
    path: tuple[int, ...]
    stopped: bool = False
    depth: int = 0
    scores: list[float] = field(default_factory=list)

    @property
    def score(self) -> float:
        return aggregate(self.scores, "last")


def its_hub_beam(world, *, budget, beam_width, max_steps, stop_token):
    num_beams = budget // beam_width
    candidates = [Path([], ()) for _ in range(num_beams)]
    while not all(path.stopped for path in candidates):
        copies: dict[tuple[int, ...], int] = {}
        for path in candidates:
            if path.stopped:
                continue
            number = copies[path.path] = copies.get(path.path, -1) + 1
            step = world.sample(path.texts, (*path.path, number))
            at_limit = path.depth >= max_steps
            path.next_path = (*path.path, number)  # type: ignore[attr-defined]
            path.texts = [*path.texts, step.text] if step.text else path.texts
            path.depth += 1
            path.stopped = at_limit or step.finished or (stop_token is not None and stop_token in step.text)
            path.scores = world.score(path.texts)
        for path in candidates:
            path.path = getattr(path, "next_path", path.path)
        candidates.sort(key=lambda path: path.score, reverse=True)
        kept = candidates[:beam_width]
        candidates = [deepcopy(path) for _ in range(num_beams) for path in kept]
    return selected([("".join(path.texts), path.scores) for path in candidates], "last")


def its_hub_particles(world, *, budget, max_steps, stop_token):
    def log_odds(path: Path) -> float:
        p = min(max(0.0 if path.score == -math.inf else path.score, 1e-7), 1 - 1e-7)
        return math.log(p / (1 - p))

    particles = [Path([], ()) for _ in range(budget)]
    current_step = 0
    while not all(path.stopped for path in particles):
        copies: dict[tuple[int, ...], int] = {}
        for path in particles:
            if path.stopped:
                continue
            number = copies[path.path] = copies.get(path.path, -1) + 1
            step = world.sample(path.texts, (*path.path, number))
            at_limit = path.depth >= max_steps
            path.next_path = (*path.path, number)  # type: ignore[attr-defined]
            path.texts = [*path.texts, step.text] if step.text else path.texts
            path.depth += 1
            path.stopped = at_limit or step.finished or (stop_token is not None and stop_token in step.text)
            path.scores = world.score(path.texts)
        for path in particles:
            path.path = getattr(path, "next_path", path.path)
        current_step += 1
        top = max(map(log_odds, particles))
        weights = [math.exp(log_odds(path) - top) for path in particles]
        draws = random.Random(seed_of(world.seed, world.problem, (-2, current_step)))
        particles = [deepcopy(path) for path in draws.choices(particles, weights, k=budget)]
    return selected([("".join(path.texts), path.scores) for path in particles], "last")


def best_of_n(world, *, n, how="last"):
    """All three: n samples to the end, the first maximum."""
    samples = [world.sample([], (j,), delimiter=None).text for j in range(n)]
    return selected([(text, world.score([text], last=True) if text else []) for text in samples], how)


def answer_of(text: str) -> str:
    boxes = re.findall(r"boxed\{([^}]*)\}", text)
    return boxes[-1] if boxes else ""


def search_and_learn_votes(entries: Entries) -> dict[str, str]:
    """Its `score` after a search: by the last score, whatever the search aggregated by; classes of equal answers."""
    voters = [(answer_of(text), aggregate(scores, "last")) for text, scores in entries if answer_of(text)]
    if not voters:
        return dict.fromkeys(("majority", "prm_vote", "prm_last_max"), "")
    spelling: dict[Fraction, str] = {}
    for answer, _ in voters:
        spelling.setdefault(Fraction(answer), answer)
    counts: dict[str, int] = {}
    sums: dict[str, float] = {}
    for answer, weight in voters:
        first = spelling[Fraction(answer)]
        counts[first] = counts.get(first, 0) + 1
        sums[first] = sums.get(first, 0.0) + weight
    ranked = sorted(voters, key=lambda voter: voter[1], reverse=True)
    return {"majority": max(counts, key=counts.get), "prm_vote": max(sums, key=sums.get), "prm_last_max": ranked[0][0]}


def compute_optimal_votes(entries: Entries) -> dict[str, str]:
    """Its seven rules; answers are the same only if their texts are."""
    reduce = {"min": min, "last": lambda v: v[-1], "avg": lambda v: sum(v) / len(v)}
    voters = [(answer_of(text), scores) for text, scores in entries if answer_of(text)]
    names = ["majority", *(f"prm_{how}_{rule}" for how in reduce for rule in ("max", "vote"))]
    if not voters:
        return dict.fromkeys(names, "")
    answers = {"majority": max(dict.fromkeys(a for a, _ in voters), key=[a for a, _ in voters].count)}
    for how, function in reduce.items():
        values = [function(scores) if scores else -1.0 for _, scores in voters]
        answers[f"prm_{how}_max"] = voters[values.index(max(values))][0]
        sums: dict[str, float] = {}
        for (answer, _), value in zip(voters, values, strict=True):
            sums[answer] = sums.get(answer, 0.0) + value
        answers[f"prm_{how}_vote"] = max(sums, key=sums.get)
    return answers
