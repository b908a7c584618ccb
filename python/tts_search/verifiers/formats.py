"""What a process reward model wants to read, and where its score is: one declarative entry a format.

A verifier reads ``prompt`` with the problem in it, then each step followed by its ``boundary``::

    prompt step boundary (scored) separator step boundary (scored) separator step boundary (scored)

and the hidden state at the last token of a boundary is what the head scores. With ``score_at="closing"`` the text after
``{steps}`` in the prompt is read behind each step, scored at its last token and taken back: a question about the text
so far.

New formats are data: construct a :class:`VerifierFormat`, :func:`register_format` it, or write one into a checkpoint's
``config.json`` as ``"tts_verifier"``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, Literal

__all__ = ["FORMATS", "VerifierFormat", "format_of", "register_format"]

PROBLEM: Final = "{problem}"
STEPS: Final = "{steps}"


def _never(_: Any) -> bool:
    """For formats that no configuration gives away."""
    return False


@dataclass(frozen=True, slots=True)
class VerifierFormat:
    r"""One format of process reward models.

    Attributes
    ----------
    name : str
        What ``HFVerifier(format=...)`` calls it.
    head : str
        How hidden states become scores. ``"label_pair"``: the rows of the LM head for the two ``labels``.
        ``"two_class"``: the tensors ``weight`` [2, H] and ``bias`` [2] of the checkpoint.
    prompt : str
        Text with ``{problem}`` and, where the solution goes, ``{steps}``. The token that the tokenizer puts before a
        text (bos) comes first.
    chat : tuple of (str, str)
        Messages (role, content) to use instead of ``prompt``, through the tokenizer's chat template; the same two marks
        in their contents. If the last one is not the assistant's, the template's generation prompt follows.
    boundary, separator : str
        Text after each step, and between a boundary and the next step. Both stay in the context.
    score_at : str
        ``"boundary"``: the last token of the boundary is scored. ``"closing"``: the last token of the text after
        ``{steps}``, which is read for the score alone.
    strip : bool
        Whether white space around a step is taken off (a step as generated holds its delimiter).
    encoding : str
        ``"text"``: prompt, steps and boundaries are one text for the tokenizer. ``"pieces"``: each is encoded by
        itself, as in training with TRL.
    labels : pair of str or int
        Good and bad label of a label pair: token ids, or texts of one token each.
    weight, bias, good : str, str or None, int
        Names of the tensors of a two-class head (``bias`` None: it has none), and the class that is good.
    matches : callable
        Tells from a model's configuration that it wants this format.

    Raises
    ------
    ValueError
        For an option that is not among those above, or marks that are missing.

    Examples
    --------
    >>> VerifierFormat("shepherd", head="label_pair", prompt="{problem} {steps}", boundary=" \u043a\u0438",
    ...                separator="\n", labels=("+", "-")).score_at
    'boundary'
    """

    name: str
    head: Literal["label_pair", "two_class"]
    prompt: str = "{problem}\n\n{steps}"
    chat: tuple[tuple[str, str], ...] = ()
    boundary: str = ""
    separator: str = ""
    score_at: Literal["boundary", "closing"] = "boundary"
    strip: bool = True
    encoding: Literal["text", "pieces"] = "text"
    labels: tuple[str | int, str | int] = ("+", "-")
    weight: str = "score.weight"
    bias: str | None = "score.bias"
    good: int = 1
    matches: Callable[[Any], bool] = _never

    def __post_init__(self) -> None:
        choices = {
            "head": ("label_pair", "two_class"), "score_at": ("boundary", "closing"), "encoding": ("text", "pieces")
        }  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"format {self.name!r}, {name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        text = "".join(content for _, content in self.chat) if self.chat else self.prompt
        if text.count(PROBLEM) != 1 or text.count(STEPS) != 1 or text.index(PROBLEM) > text.index(STEPS):
            raise ValueError(f"format {self.name!r}: expected one {PROBLEM} and then one {STEPS} in {text!r}")
        if self.score_at == "boundary" and not self.boundary:
            raise ValueError(f"format {self.name!r}: expected a boundary to score at, got an empty one")
        if len(self.labels) != 2:
            raise ValueError(f"format {self.name!r}, labels: expected a good and a bad one, got {self.labels!r}")

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> VerifierFormat:
        """A format from JSON: the attributes by name, ``chat`` as a list of {"role", "content"}; "name" may be missing.

        Raises
        ------
        ValueError
            For a key that is no attribute, or a missing head.
        """
        known = {each.name for each in fields(cls)} - {"matches"}
        if unknown := sorted(set(entry) - known):
            raise ValueError(f"verifier format: unknown {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        if "head" not in entry:
            raise ValueError("verifier format: expected a 'head' (label_pair or two_class), got none")
        options: dict[str, Any] = {"name": "custom", **entry}
        if "chat" in options:
            options["chat"] = tuple((turn["role"], turn["content"]) for turn in options["chat"])
        if "labels" in options:
            options["labels"] = tuple(options["labels"])
        return cls(**options)


FORMATS: Final[dict[str, VerifierFormat]] = {}


def register_format(entry: VerifierFormat) -> VerifierFormat:
    """Add a format to ``FORMATS``, or replace the one of that name; returns it."""
    FORMATS[entry.name] = entry
    return entry


def format_of(choice: str | VerifierFormat | Mapping[str, Any], config: Any) -> VerifierFormat:
    """The format that was asked for; with ``"auto"``, the one that a model's configuration carries or gives away.

    Raises
    ------
    ValueError
        For an unknown name, or if nothing gives the format away.
    """
    if choice == "auto":
        carried = getattr(config, "tts_verifier", None)
        if carried is not None:
            return format_of(carried, config)
        for entry in FORMATS.values():
            if entry.matches(config):
                return entry
        raise ValueError(
            f"format: nothing in the configuration of this {getattr(config, 'model_type', 'model')} says how it scores "
            f"steps; give one of {', '.join(FORMATS)} or a VerifierFormat"
        )
    if isinstance(choice, VerifierFormat):
        return choice
    if isinstance(choice, Mapping):
        return VerifierFormat.from_dict(choice)
    if choice not in FORMATS:
        raise ValueError(f"format: expected auto, {', '.join(FORMATS)} or a VerifierFormat, got {choice!r}")
    return FORMATS[choice]


def _is_two_class(config: Any) -> bool:
    architectures = getattr(config, "architectures", None) or [""]
    return architectures[0].endswith("ForTokenClassification") and getattr(config, "num_labels", 0) == 2


# TRL's PRMTrainer (https://huggingface.co/docs/trl/prm_trainer): prompt, then steps each ended by a separator, encoded
# one by one; the label is at the separator.
register_format(
    VerifierFormat(
        name="two_class",
        head="two_class",
        prompt="{problem}{steps}",
        boundary="\n",
        encoding="pieces",
        matches=_is_two_class,
    )
)

# A chat model that is asked, without any training for it, whether the solution so far is right.
register_format(
    VerifierFormat(
        name="yes_no",
        head="label_pair",
        chat=(
            (
                "user",
                "Problem:\n{problem}\n\nSolution so far:\n{steps}\n\nIs every step of this solution so far correct? "
                "Answer with Yes or No.",
            ),
        ),
        separator="\n\n",
        score_at="closing",
        labels=("Yes", "No"),
    )
)
