"""DeepConf's rules, against their definitions written out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tts_search.deepconf.confidence import (
    MEASURES,
    Stopping,
    confidence_vote,
    token_confidence,
    trace_confidence,
    windows,
)

traces = st.lists(st.floats(0, 20), min_size=1, max_size=40)


@given(st.lists(st.tuples(st.integers(0, 9), st.floats(-20, 0)), min_size=1, max_size=20))
def test_a_token(top):
    assert token_confidence(top) == pytest.approx(-np.mean([logprob for _, logprob in top]), abs=1e-12)


@given(traces, st.integers(1, 50))
def test_measures(trace, window):
    sliding = [np.mean(trace[i : i + window]) for i in range(len(trace) - window + 1)] or [np.mean(trace)]
    assert windows(trace, window) == pytest.approx(sliding, abs=1e-9)
    tenth = max(1, int(len(sliding) * 0.1))
    expected = (np.mean(trace), np.mean(trace[-window:]), np.mean(sorted(sliding)[:tenth]), min(sliding))
    for how, value in zip(MEASURES, expected, strict=True):
        assert trace_confidence(trace, how, window) == pytest.approx(value, abs=1e-9)


@given(st.lists(traces, min_size=1, max_size=16), st.sampled_from([0.1, 0.5, 0.9, 1.0]))
def test_the_threshold_is_a_percentile(warm_up, keep):
    stopping = Stopping(warm_up, keep, window=4)
    least = [min(windows(trace, 4)) for trace in warm_up]
    assert stopping.threshold == pytest.approx(np.percentile(least, 100 * (1 - keep)), abs=1e-9)


def test_a_trace_is_stopped_where_it_is_less_sure():
    stopping = Stopping([[2.0] * 5, [4.0] * 5], keep=1.0, window=3)
    assert stopping.threshold == 2.0
    trace = [0.0, 0.0, 6.0, 0.0, 0.0, 5.0, 0.0]
    assert [stopping.stops(trace[:count]) for count in range(8)] == [False] * 6 + [True, True]


def test_votes():
    answers, confidences = ["1", "2", "2", "", "3"], [5.0, 3.0, 3.0, 99.0, 4.0]
    assert confidence_vote(answers, confidences) == "2"
    assert confidence_vote(answers, confidences, keep=0.5) == "1", "of the two surest, 1 and 3"
    assert confidence_vote(answers, confidences, keep=0.1) == "1", "at least one"
    assert (
        confidence_vote(["0.50", "1/2", "3"], [1.0, 1.0, 1.5], equal=lambda a, b: {a, b} == {"0.50", "1/2"}) == "0.50"
    )
    assert confidence_vote(["", ""], [1.0, 2.0]) == ""


@pytest.mark.parametrize("keep", [0, 1.5])
def test_shares(keep):
    with pytest.raises(ValueError, match="keep: expected a share"):
        confidence_vote(["1"], [1.0], keep)
    with pytest.raises(ValueError, match="keep: expected traces and a share"):
        Stopping([[1.0]], keep)
    with pytest.raises(ValueError, match="how, window"):
        trace_confidence([1.0], "max")
