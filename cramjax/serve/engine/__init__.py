"""The engine: many requests over one model, in pages of keys and values and a fixed number of slots."""

from cramjax.serve.engine.engine import Engine, Load

__all__ = ["Engine", "Load"]
