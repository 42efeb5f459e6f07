"""What a model is tuned on: conversations, prompts and completions, texts. Imports no jax."""

from cramjax.data.examples.chat import PLAIN_TEMPLATE
from cramjax.data.examples.config import ExamplesConfig
from cramjax.data.examples.pieces import Example
from cramjax.data.examples.prepare import prepare_examples
from cramjax.data.examples.rows import ExampleRows
from cramjax.data.examples.store import ExampleCounts, ExampleFile, PreparedExamples

__all__ = [
    "PLAIN_TEMPLATE",
    "Example",
    "ExampleCounts",
    "ExampleFile",
    "ExampleRows",
    "ExamplesConfig",
    "PreparedExamples",
    "prepare_examples",
]
