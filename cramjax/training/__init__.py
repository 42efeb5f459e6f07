"""Training: the pure step, the loop that spends a budget on it, checkpoints, and the run directory."""

from cramjax.training.heldout import Evaluation, HeldOut, PairEvaluation
from cramjax.training.loop import resume, train
from cramjax.training.run import Run, load_run

__all__ = ["Evaluation", "HeldOut", "PairEvaluation", "Run", "load_run", "resume", "train"]
