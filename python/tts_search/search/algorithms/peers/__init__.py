"""The searches of other frameworks, each a loop of its own; the presets of :class:`~tts_search.SearchConfig` name them.

The documentation (*semantics*) explains the rules of each framework, and their reasons. If a framework leaves an order
open, the earlier candidate wins.
"""
