"""The checkpoint behind a path: a GGUF file, a folder whose weights have few bits, or one as transformers writes it."""

from __future__ import annotations

from tts_search.models.checkpoint import Checkpoint
from tts_search.models.formats.gguf import GGUFCheckpoint, is_gguf

__all__ = ["open_checkpoint"]


def open_checkpoint(path_or_id: str) -> Checkpoint:
    """Open the checkpoint of a path or a hub id.

    Raises
    ------
    ValueError
        If its file is broken, or of a kind that is not read; naming it.
    """
    return GGUFCheckpoint(path_or_id) if is_gguf(path_or_id) else Checkpoint(path_or_id)
