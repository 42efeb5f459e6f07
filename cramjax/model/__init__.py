"""The model: layers, the stack and its walks, objectives, parameter and FLOP counts. Flax stays inside this folder."""

from cramjax.model.counts import ParameterCount, count_parameters, train_flops_per_token
from cramjax.model.objectives import Loss, Objective, objective_for
from cramjax.model.pattern import repeats_of
from cramjax.model.sizes import fused_splits, width_ratio
from cramjax.model.stack import Model, make_model

__all__ = [
    "Loss",
    "Model",
    "Objective",
    "ParameterCount",
    "count_parameters",
    "fused_splits",
    "make_model",
    "objective_for",
    "repeats_of",
    "train_flops_per_token",
    "width_ratio",
]
