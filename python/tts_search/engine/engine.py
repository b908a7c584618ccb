"""An engine with a thread of its own: searches are handed in at any time, from any thread, and told as they get on."""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as WaitingTooLong  # before Python 3.11 not the builtin one
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any

from tts_search.engine.events import SearchEvent, Watch
from tts_search.engine.scheduler import Scheduler
from tts_search.errors import SearchError
from tts_search.search.answers import Equality, boxed
from tts_search.search.config import SearchConfig
from tts_search.search.protocol import Policy, Verifier
from tts_search.search.result import SearchResult
from tts_search.search.run import Run
from tts_search.search.types import Messages

__all__ = ["Engine", "Search", "default_equality"]

Listener = Callable[["SearchEvent | None"], None]


class Engine:
    r"""Searches problems that are handed in at any time and from any thread, side by side over two models.

    A thread of its own drives the policy and the verifier, which belong to it until it is closed. A problem joins the
    running batch at the next token; what else runs, or is cancelled, changes nothing in its result.

    Parameters
    ----------
    policy : Policy
        Generates steps.
    verifier : Verifier or None
        Scores them.
    extract_answer : callable
        Takes the answer out of a completion's text.
    equal : callable or None
        Whether two answers mean the same; by default :func:`tts_search.equivalent`.
    max_rows : int or None
        Problems are begun while fewer steps than that run or wait, 1024 by default; later ones wait for their turn.
    max_in_flight : int or None
        The most problems that are searched side by side, whatever room there is.

    Raises
    ------
    SearchError
        If a bound is no int of at least 1.

    Examples
    --------
    >>> from tts_search import Engine, SearchConfig, Step, TextPolicy
    >>> policy = TextPolicy(lambda reqs: [[Step("so \\boxed{2}", True)] * r.num_samples for r in reqs])
    >>> with Engine(policy) as engine:
    ...     search = engine.submit("What is 1 + 1?", SearchConfig("best_of_n", n=4))
    ...     search.result().answer("majority")
    '2'
    """

    def __init__(
        self,
        policy: Policy,
        verifier: Verifier | None = None,
        *,
        extract_answer: Callable[[str], str | None] = boxed,
        equal: Equality | None = None,
        max_rows: int | None = None,
        max_in_flight: int | None = None,
    ) -> None:
        equal = equal or default_equality()
        self._scheduler = Scheduler(
            policy, verifier, extract_answer, equal, max_rows=max_rows, max_in_flight=max_in_flight
        )
        self._numbers = itertools.count()
        self._waiting: deque[Search] = deque()  # not begun; with `_begun` and the scheduler the thread's own
        self._begun: dict[int, Search] = {}
        self._calls: deque[Callable[[], None]] = deque()  # what other threads want done
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="tts_search.Engine", daemon=True)
        self._thread.start()

    def submit(self, problem: str | Messages, config: SearchConfig, *, seed_text: str | None = None) -> Search:
        """Hand a problem in.

        Parameters
        ----------
        problem : str or list of dict
            Its text; or messages (``{"role": ..., "content": ...}``, a user's last), for policies of chat models. The
            verifier reads the last one.
        config : SearchConfig
            How to search.
        seed_text : str or None
            Stands for the problem in the hash of the draws: the same problem with another one is searched otherwise.

        Returns
        -------
        Search
            At once; a problem that cannot be searched fails there.

        Raises
        ------
        SearchError
            If the engine is closed, or the method needs a verifier and there is none.
        """
        if self._scheduler.verifier is None and config.needs_verifier:
            raise SearchError(f"verifier: {config.method} needs one, got None; only best_of_n works without")
        search = Search(self, next(self._numbers), problem, config, seed_text)
        self._call(partial(self._waiting.append, search))
        return search

    @property
    def is_open(self) -> bool:
        """Whether problems can be handed in: nobody has closed it, and no driver has made its thread end."""
        return not self._closed

    @property
    def num_waiting(self) -> int:
        """Problems that have not begun."""
        return len(self._waiting)

    @property
    def num_in_flight(self) -> int:
        """Problems that have."""
        return self._scheduler.num_problems

    @property
    def num_streams(self) -> int:
        """Steps that run or wait at the policy."""
        return self._scheduler.num_streams

    def close(self) -> None:
        """Cancel all searches that are not done and end the thread; returns when everything is freed."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def _call(self, action: Callable[[], None]) -> None:
        """Have the thread do something before its next step."""
        with self._wake:
            if self._closed:
                raise SearchError("engine: expected one that is open, got a closed one")
            self._calls.append(action)
            self._wake.notify()

    def _work(self) -> None:
        """What the thread does until the engine is closed."""
        error = SearchError("engine: it was closed")
        try:
            while self._obey():
                while self._waiting and self._scheduler.has_room:
                    self._start(self._waiting.popleft())
                for outcome in self._scheduler.step():
                    self._settle(*outcome)
        except BaseException as failure:  # of a driver: whoever waits is to know it
            error = SearchError(f"engine: {type(failure).__name__}: {failure}")
            error.__cause__ = failure
        finally:
            with self._wake:
                self._closed = True
            while self._calls:
                self._calls.popleft()()
            self._scheduler.close()
            for search in (*self._begun.values(), *self._waiting):
                search._settle(error)
            self._begun, self._waiting = {}, deque()

    def _obey(self) -> bool:
        """Wait for something to do, and do what other threads want done; False if the engine is to end."""
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self._calls or self._waiting or self._begun)
                if self._closed:
                    return False
                if not self._calls:
                    return True
                action = self._calls.popleft()
            action()

    def _start(self, search: Search) -> None:
        self._begun[search.number] = search
        started = self._scheduler.start(
            search.number, search.problem, search.config, seed_text=search.seed_text, on_change=search._look
        )
        for outcome in started:
            self._settle(*outcome)

    def _settle(self, number: int, outcome: SearchResult | SearchError) -> None:
        self._begun.pop(number)._settle(outcome)

    def _end(self, search: Search) -> None:
        """Forget a search that was cancelled."""
        if search in self._waiting:
            self._waiting.remove(search)
        if self._begun.pop(search.number, None) is not None:
            self._scheduler.cancel(search.number)
        search._settle(None)


class Search:
    """The search of a problem that was handed to an :class:`Engine`; all of it may be used from any thread.

    ``await search`` is its result, as :meth:`result` says; a task that is cancelled while it waits cancels the search.
    ``async for event in search`` yields what :meth:`events` yields.
    """

    def __init__(
        self, engine: Engine, number: int, problem: str | Messages, config: SearchConfig, seed_text: str | None
    ) -> None:
        self.number = number
        self.problem = problem
        self.config = config
        self.seed_text = seed_text
        self._engine = engine
        self._future: Future[SearchResult] = Future()
        self._future.add_done_callback(self._on_done)
        self._run: Run | None = None  # this and the listeners belong to the engine's thread
        self._listeners: dict[Listener, Watch] = {}

    def result(self, timeout: float | None = None) -> SearchResult:
        """Wait for the result.

        Raises
        ------
        SearchError
            If the search failed, or the engine was closed.
        TimeoutError
            If it takes longer than so many seconds; the search goes on.
        concurrent.futures.CancelledError
            If it was cancelled.
        """
        try:
            return self._future.result(timeout)
        except WaitingTooLong:
            raise TimeoutError(f"timeout: the search was not done after {timeout} seconds") from None

    def cancel(self) -> bool:
        """End the search, if it is not done: what it holds is freed before the next token. Whether it is cancelled."""
        return self._future.cancel()

    def done(self) -> bool:
        """Whether there is a result or an error, or it was cancelled."""
        return self._future.done()

    def events(self) -> Iterator[SearchEvent]:
        """Yield what happens, as it happens, up to the end of the search, however that comes about.

        All of it, whenever one begins to listen: the first events bring the tree as it is then.
        """
        told: queue.SimpleQueue[SearchEvent | None] = queue.SimpleQueue()
        self._listen(told.put)
        try:
            while (event := told.get()) is not None:
                yield event
        finally:
            self._ignore(told.put)

    async def __aiter__(self) -> AsyncIterator[SearchEvent]:
        loop, told = asyncio.get_running_loop(), asyncio.Queue[SearchEvent | None]()

        def listener(event: SearchEvent | None) -> None:
            loop.call_soon_threadsafe(told.put_nowait, event)

        self._listen(listener)
        try:
            while (event := await told.get()) is not None:
                yield event
        finally:
            self._ignore(listener)

    def __await__(self) -> Generator[Any, None, SearchResult]:
        return asyncio.wrap_future(self._future).__await__()

    def _listen(self, listener: Listener) -> None:
        def begin() -> None:
            self._listeners[listener] = Watch()
            if self._run is not None:
                self._look(self._run)
            if self.done():
                self._tell(listener, None)

        try:
            self._engine._call(begin)
        except SearchError:  # closed: nothing happens any more
            self._engine._thread.join()
            begin()

    def _ignore(self, listener: Listener) -> None:
        with suppress(SearchError):
            self._engine._call(partial(self._drop, listener))

    def _look(self, run: Run) -> None:
        """The search has got on."""
        self._run = run
        for listener, watch in list(self._listeners.items()):
            for event in watch.look(run):
                self._tell(listener, event)

    def _tell(self, listener: Listener, event: SearchEvent | None) -> None:
        try:
            listener(event)
        except RuntimeError:  # its event loop is closed
            self._drop(listener)

    def _drop(self, listener: Listener) -> None:
        self._listeners.pop(listener, None)

    def _settle(self, outcome: SearchResult | SearchError | None) -> None:
        """It is done; None: it was cancelled."""
        with suppress(InvalidStateError):  # it was cancelled just now
            if isinstance(outcome, SearchError):
                self._future.set_exception(outcome)
            elif outcome is not None:
                self._future.set_result(outcome)
        for listener in list(self._listeners):
            self._tell(listener, None)
        self._listeners.clear()

    def _on_done(self, future: Future[SearchResult]) -> None:
        if future.cancelled():
            with suppress(SearchError):  # of a closed engine, which has freed it
                self._engine._call(partial(self._engine._end, self))


def default_equality() -> Equality:
    """Mathematics' equality of answers; imported on use, so that the package imports with nothing of a domain."""
    from tts_search.domains.mathematics import equivalent

    return equivalent
