"""What is measured after a run: baselines on the same held-out text, and the score of any other text."""

from cramjax.evaluation.baselines import baselines
from cramjax.evaluation.text import evaluate_text

__all__ = ["baselines", "evaluate_text"]
