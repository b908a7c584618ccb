"""The searches of other frameworks, each a loop of its own; the presets of :class:`~tts_search.SearchConfig` name them.

What a peer does and why is told in the documentation (*semantics*). Where a peer leaves an order open, the earlier
candidate wins.
"""
