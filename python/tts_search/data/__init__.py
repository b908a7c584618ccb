"""What ships with the package: a seeded arithmetic task and, under ``models/``, small models trained on it."""

from __future__ import annotations

from pathlib import Path

__all__ = ["MODELS_DIR"]

MODELS_DIR = Path(__file__).parent / "models"
"""The folder of the demo checkpoints, one Hugging Face checkpoint a sub-folder."""
