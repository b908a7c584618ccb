"""News of many handles reach an event loop in order, and keep nobody waiting."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from scripted import RandomTree
from test_engine import PROBLEMS, drivers
from test_scheduler import alone, content
from tts_search import Engine, SearchConfig
from tts_search.serve.news import Post, together

CONFIG = SearchConfig(n=4, expand=2, max_steps=4)


def test_several_are_watched_together():
    tree = RandomTree(5, end=0.1)

    async def main() -> tuple[list[list[Any]], list[Any]]:
        with Engine(*drivers(tree)) as engine:
            searches = [engine.submit(problem, CONFIG) for problem in PROBLEMS]
            told: list[list[Any]] = [[] for _ in searches]
            async for news in together(searches, Post(asyncio.get_running_loop())):
                assert news
                for place, event in news:
                    told[place].append(event)
            return told, [one.result(20) for one in searches]

    told, results = asyncio.run(main())
    assert list(map(content, results)) == alone(tree, CONFIG)
    for events, result in zip(told, results, strict=True):
        assert {node.id for event in events for node in event.nodes} == {node.id for node in result.tree.nodes}


def test_what_comes_at_once_is_told_at_once_and_in_order():
    """A thread tells ten listeners; whatever it says before the loop gets to it is one list for each of them."""

    async def main() -> None:
        post, queues = Post(asyncio.get_running_loop()), [asyncio.Queue[list[int]]() for _ in range(10)]
        for item in range(100):  # the loop has no turn meanwhile
            for told in queues:
                post.put(told, item)
        assert [await told.get() for told in queues] == [list(range(100))] * 10

        def talk() -> None:
            for item in range(1000):
                for told in queues:
                    post.put(told, item)

        talking = asyncio.create_task(asyncio.to_thread(talk))
        for told in queues:
            items: list[int] = []
            while len(items) < 1000:
                items += await asyncio.wait_for(told.get(), 20)
            assert items == list(range(1000))
        await talking

    asyncio.run(main())


def test_nothing_is_carried_to_a_closed_loop():
    loop = asyncio.new_event_loop()
    post = Post(loop)
    loop.close()
    with pytest.raises(RuntimeError, match="closed"):
        post.put(asyncio.Queue(), 1)
