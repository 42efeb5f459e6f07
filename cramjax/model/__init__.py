"""The model: layers, the stack and its walks, objectives, parameter and FLOP counts. Flax stays inside this folder."""

from cramjax.model.counts import ParameterCount, count_parameters, train_flops_per_token
from cramjax.model.model import Model, make_model
from cramjax.model.objectives import Loss, Objective, objective_for
from cramjax.model.pattern import repeats_of
from cramjax.model.sizes import width_ratio
from cramjax.model.stack import Stack, weights_of
from cramjax.model.weights import Role, Weight

__all__ = [
    "Loss",
    "Model",
    "Objective",
    "ParameterCount",
    "Role",
    "Stack",
    "Weight",
    "count_parameters",
    "make_model",
    "objective_for",
    "repeats_of",
    "train_flops_per_token",
    "weights_of",
    "width_ratio",
]
