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
    r"""How a generative verifier arrives at its verdict: it writes an analysis, and then says yes or no.

    Behind the steps stands ``question``; from there an analysis is sampled until one of ``stop`` (which is cut off),
    the end of the text or ``max_tokens``; ``decision`` is put behind it, and the labels of the format's head are
    compared at its last token. The score is the mean over ``samples`` analyses.

    Attributes
    ----------
    question : str
        Text before the analysis. ``{number}`` is the number of the step, from 1. With ``{step}`` in it, the step that
        is judged stands here and only the earlier ones among the steps.
    decision : str
        Text between the analysis and the verdict.
    stop : tuple of str
        Texts that end the analysis. ``{next}`` is the number of the step after the judged one.
    samples : int
        How many analyses.
    temperature, top_p, top_k
        As in :class:`~tts_search.StepParams`.
    max_tokens : int
        Of an analysis.
    no_steps : str
        Stands where the steps do while there are none, with ``{step}`` in ``question``.

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
        * ``"log_ratio"``: no head. The log-probability of the steps' tokens under this model less that under a
          reference model, times ``beta``, summed from the first step on.
    source : str
        Where the format is published.
    prompt : str
        Text with ``{problem}`` and, where the solution goes, ``{steps}``.
    chat : tuple of (str, str)
        Messages (role, content) to use instead of ``prompt``, through the tokenizer's chat template; the same two marks
        in their contents. If the last one is not the assistant's, the template's generation prompt follows.
    reply : str
        With a chat that ends in a user's message: each step is a message of the user, which the assistant answers by
        this. The token before the answer is scored. (Boundary and separator follow from the template then.)
    boundary, separator : str
        Text after each step, and between a boundary and the next step. Both stay in the context. With an empty boundary
        the last token of the step itself is scored.
    score_at : str
        ``"boundary"``: the last token of the boundary is scored. ``"closing"``: the last token of the text after
        ``{steps}``, which is read for the score alone. ``"token"``: every token; nothing of the text is the format's.
        For heads that classify tokens (:func:`each_token`).
    strip : bool
        Whether white space around a step is taken off (a step as generated holds its delimiter).
    replace : tuple of (str, str)
        Texts that are replaced in steps, again and again until there are none.
    numbered : str
        Stands before each step; ``{number}`` counts from 1. A step that begins with such a text and goes on loses
        it.
    encoding : str
        What the tokenizer gets as one text. ``"text"``: all. ``"steps"``: the prompt, each step and each boundary.
        ``"pieces"``: those, and in the prompt what is before the problem, the problem, and what is after it.
    bos : bool or None
        Whether the beginning-of-text token of the tokenizer, if it has one, stands before ``prompt``; None: if the
        tokenizer puts one before texts. (A chat template says it itself.)
    tokens : tuple of str
        Special tokens that the tokenizer is given if it lacks them, as was done in training.
    labels : tuple of str or int
        Good and bad label of a label pair (the label of a ``"label"``): ids, or texts of one token each.
    weight, bias, inner_weight, inner_bias : str
        Names of a head's tensors in the checkpoint; a bias of None: there is none.
    head_file : str or None
        File of the checkpoint with these tensors (.safetensors, or .pt, of which only tensors are read); by default its
        weights.
    good : int
        The class that is good, of two.
    activation : str
        What ends a ``"scalar"``, ``"label"`` or ``"vocab_mean"``: ``"sigmoid"`` or ``"identity"``.
    beta : float
        Factor of a ``"log_ratio"``.
    reference : str or None
        Hub id of a ``"log_ratio"``'s reference model, unless ``HFVerifier(reference=...)`` says another.
    judge : Judge or None
        For generative verifiers, whose head is a label pair.
    generation_prompt : bool
        With False, a user's message at the end of a chat is left open: neither its end nor a generation prompt follows.
    outcome : bool
        The text behind the steps is read once, behind the last one, and what it says is the score of every step that
        had none: a verdict on a completion, not on its steps.
    ids : tuple of str
        Recognition: parts of the names of checkpoints, in lower case, each beginning at the start of a word.
    architectures, tensors : tuple of str
        Recognition of a checkpoint that no format knows by name: how its architecture's name ends (one of these), and
        names of tensors that it has (all of these).

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
        """Whether there is a place to score at, and only one."""
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
            For a key that is no attribute, or a missing head.
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
        """Whether a checkpoint's path or id says that it wants this format."""
        return any(re.search(rf"(?<![a-z0-9]){re.escape(part)}", path_or_id.lower()) for part in self.ids)

    def fits(self, config: Any, tensors: Collection[str]) -> bool:
        """Whether a checkpoint's architecture and tensors say that it wants this format."""
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
    """Return what scores every token of a text by the head of a format.

    Raises
    ------
    ValueError
        If its head does not classify tokens; the message says what it does.
    """
    return replace(entry, score_at="token")


def format_of(
    choice: str | VerifierFormat | Mapping[str, Any],
    config: Any,
    path_or_id: str = "",
    tensors: Collection[str] = (),
) -> VerifierFormat:
    """The format that was asked for; with ``"auto"``, the one that a checkpoint carries or gives away.

    A checkpoint gives it away by its name, or else by its architecture and the names of its ``tensors``.
    Formats that were registered later come first.

    Raises
    ------
    ValueError
        For an unknown name, or if nothing gives the format away.
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
    """A hub id, or of a folder: its own name, or that of the repository whose snapshot it is in the hub's cache."""
    parts = [part for part in path_or_id.replace("\\", "/").split("/") if part]
    cached = [part for part in parts if part.startswith("models--")]
    if cached:
        return cached[-1]
    is_path = path_or_id.startswith((".", "/", "~")) or len(parts) > 2
    return parts[-1] if is_path and parts else path_or_id
