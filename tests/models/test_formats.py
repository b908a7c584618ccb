"""Verifier formats are data: how they are made, found and refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tts_search.verifiers import FORMATS, VerifierFormat, register_format
from tts_search.verifiers.formats import format_of


def test_a_format_is_a_value_that_json_can_carry() -> None:
    entry = {
        "name": "mine",
        "head": "label_pair",
        "chat": [{"role": "user", "content": "{problem}"}, {"role": "assistant", "content": "{steps}"}],
        "boundary": "<|step|>",
        "labels": ["+", 7],
    }
    made = VerifierFormat.from_dict(entry)
    assert made == VerifierFormat(
        "mine",
        "label_pair",
        chat=(("user", "{problem}"), ("assistant", "{steps}")),
        boundary="<|step|>",
        labels=("+", 7),
    )
    assert format_of("auto", SimpleNamespace(tts_verifier=entry)) == made
    assert format_of(entry, None) == made
    assert format_of(made, None) is made


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"head": "label_pair", "boundary": "x", "colour": 1}, "unknown colour; known are .*boundary"),
        ({"boundary": "x"}, "expected a 'head'"),
        ({"head": "regression", "boundary": "x"}, "head: expected one of label_pair, .*, got 'regression'"),
        ({"head": "two_class", "boundary": "x", "encoding": "bytes"}, "encoding: expected one of text, steps, pieces"),
        ({"head": "two_class", "boundary": "x", "score_at": "start"}, "score_at: expected one of boundary, closing"),
        ({"head": "two_class", "boundary": "x", "prompt": "{steps}"}, r"expected one \{problem\} and then"),
        (
            {"head": "two_class", "boundary": "x", "prompt": "{steps}{problem}"},
            r"expected one \{problem\} and then",
        ),
        ({"head": "label_pair", "boundary": "x", "labels": ["+"]}, "labels: expected a good and a bad one"),
    ],
)
def test_entries_that_are_wrong(entry: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VerifierFormat.from_dict(entry)


def test_formats_are_found_by_name_and_by_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = SimpleNamespace(architectures=["Qwen2ForTokenClassification"], num_labels=2)
    assert format_of("auto", tokens, tensors=["score.weight"]).name == "two_class"
    assert format_of("yes_no", tokens).name == "yes_no"
    assert format_of("auto", SimpleNamespace(tts_verifier="yes_no")).name == "yes_no"
    plain = SimpleNamespace(architectures=["LlamaForCausalLM"], model_type="llama")
    with pytest.raises(
        ValueError, match=r"nothing in the name '' or the configuration of this llama .* two_class, .* yes_no"
    ):
        format_of("auto", plain)
    with pytest.raises(ValueError, match=r"expected auto, math_shepherd, .* or a VerifierFormat, got 'qwen'"):
        format_of("qwen", plain)
    mine = VerifierFormat("mine", "two_class", boundary="\n", architectures=("LlamaForCausalLM",), tensors=("head",))
    monkeypatch.setitem(FORMATS, "mine", mine)
    assert register_format(mine) is FORMATS["mine"]
    assert format_of("auto", plain, tensors=["head", "other"]) is mine
    with pytest.raises(ValueError, match="nothing in the name"):
        format_of("auto", plain, tensors=["other"])
