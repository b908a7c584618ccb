"""``python -m tts_search.cli``."""

from __future__ import annotations

from tts_search.cli.main import main

main()
