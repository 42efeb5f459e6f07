"""Training: the pure step, the loop that spends a budget on it, checkpoints, and the run directory."""

from cramjax.train.heldout import Evaluation, HeldOut
from cramjax.train.loop import resume, train
from cramjax.train.run import Run, load_run

__all__ = ["Evaluation", "HeldOut", "Run", "load_run", "resume", "train"]
