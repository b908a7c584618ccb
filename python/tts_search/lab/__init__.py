"""The laboratory: a demo and a study of search, on a seeded arithmetic task and small models (under ``models/``).

It uses only interfaces that any user of the package has.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["MODELS_DIR"]

MODELS_DIR = Path(__file__).parent / "models"
"""The folder of the demo checkpoints, one Hugging Face checkpoint in each sub-folder."""
