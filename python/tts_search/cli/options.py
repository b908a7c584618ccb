"""Options that several commands share, and their values."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import BadParameter, Option

from tts_search.engine.scheduler import Speculate
from tts_search.errors import ConfigError, MissingExtraError, SearchError
from tts_search.search.config import METHODS, SearchConfig, options_of
from tts_search.search.voting import canonical

__all__ = [
    "SPECULATE",
    "Budgets",
    "Device",
    "Dtype",
    "FormatName",
    "KvType",
    "Memory",
    "Out",
    "PolicyPath",
    "Problems",
    "QuantizeOption",
    "Seed",
    "SelfTest",
    "SetFields",
    "Speculating",
    "SystemPrompt",
    "Temperature",
    "VerifierPath",
    "Vote",
    "elected_vote",
    "make_config",
    "method_option",
    "naming",
    "sizes_of",
]


def _checked_by(check: Callable[[str], object]) -> Callable[[Any], Any]:
    """Return a callback for an option. Its value or values are valid if `check` raises no ValueError for them."""

    def callback(value: Any) -> Any:
        for one in value if isinstance(value, list) else [value]:
            try:
                if one is not None:
                    check(one)
            except ValueError as error:
                raise BadParameter(str(error)) from None
        return value

    return callback


def _check_method(name: str) -> None:
    if name not in METHODS:
        raise ValueError(f"expected one of {', '.join(METHODS)}, got {name!r}")


def _check_format(name: str) -> None:
    from tts_search.verifiers import FORMATS

    if name not in ("auto", *FORMATS):
        raise ValueError(f"expected one of auto, {', '.join(FORMATS)}, got {name!r}")


def _check_device(name: str) -> None:
    """Check that torch knows the device. Whether it exists is checked when models are loaded."""
    import torch

    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = name
    if kind not in ("cpu", "cuda", "xpu"):
        raise ValueError(f"expected cpu, cuda, cuda:1 or the like, got {name!r}")


def _check_memory(size: str) -> None:
    from tts_search.models.sizing import parse_bytes

    parse_bytes(size)


def method_option(text: str) -> Any:
    """The option ``--method``, with its help."""
    return Option("--method", help=text, callback=_checked_by(_check_method), autocompletion=lambda: list(METHODS))


# Options that several commands share.
PolicyPath = Annotated[
    str,
    Option(
        "--policy", help="Checkpoint of the policy: a folder, a hub id, or a model of the package, such as policy-0.1m."
    ),
]
VerifierPath = Annotated[
    str | None,
    Option(
        "--verifier",
        help="Checkpoint of the process verifier: as for --policy, such as prm-strong; judge:WHERE: a chat model, a "
        "checkpoint or the http:// address of a server, that chooses among whole solutions (with --format outcome: "
        "says whether each is right).",
    ),
]
Temperature = Annotated[float, Option(help="0 takes the most likely token.")]
SetFields = Annotated[
    list[str],
    Option("--set", metavar="NAME=VALUE", help="Any other field of SearchConfig, such as lookahead=1 or keep=2."),
]
Vote = Annotated[
    str | None,
    Option(help="Which vote elects the answer; by default prm_max, or majority.", callback=_checked_by(canonical)),
]
SystemPrompt = Annotated[str | None, Option("--system-prompt", help="System prompt of the policy.")]
FormatName = Annotated[str, Option("--format", help="Format of the verifier.", callback=_checked_by(_check_format))]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    Option("--dtype", help="Type of weights and cache; by default the checkpoint's."),
]
Device = Annotated[str | None, Option("--device", help="Such as cpu or cuda.", callback=_checked_by(_check_device))]
Memory = Annotated[
    str | None,
    Option("--kv-memory", help="Memory of each model's KV cache, such as 2GiB.", callback=_checked_by(_check_memory)),
]
KvType = Annotated[
    Literal[
        "fp8", "int8", "int4", "int4-channel", "int3-channel", "int2-channel",
        "xquant-8", "xquant-4", "xquant-3", "xquant-2", "xquant-cl-4", "xquant-cl-3", "xquant-cl-2",
    ] | None,
    Option("--kv-dtype", help="Keep keys and values of both models in few bits; by default in the models' dtype."),
]  # fmt: skip
QuantizeOption = Annotated[
    Literal["int8", "int4"] | None, Option("--quantize", help="Quantise the weights of both models while they load.")
]
SelfTest = Annotated[
    bool,
    Option("--self-test/--no-self-test", help="Compare each model with its own eager attention while it loads."),
]
Speculating = Annotated[
    Literal["auto", "on", "off"],
    Option("--speculate", help="Sample what a search will probably ask for next; auto: where that pays."),
]
SPECULATE: dict[str, Speculate] = {"auto": "auto", "on": True, "off": False}
Budgets = Annotated[str, Option(help="Sizes of the search, such as 1,4,16,64.")]
Seed = Annotated[int, Option(help="Fixes every draw, and the problems where they are made.")]
Problems = Annotated[int, Option(min=1, help="Problems of each level.")]
Out = Annotated[Path, Option(help="Folder of the results.", file_okay=False)]


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Name the option in errors of this context.

    Loading a checkpoint or a data set may raise any error (of the hub, of formats, of torch). The cause is the value of
    the option.
    """
    try:
        yield
    except MissingExtraError:
        raise  # its message says what to install
    except Exception as error:
        text = str(error) or type(error).__name__
        kind = "" if isinstance(error, (ValueError, OSError, SearchError)) else f"{type(error).__name__}: "
        raise SearchError(f"{name}: {kind}{text}") from error


def sizes_of(budgets: str) -> list[int]:
    """The numbers of ``--budgets``, ascending, each once.

    Raises
    ------
    SearchError
        If they are no whole numbers of at least 1.
    """
    try:
        sizes = [int(size) for size in budgets.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise SearchError(f"--budgets: expected whole numbers such as 1,4,16, got {budgets!r}")
    return sorted(set(sizes))


def make_config(
    method: str, n: int, seed: int, temperature: float, settings: list[str], *, methods: Sequence[str] = ()
) -> SearchConfig:
    """Return the config of the options; `settings` are NAME=VALUE for its other fields, values as JSON or plain text.

    A setting that this method does not use may be for another one of `methods`.

    Raises
    ------
    SearchError
        If a field does not exist, or has an invalid value; the message names the option.
    """
    values: dict[str, Any] = {"method": method, "n": n, "seed": seed, "temperature": temperature}
    options = {name: f"--{name}" for name in values}
    fields = list(SearchConfig.__dataclass_fields__)
    for setting in settings:
        name, equals, value = setting.partition("=")
        name = name.replace("-", "_")
        if not equals or name not in fields:
            raise SearchError(f"--set: expected NAME=VALUE with a name among {', '.join(fields)}, got {setting!r}")
        try:
            values[name] = json.loads(value)
        except json.JSONDecodeError:
            values[name] = value
        options[name] = f"--set {name}"
    others = set[str]().union(*map(options_of, methods)) - options_of(method)
    try:
        return SearchConfig(**{name: value for name, value in values.items() if name not in others})
    except ConfigError as error:
        name, colon, rest = error.message.partition(":")
        raise SearchError(f"{options.get(name, f'--n or --set: {name}')}{colon}{rest}") from None


def elected_vote(vote: str | None, verifier: str | None) -> str:
    """The name of the given vote, or of the default."""
    return canonical(vote or ("prm_max" if verifier else "majority"))
