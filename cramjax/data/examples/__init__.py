"""What a model is tuned on: conversations, prompts and completions, texts, labelled texts. Imports no jax."""

from cramjax.data.examples.chat import PLAIN_TEMPLATE, ChatTemplate, chat_template
from cramjax.data.examples.labelled import (
    LabelledExample,
    LabelledFile,
    PreparedLabels,
    has_pairs,
    labelled_rows,
    prepare_labels,
)
from cramjax.data.examples.pieces import Example, PieceEncoder
from cramjax.data.examples.prepare import prepare_examples
from cramjax.data.examples.rows import ExampleRows
from cramjax.data.examples.store import ExampleCounts, ExampleFile, PreparedExamples
from cramjax.examples import ExamplesConfig, LabelsConfig

__all__ = [
    "PLAIN_TEMPLATE",
    "ChatTemplate",
    "Example",
    "ExampleCounts",
    "ExampleFile",
    "ExampleRows",
    "ExamplesConfig",
    "LabelledExample",
    "LabelledFile",
    "LabelsConfig",
    "PieceEncoder",
    "PreparedExamples",
    "PreparedLabels",
    "chat_template",
    "has_pairs",
    "labelled_rows",
    "prepare_examples",
    "prepare_labels",
]
