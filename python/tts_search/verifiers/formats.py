"""The format of a process reward model: what it reads, and where its scores are. One declarative entry for each model.

A verifier reads ``prompt`` with the problem in it, then each step followed by its ``boundary``::

    prompt step boundary (scored) separator step boundary (scored) separator step boundary (scored)

The head scores the hidden state at the last token of a boundary. With ``score_at="closing"``, the text after
``{steps}`` in the prompt is read after each step, scored at its last token, and removed again: it is a question about
the text so far. A :class:`Judge` first writes an analysis, and then answers such a question. With ``score_at="token"``
there are no steps: the caller brings tokens, and each of them is scored.

New formats are data: construct a :class:`VerifierFormat`, :func:`register_format` it, or write one into a checkpoint's
``config.json`` as ``"tts_verifier"``. The formats of published models are in ``published.py``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Literal, get_args

__all__ = ["FORMATS", "Judge", "VerifierFormat", "each_token", "format_of", "register_format"]

PROBLEM: Final = "{problem}"
STEPS: Final = "{steps}"
STEP: Final = "{step}"
NUMBER: Final = "{number}"

HeadKind = Literal["label_pair", "label", "vocab_mean", "two_class", "mlp", "scalar", "log_ratio"]
_CHOICES: Final[dict[str, tuple[str, ...]]] = {
    "head": get_args(HeadKind),
    "score_at": ("boundary", "closing", "token"),
    "encoding": ("text", "steps", "pieces"),
    "activation": ("sigmoid", "identity"),
}

_IN_WORDS: Final = "compares words of the LM head: they are a verdict where the format asks for one, and nowhere else"
_NOT_OF_TOKENS: Final[dict[str, str]] = {
    "label_pair": _IN_WORDS,
    "label": _IN_WORDS,
    "vocab_mean": "is a mean over the LM head, trained behind steps",
    "log_ratio": "is a sum over the tokens of all steps",
}


@dataclass(frozen=True, slots=True)
class Judge:
    r"""How a generative verifier reaches its verdict: it writes an analysis, and then says yes or no.

    The text ``question`` follows the steps. From there an analysis is sampled until it reaches one of the texts
    ``stop`` (which is cut off), the end of the text, or ``max_tokens``. Then ``decision`` follows, and the labels of
    the format's head are compared at its last token. The score is the mean over ``samples`` analyses.

    Attributes
    ----------
    question : str
        Text before the analysis. ``{number}`` is the number of the step, from 1. With ``{step}``, the judged step
        stands at this place, and only the earlier steps stand among the steps.
    decision : str
        Text between the analysis and the verdict.
    stop : tuple of str
        Texts that end the analysis. ``{next}`` is the number of the step after the judged one.
    samples : int
        How many analyses.
    temperature, top_p, top_k
        As in :class:`~tts_search.StepParams`.
    max_tokens : int
        The largest number of tokens of an analysis.
    no_steps : str
        With ``{step}`` in ``question``: the text in place of the steps if there are no earlier ones.

    Raises
    ------
    ValueError
        If `decision` is empty, or `samples` or `max_tokens` no int of at least 1.
    """

    question: str
    decision: str
    stop: tuple[str, ...] = ()
    samples: int = 1
    temperature: float = 0.6
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 2048
    no_steps: str = ""

    def __post_init__(self) -> None:
        if not self.decision:
            raise ValueError("judge, decision: expected the text that the verdict follows, got an empty one")
        for name in ("samples", "max_tokens"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"judge, {name}: expected an int of at least 1, got {getattr(self, name)!r}")


@dataclass(frozen=True, slots=True)
class VerifierFormat:
    r"""One format of process reward models.

    Attributes
    ----------
    name : str
        What ``HFVerifier(format=...)`` calls it.
    head : str
        How hidden states become scores, see `tts_kernels.ScoreHead`.

        * ``"label_pair"``: the rows of the LM head for the two ``labels``, softmax over them.
        * ``"label"``: the row for the one label in ``labels``; ``"vocab_mean"``: the mean of all rows.
        * ``"two_class"``: tensors ``weight`` [2, H] and ``bias`` [2]; ``"scalar"``: ``weight`` [1, H], ``bias`` [1].
        * ``"mlp"``: ``inner_weight`` [H1, H], ``inner_bias`` [H1], ReLU, ``weight`` [2, H1] and ``bias`` [2].
        * ``"log_ratio"``: no head. The log-probability of the steps' tokens under this model minus that under a
          reference model, times ``beta``, summed from the first step on.
    source : str
        Where the format is published.
    prompt : str
        Text with ``{problem}`` and, at the place of the solution, ``{steps}``.
    chat : tuple of (str, str)
        Messages (role, content) to use instead of ``prompt``, through the tokenizer's chat template. Their contents
        have the same two marks. If the last message is not the assistant's, the template's generation prompt follows.
    reply : str
        For a chat that ends in a user's message: each step is a message of the user, and this is the assistant's answer
        to it. The token before the answer is scored. (The template then defines boundary and separator.)
    boundary, separator : str
        Text after each step, and between a boundary and the next step. Both stay in the context. With an empty boundary
        the last token of the step itself is scored.
    score_at : str
        ``"boundary"``: the last token of the boundary is scored. ``"closing"``: the last token of the text after
        ``{steps}``, which is read only for the score. ``"token"``: every token, for heads that classify tokens
        (:func:`each_token`). The format then adds no text.
    strip : bool
        Whether white space around a step is removed (a generated step includes its delimiter).
    replace : tuple of (str, str)
        Texts that are replaced in steps, repeatedly until none is left.
    numbered : str
        Text before each step; ``{number}`` counts from 1. If a step already begins with such a text, it is removed from
        the step, unless the step is nothing else.
    encoding : str
        Which pieces of text the tokenizer encodes. ``"text"``: the whole text at once. ``"steps"``: the prompt, each
        step and each boundary. ``"pieces"``: as ``"steps"``, with the prompt in three pieces: before the problem, the
        problem, and after it.
    bos : bool or None
        Whether the tokenizer's beginning-of-text token, if it has one, stands before ``prompt``. None: as the tokenizer
        does for texts. (A chat template decides this itself.)
    tokens : tuple of str
        Special tokens that are added to the tokenizer if it lacks them, as was done in training.
    labels : tuple of str or int
        Good and bad label of a label pair (the label of a ``"label"``): ids, or texts of one token each.
    weight, bias, inner_weight, inner_bias : str
        Names of a head's tensors in the checkpoint; a bias of None: there is none.
    head_file : str or None
        File of the checkpoint with these tensors (.safetensors, or .pt, from which only tensors are read); by default
        the file of the weights.
    good : int
        Which of the two classes is the good one.
    activation : str
        The function at the end of a ``"scalar"``, ``"label"`` or ``"vocab_mean"`` head: ``"sigmoid"`` or
        ``"identity"``.
    beta : float
        Factor of a ``"log_ratio"``.
    reference : str or None
        Hub id of a ``"log_ratio"``'s reference model, unless ``HFVerifier(reference=...)`` names another.
    judge : Judge or None
        For generative verifiers, whose head is a label pair.
    generation_prompt : bool
        False: a user's message at the end of a chat is left open, without its end and without a generation prompt.
    outcome : bool
        The text after the steps is read once, after the last step, and gives the score of every step without one. It is
        a verdict on the completion, not on its steps.
    ids : tuple of str
        For recognition: parts of checkpoints' names, in lower case, each beginning at the start of a word.
    architectures, tensors : tuple of str
        For recognition of a checkpoint whose name no format knows: endings of its architecture's name (one must match),
        and names of its tensors (all must be there).

    Raises
    ------
    ValueError
        If an option is not one of those above, or marks are missing.

    Examples
    --------
    >>> VerifierFormat("shepherd", head="label_pair", prompt="{problem} {steps}", boundary=" \u043a\u0438",
    ...                separator="\n", labels=("+", "-")).score_at
    'boundary'
    """

    name: str
    head: HeadKind
    source: str = ""
    prompt: str = "{problem}\n\n{steps}"
    chat: tuple[tuple[str, str], ...] = ()
    reply: str = ""
    boundary: str = ""
    separator: str = ""
    score_at: Literal["boundary", "closing", "token"] = "boundary"
    strip: bool = True
    replace: tuple[tuple[str, str], ...] = ()
    numbered: str = ""
    encoding: Literal["text", "steps", "pieces"] = "text"
    bos: bool | None = None
    tokens: tuple[str, ...] = ()
    labels: tuple[str | int, ...] = ("+", "-")
    weight: str = "score.weight"
    bias: str | None = "score.bias"
    inner_weight: str = "score.0.weight"
    inner_bias: str | None = "score.0.bias"
    head_file: str | None = None
    good: int = 1
    activation: Literal["sigmoid", "identity"] = "sigmoid"
    beta: float = 0.001
    reference: str | None = None
    judge: Judge | None = None
    generation_prompt: bool = True
    outcome: bool = False
    ids: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"format {self.name!r}, {name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        text = "".join(content for _, content in self.chat) if self.chat else self.prompt
        if text.count(PROBLEM) != 1 or text.count(STEPS) != 1 or text.index(PROBLEM) > text.index(STEPS):
            raise ValueError(f"format {self.name!r}: expected one {PROBLEM} and then one {STEPS} in {text!r}")
        self._check_places()
        expected = {"label_pair": 2, "label": 1}.get(self.head)
        if expected is not None and len(self.labels) != expected:
            names = "a good and a bad one" if expected == 2 else "one"
            raise ValueError(f"format {self.name!r}, labels: expected {names}, got {self.labels!r}")
        for old, new in self.replace:
            if not old or old in new:
                raise ValueError(
                    f"format {self.name!r}, replace: expected a text that its replacement does not hold, "
                    f"got {old!r} and {new!r}"
                )

    def _check_places(self) -> None:
        """Whether there is exactly one place at which to score."""
        if self.reply and (not self.chat or self.chat[-1][0] == "assistant" or self.boundary or self.separator):
            raise ValueError(
                f"format {self.name!r}, reply: expected a chat that ends in a user's message, "
                "and no boundary or separator"
            )
        if self.judge is not None and (self.head != "label_pair" or self.score_at != "closing"):
            raise ValueError(f"format {self.name!r}, judge: expected head label_pair and score_at closing")
        asks_ahead = self.judge is not None and STEP in self.judge.question
        if self.outcome and (self.score_at != "closing" or asks_ahead):
            raise ValueError(f"format {self.name!r}, outcome: expected score_at closing, and no {STEP} in a question")
        if self.score_at == "token" and (why := _NOT_OF_TOKENS.get(self.head)):
            raise ValueError(
                f"format {self.name!r}: expected a head that classifies tokens (two_class, mlp, scalar) with score_at "
                f"token, got {self.head}, which {why}"
            )
        if self.head == "log_ratio" and self.score_at != "boundary":
            raise ValueError(f"format {self.name!r}: expected score_at boundary with head log_ratio")

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> VerifierFormat:
        """A format from JSON: the attributes by name, ``chat`` as a list of {"role", "content"}; "name" may be missing.

        Raises
        ------
        ValueError
            If a key is no attribute, or the head is missing.
        """
        known = {each.name for each in fields(cls)}
        if unknown := sorted(set(entry) - known):
            raise ValueError(f"verifier format: unknown {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        if "head" not in entry:
            raise ValueError(f"verifier format: expected a 'head' ({', '.join(_CHOICES['head'])}), got none")
        options: dict[str, Any] = {"name": "custom", **entry}
        if "chat" in options:
            options["chat"] = tuple((turn["role"], turn["content"]) for turn in options["chat"])
        if "replace" in options:
            options["replace"] = tuple((old, new) for old, new in options["replace"])
        for name in ("labels", "tokens", "ids", "architectures", "tensors"):
            if name in options:
                options[name] = tuple(options[name])
        if isinstance(options.get("judge"), Mapping):
            judge = dict(options["judge"])
            options["judge"] = Judge(**{**judge, "stop": tuple(judge.get("stop", ()))})
        return cls(**options)

    def is_named(self, path_or_id: str) -> bool:
        """Whether a checkpoint's path or id shows that it needs this format."""
        return any(re.search(rf"(?<![a-z0-9]){re.escape(part)}", path_or_id.lower()) for part in self.ids)

    def fits(self, config: Any, tensors: Collection[str]) -> bool:
        """Whether a checkpoint's architecture and tensors show that it needs this format."""
        if not self.architectures:
            return False
        names = getattr(config, "architectures", None) or ()
        return any(name.endswith(self.architectures) for name in names) and set(self.tensors) <= set(tensors)


FORMATS: Final[dict[str, VerifierFormat]] = {}


def register_format(entry: VerifierFormat) -> VerifierFormat:
    """Add a format to ``FORMATS``, or replace the one of that name; returns it."""
    FORMATS[entry.name] = entry
    return entry


def each_token(entry: VerifierFormat) -> VerifierFormat:
    """Return the format that scores every token of a text by the head of a format.

    Raises
    ------
    ValueError
        If its head does not classify tokens; the message says what the head does.
    """
    return replace(entry, score_at="token")


def format_of(
    choice: str | VerifierFormat | Mapping[str, Any],
    config: Any,
    path_or_id: str = "",
    tensors: Collection[str] = (),
) -> VerifierFormat:
    """The format with the given name. With ``"auto"``, the format that a checkpoint names or shows.

    A checkpoint shows its format by its name, or else by its architecture and the names of its ``tensors``.

    Formats that were registered later come first.

    Raises
    ------
    ValueError
        For an unknown name, or if the checkpoint does not show its format.
    """
    if choice == "auto":
        return _recognised(config, path_or_id, tensors)
    if isinstance(choice, VerifierFormat):
        return choice
    if isinstance(choice, Mapping):
        return VerifierFormat.from_dict(choice)
    if choice not in FORMATS:
        raise ValueError(f"format: expected auto, {', '.join(FORMATS)} or a VerifierFormat, got {choice!r}")
    return FORMATS[choice]


def _recognised(config: Any, path_or_id: str, tensors: Collection[str]) -> VerifierFormat:
    carried = getattr(config, "tts_verifier", None)
    if carried is not None:
        return format_of(carried, config)
    newest_first = list(FORMATS.values())[::-1]
    name = _checkpoint_name(path_or_id)
    for entry in newest_first:
        if entry.is_named(name):
            return entry
    for entry in newest_first:
        if entry.fits(config, tensors):
            return entry
    raise ValueError(
        f"format: nothing in the name {name!r} or the configuration of this {getattr(config, 'model_type', 'model')} "
        f"says how it scores steps; give one of {', '.join(FORMATS)} or a VerifierFormat"
    )


def _checkpoint_name(path_or_id: str) -> str:
    """A hub id, or the name of a folder. For a snapshot in the hub's cache: the name of its repository."""
    parts = [part for part in path_or_id.replace("\\", "/").split("/") if part]
    cached = [part for part in parts if part.startswith("models--")]
    if cached:
        return cached[-1]
    is_path = path_or_id.startswith((".", "/", "~")) or len(parts) > 2
    return parts[-1] if is_path and parts else path_or_id
