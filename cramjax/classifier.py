"""The head for labels, as a part of a model's configuration. Imports no jax."""

from dataclasses import dataclass

from cramjax.ranges import Count, ShareBelowOne


@dataclass(frozen=True)
class ClassifierConfig:
    """A head that gives labels of whole texts: dense, tanh, dropout, linear, over one token (BERT's; Devlin et al.
    2019).
    """

    labels: tuple[str, ...] = ()
    """Names of the classes, in the order of their numbers. Empty: the head gives a number (regression)."""
    width: Count | None = None
    """Width of the dense layer. Default: the model's."""
    dropout: ShareBelowOne = 0.1
    """Dropout between the two layers, in training."""
    pairs: bool | None = None
    """Whether it was tuned on pairs, and so is scored on pairs. null: as the rows are that it is scored on."""

    @property
    def outputs(self) -> int:
        """Numbers that the head gives."""
        return max(1, len(self.labels))
