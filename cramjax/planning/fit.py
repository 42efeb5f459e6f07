"""`train.memory=auto`: the planner's choice of microbatch and rematerialisation for the devices there are."""

from collections.abc import Callable
from dataclasses import replace

from cramjax import devices as machine
from cramjax.config import RunConfig
from cramjax.planning.place import device_here
from cramjax.planning.plan import choose
from cramjax.show.numbers import format_bytes
from cramjax.start import start
from cramjax.training.continuing import continued
from cramjax.validation import validate


def fit(config: RunConfig, announce: Callable[[str], None]) -> RunConfig:
    """A configuration with `batch.microbatch` and `train.remat` chosen, where `train.memory` is auto.

    The architecture is that of the model that the run starts from, if any.

    `batch.size` stays, and the optimizer's state where it is. The choice is part of the run's configuration, so a
    resumed run makes none; should it not fit after all, training halves the microbatch at its first step.

    Args:
        config: the run.
        announce: is called with a sentence that says what was chosen.

    Raises:
        ConfigError: nothing fits.
    """
    config = continued(config)
    if config.train.memory != "auto":
        return config
    machine.keep_freed_memory()
    train = config.train
    count = len(start()) if train.data_parallel is None else train.data_parallel * train.fsdp
    device = device_here(count)
    host = "+offload_optimizer" if train.offload_optimizer else ""
    policies = [f"{remat}{host}" for remat in ("none", "selective", "full", "offload")]
    chosen = choose(config, device, policies)
    made, memory = chosen.config, chosen.memory
    announce(
        f"memory: microbatches of {made.batch.microbatch} with train.remat={made.train.remat} are planned to take "
        f"{format_bytes(memory.device_bytes)} of {format_bytes(device.usable)}"
        + (f", and {format_bytes(memory.host_bytes)} of host memory." if memory.host_bytes else ".")
    )
    made = replace(made, train=replace(made.train, data_parallel=train.data_parallel))
    validate(made)
    return made
