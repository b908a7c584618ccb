"""DeepConf (Fu et al., "Deep Think with Confidence", arXiv 2508.15260): votes by how sure a model was of its tokens."""

from tts_search.deepconf.online import DeepConfResult, Trace, deepconf

__all__ = ["DeepConfResult", "Trace", "deepconf"]
