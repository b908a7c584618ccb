"""Random solutions, cut into steps in every way, and random searches over them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

from tts_search import HFVerifier
from tts_search.search.protocol import Score

WORDS = (
    "the", "a", "Step", "then", "so", "12", "7", "x", "(x+1)", "=", "$\\frac{1}{2}$", "we", "get", "no", "Yes",
    "caf\u00e9", "\u03c0", "+", "-", "is", "\\boxed{3}", "3.5", "n\u00b2", "on", "thesis", "1,000", "'s", "::", "#",
)  # fmt: skip


def random_text(rng: random.Random, words: int) -> str:
    """Words, numbers and signs; a line break here and there."""
    return rng.choice(WORDS) + "".join(
        rng.choice((" ", " ", " ", " ", "", "\n", ", ", ". ")) + rng.choice(WORDS) for _ in range(words - 1)
    )


def random_step(rng: random.Random) -> str:
    """A step as a policy generates it: its delimiter at the end, white space in front now and then."""
    end = rng.choice(("\n\n", ".\n\n", ".\n\n\n", ":\n\n", "", ".", " \n\n"))
    return rng.choice(("", "", "", "\n", " ")) + random_text(rng, rng.randint(1, 7)) + end


def random_trees(
    verifier: HFVerifier, rng: random.Random, solutions: int, problems: int = 4, rounds: int = 5
) -> Iterator[tuple[str, tuple[str, ...], list[float]]]:
    """Search random trees until so many solutions were scored: (problem, steps, scores) of each.

    A round scores candidates of several problems in one call. They build on any branch that was scored before, by one
    step or more; some branches are released, and some candidates look ahead.
    """
    counter = itertools.count()
    for start in itertools.count(0, problems):
        texts = {number: random_text(rng, 6) + "?" for number in range(start, start + problems)}
        nodes: dict[int, dict[int, tuple[str, ...]]] = {number: {0: ()} for number in texts}
        branch = itertools.count(1)
        for number, text in texts.items():
            verifier.begin(number, text)
        for _ in range(rounds):
            requests = []
            for number in rng.choices(sorted(texts), k=rng.randint(2, 6)):
                parent = rng.choice(sorted(nodes[number]))
                steps = (*nodes[number][parent], *(random_step(rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))))
                ahead = tuple(random_step(rng) for _ in range(rng.choice((0, 0, 0, 1, 2))))
                requests.append(Score(number, next(branch), steps, parent, ahead))
            for request, scores in zip(requests, verifier.score(requests), strict=True):
                assert not isinstance(scores, Exception), scores
                yield texts[request.problem], (*request.steps, *request.lookahead), scores
                nodes[request.problem][request.branch] = request.steps
                if next(counter) == solutions - 1:
                    return
            for number in texts:
                gone = rng.sample(sorted(nodes[number])[1:], k=len(nodes[number]) // 3)
                verifier.release(number, gone)
                for each in gone:
                    del nodes[number][each]
        for number in texts:
            verifier.end(number)


def flattened(parts: Sequence[Sequence[float]]) -> list[float]:
    """All numbers in a row."""
    return [value for part in parts for value in part]
