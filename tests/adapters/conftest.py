"""Shared with other tests: small models, scripted drivers, and the import of a framework's source."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
for folder in ("tests/models", "tests/search", "examples/adapters"):
    if str(ROOT / folder) not in sys.path:
        sys.path.append(str(ROOT / folder))
