"""Several verifiers as one: each is normalised by its past scores, then their weighted mean is taken."""

from __future__ import annotations

import bisect
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tts_search.search.protocol import Score, Usage, Verifier, usage_of

__all__ = ["MixedVerifier", "Mixture", "Normalization"]

_LOG_ODDS = 4.0  # the largest: agreement of 98% may be luck


@dataclass(frozen=True)
class Normalization:
    """Maps a verifier's scores to values between 0 and 1, by the scores that it gave in the past.

    A score becomes the share of past scores below it; past scores that are equal count half. This works for any scale:
    even if a verifier often says 0.99, half of its scores lie above 0.5. Between past scores the map is linear.

    Attributes
    ----------
    points : tuple of (float, float)
        Past scores in ascending order, and the value of each. Without any, scores stay unchanged.
    """

    points: tuple[tuple[float, float], ...] = ()

    @classmethod
    def fitted(cls, scores: Sequence[float]) -> Normalization:
        """Return the normalisation by past scores. Scores that are not finite are left out. O(n log n)."""
        counts = sorted(Counter(score for score in scores if math.isfinite(score)).items())
        total, below, points = sum(count for _, count in counts), 0, []
        for score, count in counts:
            points.append((score, (below + count / 2) / total))
            below += count
        return cls(tuple(points))

    def __call__(self, score: float) -> float:
        """Return the normalised value of a score; NaN if the score is NaN."""
        if not self.points or math.isnan(score):
            return score
        place = bisect.bisect_left(self.points, (score, -math.inf))
        if place == len(self.points):
            return self.points[-1][1]
        right, high = self.points[place]
        if right == score or place == 0:
            return high
        left, low = self.points[place - 1]
        return low + (high - low) * (score - left) / (right - left)


@dataclass(frozen=True)
class Mixture:
    """The normalisation and the weight that a :class:`MixedVerifier` has for each of its verifiers.

    They are fitted to past data, never to the current problem. No labels are needed.
    """

    normalizations: tuple[Normalization, ...]
    weights: tuple[float, ...]

    @classmethod
    def fitted(
        cls,
        past: Sequence[Sequence[tuple[str, Sequence[float]]]],
        weights: Sequence[float] | Literal["agreement"] | None = None,
    ) -> Mixture:
        """Fit to past searches.

        Parameters
        ----------
        past : sequence of sequences of (str, sequence of float)
            For each problem its completions: the answer, and the final score of each verifier.
        weights : sequence of float, ``"agreement"`` or None
            By default equal weights. ``"agreement"``: the log-odds of the rate at which a verifier agrees with the
            majority vote. It agrees on a completion if its normalised score is above 0.5 and the completion has the
            majority answer, or if both are not so. A verifier that agrees no more often than by chance gets 0.

        Raises
        ------
        ValueError
            If there is no completion, or the numbers of scores or weights differ.

        Notes
        -----
        The agreement of a verifier is the mean of two rates: on completions with the majority answer, and on the
        others. So a verifier that always says yes has a rate of one half, however large majorities are.
        """
        rows = [scores for problem in past for _, scores in problem]
        counts = {len(scores) for scores in rows}
        if len(counts) != 1 or counts == {0}:
            raise ValueError(f"past: expected completions with the same number of scores, got {sorted(counts)}")
        normalizations = tuple(map(Normalization.fitted, zip(*rows, strict=True)))
        if weights == "agreement":
            return cls(normalizations, _agreement(past, normalizations))
        own = (1.0,) * len(normalizations) if weights is None else tuple(map(float, weights))
        return cls(normalizations, _checked(own, len(normalizations)))

    def mean(self, scores: Sequence[float | None]) -> float:
        """Return the weighted mean of normalised scores. None is left out; NaN if nothing is left."""
        kept = [
            (weight, normalize(score))
            for weight, normalize, score in zip(self.weights, self.normalizations, scores, strict=True)
            if score is not None
        ]
        total = sum(weight for weight, _ in kept)
        if not total:  # no verifier with a weight is left: the mean of the others
            kept, total = [(1.0, score) for _, score in kept], float(len(kept))
        return math.fsum(weight * score for weight, score in kept) / total if kept else math.nan

    def save(self, path: str | Path) -> None:
        """Write the mixture to a JSON file."""
        data = {"weights": self.weights, "points": [each.points for each in self.normalizations]}
        Path(path).write_text(json.dumps(data), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Mixture:
        """Read a file that :meth:`save` wrote.

        Raises
        ------
        ValueError
            If the file is not such a file.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            points = [tuple((float(score), float(place)) for score, place in each) for each in data["points"]]
            return cls(tuple(map(Normalization, points)), _checked(tuple(map(float, data["weights"])), len(points)))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: expected a file of Mixture.save: {error}") from None


def _checked(weights: tuple[float, ...], count: int) -> tuple[float, ...]:
    if len(weights) != count or not all(math.isfinite(one) and one >= 0 for one in weights) or not any(weights):
        raise ValueError(f"weights: expected {count} numbers >= 0, not all 0, got {list(weights)}")
    return weights


def _agreement(
    past: Sequence[Sequence[tuple[str, Sequence[float]]]], normalizations: Sequence[Normalization]
) -> tuple[float, ...]:
    agreed = {True: [0.0] * len(normalizations), False: [0.0] * len(normalizations)}
    seen = {True: 0, False: 0}
    for problem in past:
        answers = Counter(answer for answer, _ in problem if answer)
        if not answers:
            continue
        majority = answers.most_common(1)[0][0]
        for answer, scores in problem:
            elected = answer == majority
            seen[elected] += 1
            for number, (normalize, score) in enumerate(zip(normalizations, scores, strict=True)):
                place = normalize(score)
                agreed[elected][number] += 0.5 if place == 0.5 else float((place > 0.5) == elected)
    weights = []
    for number in range(len(normalizations)):
        rates = [(agreed[which][number] + 1) / (seen[which] + 2) for which in (True, False)]
        rate = sum(rates) / 2
        weights.append(min(_LOG_ODDS, max(0.0, math.log(rate / (1 - rate)))))
    return tuple(weights) if any(weights) else (1.0,) * len(normalizations)


class MixedVerifier:
    """A verifier that asks several others, and gives each step the weighted mean of their normalised scores.

    Parameters
    ----------
    verifiers : sequence of Verifier
        Process verifiers, execution, judges, functions of text, in any mixture.
    weights : sequence of float, ``"agreement"`` or None
        By default equal weights. ``"agreement"`` needs a `mixture` that was fitted with it.
    mixture : Mixture or None
        Normalisations (and weights, unless `weights` are given) fitted to past scores. Without it scores are used
        unchanged, which is right if all of them are probabilities.

    Attributes
    ----------
    left_out : list of str
        One reason each time a verifier was left out of a candidate's mean. If all verifiers fail for a candidate, it
        has no scores, and its error is that of the first verifier.

    Raises
    ------
    ValueError
        If there is no verifier, or the numbers of verifiers and weights differ.

    Notes
    -----
    The cost is the sum over the verifiers. Instead of BoN-MAV's sum of approvals (arXiv 2502.20379) there is a weighted
    mean, as in Weaver (arXiv 2506.18203), but with weights that need no training.

    Examples
    --------
    >>> from tts_search import TextVerifier
    >>> a, b = (TextVerifier(lambda branches, x=x: [[x] * len(s) for _, s in branches]) for x in (0.2, 0.8))
    >>> round(MixedVerifier([a, b], weights=[1, 3]).mixture.mean([0.2, 0.8]), 6)
    0.65
    """

    def __init__(
        self,
        verifiers: Sequence[Verifier],
        weights: Sequence[float] | Literal["agreement"] | None = None,
        *,
        mixture: Mixture | None = None,
    ) -> None:
        if not verifiers:
            raise ValueError("verifiers: expected at least one, got none")
        if weights == "agreement" and mixture is None:
            raise ValueError("weights: 'agreement' needs mixture=Mixture.fitted(past, 'agreement')")
        count = len(verifiers)
        known = mixture or Mixture((Normalization(),) * count, (1.0,) * count)
        if len(known.normalizations) != count:
            raise ValueError(f"mixture: expected one of {count} verifiers, got one of {len(known.normalizations)}")
        if weights is not None and weights != "agreement":
            known = Mixture(known.normalizations, _checked(tuple(map(float, weights)), count))
        self.verifiers = tuple(verifiers)
        self.mixture = known
        self.left_out: list[str] = []

    def begin(self, problem: int, text: str) -> None:
        """Announce a problem."""
        begun: list[Verifier] = []
        try:
            for verifier in self.verifiers:
                verifier.begin(problem, text)
                begun.append(verifier)
        except BaseException:
            for verifier in begun:
                verifier.end(problem)
            raise

    def score(self, requests: Sequence[Score]) -> list[list[float] | Exception]:
        """Answer requests of any number of problems; each verifier is asked once for all of them."""
        answers = [_asked(verifier, requests) for verifier in self.verifiers]
        return [self._mixed(own, request) for own, request in zip(zip(*answers, strict=True), requests, strict=True)]

    def release(self, problem: int, branches: Sequence[int]) -> None:
        """Forget these branches."""
        for verifier in self.verifiers:
            verifier.release(problem, branches)

    def usage(self, problem: int) -> Usage:
        """Return the cost of the problem so far, for all verifiers."""
        return sum((usage_of(verifier, problem) for verifier in self.verifiers), Usage())

    def end(self, problem: int) -> Usage:
        """Forget the problem, and return the cost of all verifiers."""
        return sum((verifier.end(problem) for verifier in self.verifiers), Usage())

    def _mixed(self, answers: Sequence[Any], request: Score) -> list[float] | Exception:
        count = len(request.steps) + len(request.lookahead)
        checked = [_checked_scores(answer, count) for answer in answers]
        failed = {number: answer for number, answer in enumerate(checked) if isinstance(answer, Exception)}
        if len(failed) == len(answers):
            return failed[0]
        self.left_out += [
            f"problem {request.problem}, branch {request.branch}, verifier {number}: {type(error).__name__}: {error}"
            for number, error in failed.items()
        ]
        return [
            self.mixture.mean([None if isinstance(scores, Exception) else scores[step] for scores in checked])
            for step in range(count)
        ]


def _asked(verifier: Verifier, requests: Sequence[Score]) -> Sequence[Any]:
    try:
        answers = verifier.score(requests)
        if len(answers) != len(requests):
            raise ValueError(f"expected {len(requests)} answers, got {len(answers)}")
    except Exception as error:
        return [error] * len(requests)
    return answers


def _checked_scores(answer: Any, count: int) -> list[float] | Exception:
    if isinstance(answer, Exception):
        return answer
    scores = [float(score) for score in answer]
    if len(scores) != count or any(map(math.isnan, scores)):
        return ValueError(f"expected {count} scores, one for each step, got {scores}")
    return scores
