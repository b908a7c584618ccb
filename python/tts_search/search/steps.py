"""Cuts a text into steps."""

from __future__ import annotations

__all__ = ["split_steps"]


def split_steps(text: str, delimiter: str | None) -> tuple[tuple[str, ...], str]:
    r"""Cut a text into steps, each with the delimiter that ends it.

    A piece of nothing but white space is no step: it becomes the beginning of the step after it.

    Parameters
    ----------
    text : str
        The text.
    delimiter : str or None
        Where to cut; None: the text is one step.

    Returns
    -------
    steps : tuple of str
        The steps, none of them blank.
    rest : str
        White space that no step follows. ``"".join(steps) + rest == text``.

    Examples
    --------
    >>> split_steps("\n\na\n\n\n\nb\n\n", "\n\n")
    (('\n\na\n\n', '\n\nb\n\n'), '')
    """
    pieces = text.split(delimiter) if delimiter is not None else [text]
    steps: list[str] = []
    rest = ""
    for index, piece in enumerate(pieces):
        is_last = index == len(pieces) - 1
        rest += piece if is_last or delimiter is None else piece + delimiter
        if rest.strip():
            steps.append(rest)
            rest = ""
    return tuple(steps), rest
