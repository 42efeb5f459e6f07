"""Fine-tuned models: adapters put into weights, and taken to and from other libraries. Training is `cramjax.training`'s."""

from cramjax.tune.merging import Merged, merge_model

__all__ = ["Merged", "merge_model"]
