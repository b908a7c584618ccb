"""The engine: searches a series of problems, as many of them side by side as there is room for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from tts_search.engine.scheduler import Outcome, Scheduler
from tts_search.search.answers import Equality
from tts_search.search.config import SearchConfig
from tts_search.search.protocol import Policy, Verifier

__all__ = ["Engine"]


class Engine:
    """Searches problems, up to `max_in_flight` of them at a time, in the caller's thread.

    A problem whose search ends makes room for the next one. A problem's draws depend on nothing but the seed, its text
    and the path in its tree. What stands beside it in a batch can change the last bit of its attention: another token
    by that is rare in bfloat16 (one in thousands) and was not seen in float32.

    A failure that belongs to one problem ends that one.
    """

    def __init__(
        self,
        policy: Policy,
        verifier: Verifier | None,
        config: SearchConfig,
        extract_answer: Callable[[str], str | None],
        max_in_flight: int,
        equal: Equality,
    ) -> None:
        self.config = config
        self.max_in_flight = max_in_flight
        self._scheduler = Scheduler(policy, verifier, extract_answer, equal)

    def run(self, problems: Iterable[str]) -> Iterator[Outcome]:
        """Yield (index, result or error) as problems finish. Closing the iterator ends the problems in flight."""
        waiting = enumerate(problems)
        scheduler = self._scheduler
        try:
            while True:
                while scheduler.num_problems < self.max_in_flight and (entry := next(waiting, None)) is not None:
                    yield from scheduler.start(*entry, self.config)
                if not scheduler.num_problems:
                    return
                yield from scheduler.step()
        finally:
            scheduler.close()
