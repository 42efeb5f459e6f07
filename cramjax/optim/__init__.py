"""Optimizers, parameter groups and schedules, all driven by the spent fraction of the budget."""

from cramjax.optim.lomo import FusedOptimizer, When, make_fused
from cramjax.optim.optimizer import Optimizer, OptimizerState, make_optimizer
from cramjax.optim.schedule import batch_size_at, schedule

__all__ = [
    "FusedOptimizer",
    "Optimizer",
    "OptimizerState",
    "When",
    "batch_size_at",
    "make_fused",
    "make_optimizer",
    "schedule",
]
