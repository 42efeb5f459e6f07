"""What is done with fine-tuned models; how they are trained is in `cramjax.training`."""

from cramjax.tune.merging import Merged, merge_model

__all__ = ["Merged", "merge_model"]
