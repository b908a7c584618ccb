"""An engine with a thread of its own. Searches can be started at any time, from any thread, and watched as they run."""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as WaitingTooLong  # not the builtin one before Python 3.11
from contextlib import suppress
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Final, Generic, TypeVar

from tts_search.engine.events import SearchEvent, Watch
from tts_search.engine.scheduler import Costs, Scheduler, Speculate
from tts_search.errors import SearchError
from tts_search.search.answers import Equality, boxed
from tts_search.search.config import SearchConfig
from tts_search.search.protocol import Generate, Generated, Load, Policy, Verifier
from tts_search.search.result import SearchResult
from tts_search.search.run import Run
from tts_search.search.types import Messages

__all__ = ["Engine", "Generation", "Handle", "Listener", "News", "Search", "default_equality"]

_PERIOD: Final = 1.0  # seconds between two measurements of the policy's load

Result = TypeVar("Result")
News = TypeVar("News")
NewsReader = Callable[[], Iterable[News]]
Listener = Callable[["list[Any] | None"], None]  # gets a list of news, and None at the end


class Engine:
    r"""Searches many problems at the same time over two models. Problems may come at any time, from any thread.

    A thread of its own runs the policy and the verifier, which belong to the engine until it is closed. A problem joins
    the running batch at the next token. Its result does not depend on other problems, even if these are cancelled.

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
        A problem is started while fewer than this many steps run or wait at the policy, and fewer than this many
        candidates at the verifier. By default 1024. Other problems wait for their turn. No forward of a local policy
        has more rows.
    max_in_flight : int or None
        The largest number of problems that are searched at the same time, even if there is room for more.
    prefix_cache : bool
        Whether local models keep the KV of released texts as long as there is room, and use it again for a text that
        begins with the same tokens.
    speculate : {"auto"} or bool
        Whether a local policy samples steps that a beam search or DVTS will probably ask for, and candidates are read,
        while their round waits for other candidates. "auto" does so if it saves time: with few rows and a local
        verifier. This changes no result. ``stats.speculated_tokens`` counts the tokens that were not used.

    Raises
    ------
    SearchError
        If a bound is no int of at least 1, or `speculate` neither "auto" nor a bool.

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
        prefix_cache: bool = True,
        speculate: Speculate = "auto",
    ) -> None:
        equal = equal or default_equality()
        self._scheduler = Scheduler(
            policy,
            verifier,
            extract_answer,
            equal,
            max_rows=max_rows,
            max_in_flight=max_in_flight,
            prefix_cache=prefix_cache,
            speculate=speculate,
        )
        self._numbers = itertools.count()
        self._waiting: deque[Handle[Any, Any]] = deque()  # not begun; like `_begun`, used only by the thread
        self._begun: dict[int, Handle[Any, Any]] = {}
        self._calls: deque[Callable[[], None]] = deque()  # actions that other threads ask for
        self._news: dict[Handle[Any, Any], None] = {}  # those with something new to report after this step
        self._wake = self._scheduler.wake
        self._closed = False
        self._load = (time.monotonic(), self._scheduler.load)
        self._thread = threading.Thread(target=self._work, name="tts_search.Engine", daemon=True)
        self._thread.start()

    def submit(self, problem: str | Messages, config: SearchConfig, *, seed_text: str | None = None) -> Search:
        """Start the search of a problem.

        Parameters
        ----------
        problem : str or list of dict
            Its text; or messages (``{"role": ..., "content": ...}``, a user's last), for policies of chat models. The
            verifier reads the last one.
        config : SearchConfig
            How to search.
        seed_text : str or None
            Replaces the problem in the hash of the draws: with another text, the same problem has other draws.

        Returns
        -------
        Search
            Returned at once. If the problem cannot be searched, its `result` raises the error.

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

    def generate(self, request: Generate) -> Generation:
        """Start to generate text after given tokens, with a policy of a local model; this sets the request's `problem`.

        Raises
        ------
        SearchError
            If the engine is closed. A request that cannot be served fails by itself.
        """
        generation = Generation(self, next(self._numbers), request)
        self._call(partial(self._waiting.append, generation))
        return generation

    @property
    def is_open(self) -> bool:
        """Whether problems can be submitted: it was not closed, and no driver error has ended its thread."""
        return not self._closed

    @property
    def num_waiting(self) -> int:
        """Problems, and requests for text, that have not begun."""
        return len(self._waiting)

    @property
    def num_in_flight(self) -> int:
        """Problems that have begun and not ended."""
        return self._scheduler.num_problems

    @property
    def num_streams(self) -> int:
        """Steps and texts that run or wait at the policy."""
        return self._scheduler.num_streams

    @property
    def load(self) -> Load | None:
        """The policy's load, at most a second old; None unless the policy is a local model."""
        return self._load[1]

    @property
    def speculated(self) -> tuple[int, int]:
        """Tokens of steps that were sampled ahead so far: of those that a search asked for later, and of the others."""
        ahead = self._scheduler.speculation
        return (0, 0) if ahead is None else (ahead.used, ahead.in_vain)

    def close(self) -> None:
        """Cancel all unfinished searches and end the thread. Return when all memory is freed."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def _call(self, action: Callable[[], None]) -> None:
        """Let the thread do something before its next step."""
        with self._wake:
            if self._closed:
                raise SearchError("engine: expected one that is open, got a closed one")
            self._calls.append(action)
            self._wake.notify()

    def _work(self) -> None:
        """Run in the thread, until the engine is closed."""
        error = SearchError("engine: it was closed")
        try:
            while self._obey():
                while self._waiting and self._scheduler.has_room:
                    self._start(self._waiting.popleft())
                for outcome in self._scheduler.step():
                    self._settle(*outcome)
                self._spread()
                if time.monotonic() - self._load[0] > _PERIOD or not self._begun:
                    self._load = (time.monotonic(), self._scheduler.load)
        except BaseException as failure:  # a driver's; all who wait get it
            error = SearchError(f"engine: {type(failure).__name__}: {failure}")
            error.__cause__ = failure
        finally:
            with self._wake:
                self._closed = True
            while self._calls:
                self._calls.popleft()()
            self._scheduler.close()
            for handle in (*self._begun.values(), *self._waiting):
                handle._settle(error)
            self._begun, self._waiting = {}, deque()

    def _obey(self) -> bool:
        """Wait for work, and run the actions of other threads; False if the engine is to end."""
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self._calls or self._has_work)
                if self._closed:
                    return False
                if not self._calls:
                    return True
                action = self._calls.popleft()
            action()

    @property
    def _has_work(self) -> bool:
        """Whether something can be started, or a step would bring something."""
        can_start = bool(self._waiting) and self._scheduler.has_room
        return can_start or (bool(self._begun) and not self._scheduler.is_idle)

    def _spread(self) -> None:
        """Report the news of a step, with one call for all parts of a text."""
        news, self._news = self._news, {}
        for handle in news:
            handle._notify()

    def _start(self, handle: Handle[Any, Any]) -> None:
        self._begun[handle.number] = handle
        handle.waited_s = time.monotonic() - handle._made
        handle._begin(self._scheduler)

    def _settle(self, number: int, outcome: Any) -> None:
        self._begun.pop(number)._settle(outcome)

    def _end(self, handle: Handle[Any, Any]) -> None:
        """Remove a cancelled handle."""
        if handle in self._waiting:
            self._waiting.remove(handle)
        if self._begun.pop(handle.number, None) is not None:
            self._scheduler.cancel(handle.number)
        handle._settle(None)


class Handle(ABC, Generic[Result, News]):
    """A search or a generation that was started at an :class:`Engine`. All methods may be called from any thread.

    ``await handle`` gives the same as :meth:`result`. If a task is cancelled while it waits, the search is cancelled,
    too. ``async for event in handle`` yields the same as :meth:`events`.

    Attributes
    ----------
    waited_s : float or None
        Seconds until the engine began with it; None if it has not.
    """

    def __init__(self, engine: Engine, number: int) -> None:
        self.number = number
        self.waited_s: float | None = None
        self._made = time.monotonic()
        self._engine = engine
        self._future: Future[Result] = Future()
        self._future.add_done_callback(self._on_done)
        self._listeners: dict[Listener, NewsReader[News]] = {}  # used only in the engine's thread

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the result.

        Raises
        ------
        SearchError
            If the work failed, or the engine was closed.
        TimeoutError
            If it takes longer than `timeout` seconds. The work goes on.
        concurrent.futures.CancelledError
            If it was cancelled.
        """
        try:
            return self._future.result(timeout)
        except WaitingTooLong:
            raise TimeoutError(f"timeout: there was no result after {timeout} seconds") from None

    def cancel(self) -> bool:
        """Cancel the work, if it is not done, and return whether it is. Its memory is freed before the next token."""
        return self._future.cancel()

    def done(self) -> bool:
        """Whether there is a result or an error, or it was cancelled."""
        return self._future.done()

    def events(self) -> Iterator[News]:
        """Yield events as they happen, up to the end of the work, even if it fails or is cancelled.

        A caller that begins late misses nothing: the first events tell what has happened before.
        """
        told: queue.SimpleQueue[list[News] | None] = queue.SimpleQueue()
        self.listen(told.put)
        try:
            while (news := told.get()) is not None:
                yield from news
        finally:
            self.ignore(told.put)

    async def __aiter__(self) -> AsyncIterator[News]:
        told, loop = asyncio.Queue[list[News] | None](), asyncio.get_running_loop()

        def listener(news: list[News] | None) -> None:
            loop.call_soon_threadsafe(told.put_nowait, news)

        self.listen(listener)
        try:
            while (news := await told.get()) is not None:
                for event in news:
                    yield event
        finally:
            self.ignore(listener)

    def listen(self, listener: Listener) -> None:
        """Call a function with each list of new events, and with None at the end, in the engine's thread.

        It must return at once. A RuntimeError of it (its event loop is closed) means that it wants no more.
        """

        def begin() -> None:
            self._listeners[listener] = self._reader()
            self._notify()
            if self.done():
                self._tell(listener, None)

        try:
            self._engine._call(begin)
        except SearchError:  # closed: there are no more news
            self._engine._thread.join()
            begin()

    def ignore(self, listener: Listener) -> None:
        """Call a function no more that listens."""
        with suppress(SearchError):
            self._engine._call(partial(self._drop, listener))

    def __await__(self) -> Generator[Any, None, Result]:
        return asyncio.wrap_future(self._future).__await__()

    @abstractmethod
    def _begin(self, scheduler: Scheduler) -> None:
        """Start the work, in the engine's thread."""

    @abstractmethod
    def _reader(self) -> NewsReader[News]:
        """A function that yields the news since its last call."""

    def _drop(self, listener: Listener) -> None:
        self._listeners.pop(listener, None)

    def _notify(self) -> None:
        """Give the listeners their news."""
        for listener, fresh in list(self._listeners.items()):
            if news := list(fresh()):
                self._tell(listener, news)

    def _tell(self, listener: Listener, news: list[News] | None) -> None:
        try:
            listener(news)
        except RuntimeError:  # its event loop is closed
            self._drop(listener)

    def _settle(self, outcome: Result | SearchError | None) -> None:
        """Set the result or the error; None: the work was cancelled."""
        self._notify()
        with suppress(InvalidStateError):  # it was cancelled at this moment
            if isinstance(outcome, SearchError):
                self._future.set_exception(outcome)
            elif outcome is not None:
                self._future.set_result(outcome)
        for listener in list(self._listeners):
            self._tell(listener, None)
        self._listeners.clear()

    def _on_done(self, future: Future[Result]) -> None:
        if future.cancelled():
            with suppress(SearchError):  # a closed engine has freed it
                self._engine._call(partial(self._engine._end, self))


class Search(Handle[SearchResult, SearchEvent]):
    """The search of a problem. Its events are :class:`SearchEvent`. The first events describe the tree at that time."""

    def __init__(
        self, engine: Engine, number: int, problem: str | Messages, config: SearchConfig, seed_text: str | None
    ) -> None:
        super().__init__(engine, number)
        self.problem = problem
        self.config = config
        self.seed_text = seed_text
        self._state: tuple[Run, Costs] | None = None

    def _begin(self, scheduler: Scheduler) -> None:
        started = scheduler.start(
            self.number, self.problem, self.config, seed_text=self.seed_text, on_change=self._look
        )
        for outcome in started:
            self._engine._settle(*outcome)

    def _reader(self) -> NewsReader[SearchEvent]:
        watch = Watch()
        return lambda: () if self._state is None else watch.look(*self._state)

    def _look(self, run: Run, costs: Costs) -> None:
        """Called when the search has advanced."""
        self._state = run, costs
        self._notify()


class Generation(Handle["list[Generated]", Generated]):
    """Generated text. The events are parts of samples; the result is the list of whole samples, in order."""

    def __init__(self, engine: Engine, number: int, request: Generate) -> None:
        super().__init__(engine, number)
        self.request = replace(request, problem=number)
        self._parts: list[Generated] = []
        self._num_left = request.num_samples

    def _begin(self, scheduler: Scheduler) -> None:
        scheduler.generate(self.request, self._take)

    def _reader(self) -> NewsReader[Generated]:
        told = 0

        def fresh() -> list[Generated]:
            nonlocal told
            new, told = self._parts[told:], len(self._parts)
            return new

        return fresh

    def _take(self, news: Generated | Exception) -> None:
        """Called when a part has come."""
        if isinstance(news, Exception):
            error = SearchError(f"{type(news).__name__}: {news}", self.number)
            error.__cause__ = news
            self._engine._settle(self.number, error)
            return
        self._parts.append(news)
        self._engine._news[self] = None
        self._num_left -= news.reason is not None
        if not self._num_left:
            samples = range(self.request.num_samples)
            whole = [Generated.joined([part for part in self._parts if part.sample == one]) for one in samples]
            self._engine._settle(self.number, whole)


def default_equality() -> Equality:
    """Mathematics' equality of answers, imported on use: importing the package imports nothing of a domain."""
    from tts_search.domains.mathematics import equivalent

    return equivalent
