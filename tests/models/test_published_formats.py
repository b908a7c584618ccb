"""Every published discriminative format against the authors' computation on the whole text."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from layouts import LAYOUTS, Layout
from solutions import random_trees
from tts_search import HFVerifier


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.checkpoint)
def test_scores_are_the_published_ones(layout: Layout, tmp_path: Path) -> None:
    """200 solutions in several steps, fed along random search trees, in float32, against float64."""
    folder = tmp_path / layout.checkpoint
    layout.write(folder)
    chosen = "auto" if layout.format != "llemma_logit" else layout.format
    verifier = HFVerifier(str(folder), format=chosen, dtype=torch.float32, kv_memory="8MiB")
    assert verifier.format.name == layout.format
    published = layout.published(folder)
    spread = []
    for problem, steps, scores in random_trees(verifier, random.Random(7), solutions=200):
        wanted = published(problem, steps)
        assert len(wanted) == len(steps)
        assert scores == pytest.approx(wanted, abs=1e-5, rel=0)
        spread += wanted
    assert max(spread) - min(spread) > 0.03  # not all the same
