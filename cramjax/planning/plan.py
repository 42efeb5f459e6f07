"""The planner: which policies fit a device, how fast they go, which is best, and what a budget buys with it."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from cramjax import devices as machine
from cramjax.budget import Budget
from cramjax.config import Remat, RunConfig
from cramjax.data import Tokenizer, prepared_already
from cramjax.errors import ConfigError
from cramjax.gpus import GPUS, Gpu, gpu_named, gpu_of_kind
from cramjax.model import count_parameters, train_flops_per_token
from cramjax.planning.memory import Memory, estimate_memory
from cramjax.planning.speed import Purchase, Speed, estimate_speed, what_it_buys
from cramjax.recipes import load_recipe
from cramjax.train.parts import Vocabulary
from cramjax.validation import validate

MEMORY_FRACTION = machine.MEMORY_FRACTION
CONTEXT_BYTES = 1 << 29
"""What the driver's context, its libraries and loaded programs take of a GPU beside XLA's memory."""
CPU_SHARE = 0.8
"""Of a computer's memory that a run on its CPU may use."""


@dataclass(frozen=True)
class Device:
    """What a plan is for."""

    name: str
    gpu: Gpu | None
    """None: this computer's CPU."""
    count: int
    memory: int
    """Bytes of each."""
    usable: int
    """Bytes of each that a step may take."""

    def __str__(self) -> str:
        many = f"{self.count} × " if self.count > 1 else ""
        return f"{many}{self.name}"


@dataclass(frozen=True)
class Option:
    """One policy on the device, with the largest microbatch that fits it, or with the smallest if none does."""

    policy: str
    config: RunConfig
    """The run under this policy."""
    memory: Memory
    fits: bool
    speed: Speed | None
    """None on a CPU, unless this is the policy chosen: there the real step is timed."""

    @property
    def microbatch(self) -> int:
        """Sequences per forward-backward pass over all devices."""
        return self.config.batch.microbatch or self.config.batch.size

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of whole steps."""
        return None if self.speed is None else self.speed.tokens_per_second(self.config.batch.size // self.microbatch)


@dataclass(frozen=True)
class Plan:
    """A run on a device, before it runs."""

    name: str
    """Of the recipe."""
    device: Device
    parameters: int
    flops_per_token: float
    options: tuple[Option, ...]
    chosen: Option
    """The fastest that fits."""
    budget: str
    purchase: Purchase
    price: float | None = None
    exact_device_bytes: int | None = None
    """The compiler's bytes of the chosen option's step; None where it was not compiled."""

    @property
    def config(self) -> RunConfig:
        """The run as planned, to train with."""
        return self.chosen.config

    def json(self) -> dict[str, Any]:
        """The plan as plain values."""
        chosen = self.chosen
        return {
            "recipe": self.name,
            "device": self.device.name,
            "devices": self.device.count,
            "usable_bytes": self.device.usable,
            "parameters": self.parameters,
            "flops_per_token": self.flops_per_token,
            "policy": chosen.policy,
            "microbatch": chosen.microbatch,
            "batch": chosen.config.batch.size,
            "device_bytes": chosen.memory.device_bytes,
            "exact_device_bytes": self.exact_device_bytes,
            "host_bytes": chosen.memory.host_bytes,
            "by_kind": dict(chosen.memory.by_kind),
            "tokens_per_second": self.purchase.tokens_per_second,
            "step_tokens_per_second": chosen.tokens_per_second,
            "budget": self.budget,
            **{key: value for key, value in dataclasses.asdict(self.purchase).items() if key != "tokens_per_second"},
            "assumes": None if chosen.speed is None else chosen.speed.source,
            "policies": [
                {
                    "policy": option.policy,
                    "fits": option.fits,
                    "microbatch": option.microbatch,
                    "device_bytes": option.memory.device_bytes,
                    "host_bytes": option.memory.host_bytes,
                    "tokens_per_second": option.tokens_per_second,
                }
                for option in self.options
            ],
        }

    def plot(self) -> Any:
        """Stacked bars of the memory of each policy, against what the device has."""
        from cramjax.planning.show import memory_bars

        return memory_bars(self)

    def __rich__(self) -> Any:
        from cramjax.planning.show import rendered

        return rendered(self)

    def __str__(self) -> str:
        from cramjax.planning.show import as_text

        return as_text(self)

    def _repr_html_(self) -> str:
        from cramjax.planning.show import as_html

        return as_html(self)


def plan(
    recipe: RunConfig | str | Path,
    device: str | None = None,
    *,
    devices: int = 1,
    budget: str | None = None,
    price: float | None = None,
    exact: bool = False,
    policies: Sequence[str] | None = None,
    **overrides: Any,
) -> Plan:
    """Plan a run: the policy and the microbatch for a device, and what a budget will buy.

    Args:
        recipe: a configuration, or the name or file of a recipe.
        device: a card (`rtx4090`, `a100-80gb`), or `cpu`. Default: the device there is.
        devices: how many of them.
        budget: what is spent. Default: the configuration's.
        price: of an hour of all devices.
        exact: compile the chosen step ahead of time for the card, and report the compiler's bytes.
        policies: policies to consider, of `none`, `selective`, `full`, `offload`, and each with `+offload_optimizer`.
            Default: all that the optimizer allows.
        overrides: as for `cramjax.recipe`, when `recipe` is a name.

    Raises:
        ConfigError: the recipe, device or budget cannot be; the step fits under no policy; or `exact`, and nothing can
            be compiled for the card here.
    """
    if isinstance(recipe, RunConfig):
        if overrides:
            raise ConfigError(f"{', '.join(overrides)}: give overrides to `recipe`, where the configuration is made.")
        name, config = "run", recipe
    else:
        name, config = Path(recipe).stem, load_recipe(recipe, overrides)
    if budget is not None:
        config = dataclasses.replace(config, budget=budget)
    if devices < 1:
        raise ConfigError(f"devices must be at least 1, got {devices}.")
    if price is not None and not 0 <= price < math.inf:
        raise ConfigError(f"price must be at least 0, got {price:g}: give the price of an hour.")
    amount = Budget.parse(config.budget)
    where = device_named(device, devices)
    vocabulary = vocabulary_of(config)
    options = tuple(_options(_on(config, devices), vocabulary, where, policies))
    fitting = [option for option in options if option.fits]
    if not fitting:
        raise ConfigError(_nothing_fits(_on(config, devices), vocabulary, where, options))
    chosen = fitting[0]
    if where.gpu is not None:
        chosen = max(fitting, key=lambda option: option.tokens_per_second or 0.0)
    else:
        chosen = dataclasses.replace(chosen, speed=_speed_here(chosen.config, vocabulary))
        options = tuple(chosen if option.policy == chosen.policy else option for option in options)
    assert chosen.speed is not None
    sizes = {"vocab_size": vocabulary.vocab_size, "sequence_length": config.data.sequence_length}
    parameters = count_parameters(config.model, **sizes).total
    purchase = what_it_buys(
        chosen.config,
        chosen.speed,
        amount,
        parameters=parameters,
        tokens_per_epoch=_tokens_per_epoch(config),
        price=price,
    )
    return Plan(
        name=name,
        device=where,
        parameters=parameters,
        flops_per_token=chosen.speed.flops_per_token,
        options=options,
        chosen=chosen,
        budget=str(amount),
        purchase=purchase,
        price=price,
        exact_device_bytes=exact_bytes(chosen.config, where) if exact else None,
    )
