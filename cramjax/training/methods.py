"""Which training method a run has: the one place that knows them all."""

from cramjax.config import RunConfig
from cramjax.training import fused, offload, whole
from cramjax.training.program import Method, Parts, Program, batch_like
from cramjax.training.step import DeviceProgram


def method_of(config: RunConfig) -> Method:
    """The training method of a configuration."""
    if config.train.offload_optimizer:
        return offload.METHOD
    return fused.METHOD if config.optim.traits.layerwise else whole.METHOD


def step_program(config: RunConfig, parts: Parts) -> Program:
    """The step of a run on the devices of its mesh, traced.

    Args:
        config: the run.
        parts: what it is made of.

    Raises:
        RunError: the optimizer is to be on the host, and these devices cannot reach it.
    """
    return method_of(config).program(config, parts, batch_like(config, parts))


def devices_program(config: RunConfig, parts: Parts) -> DeviceProgram:
    """What the devices run in a step, not traced yet: all of it, or without the optimizer that is on the host.

    The devices may be such as are only described.
    """
    return method_of(config).device_program(config, parts, batch_like(config, parts))
