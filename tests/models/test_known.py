"""KnownBranches: the text decides, and the number only among equal texts; the root is always there."""

from __future__ import annotations

from tts_search.models.known import KnownBranches
from tts_search.policies.prompt import at_a_word


def known_texts(*texts: str) -> KnownBranches[str, str]:
    known = KnownBranches("", "held of the problem", at_a_word)
    for number, text in enumerate(texts, 1):
        assert known.put(number, text, f"held of {number}") is None
    return known


def test_the_text_decides() -> None:
    known = known_texts("one ", "one two ", "other ")
    assert known.longest(3, "one two three") == ("one two ", "held of 2")
    assert known.longest(99, "one ") == ("one ", "held of 1")
    assert known.longest(1, "unknown") == ("", "held of the problem")


def test_the_number_decides_among_equals() -> None:
    known = known_texts("one ", "one ", "one ")
    assert [known.longest(number, "one ")[1] for number in (1, 2, 3)] == [f"held of {number}" for number in (1, 2, 3)]


def test_no_word_is_cut() -> None:
    known = known_texts("one", "one tw")
    assert known.longest(0, "one two") == ("one", "held of 1")
    assert known.longest(0, "ones") == ("", "held of the problem")


def test_steps_are_compared_one_by_one() -> None:
    known = KnownBranches((), 0, lambda start, steps: steps[: len(start)] == start)
    known.put(1, ("a",), 1)
    known.put(2, ("a", "b"), 2)
    assert known.longest(7, ("a", "b", "c")) == (("a", "b"), 2)
    assert known.longest(7, ("ab",)) == ((), 0)


def test_what_was_known_before_is_handed_back() -> None:
    known = known_texts("one ", "two ")
    assert known.put(1, "three ", "new") == "held of 1"
    assert known.longest(1, "one ") == ("", "held of the problem")
    assert known.drop([1, 2, 2, 5]) == ["new", "held of 2"]
    assert known.longest(2, "two ") == ("", "held of the problem")


def test_the_root_can_be_released_and_is_still_there() -> None:
    known = known_texts("one ")
    assert known.drop([0]) == ["held of the problem"]
    assert known.drop([0]) == []
    assert known.longest(0, "") == ("", "held of the problem")
    assert known.longest(5, "two") == ("", "held of the problem")
