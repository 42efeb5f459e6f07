"""The planner: which policies fit a device, how fast they go, which is best, and what a budget buys with it."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import jax

from cramjax import devices as machine
from cramjax.budget import Budget
from cramjax.config import Remat, RunConfig
from cramjax.data import prepared_already
from cramjax.errors import ConfigError
from cramjax.gpus import GPUS
from cramjax.model import count_parameters
from cramjax.model_yaml import is_model_directory, model_config
from cramjax.planning.measure import measured_speed
from cramjax.planning.memory import Memory, estimate_memory
from cramjax.planning.place import Device, device_named
from cramjax.planning.speed import Purchase, Speed, estimate_speed, smallest_budget, what_it_buys
from cramjax.planning.steps import compile_here, compile_step, vocabulary_of
from cramjax.recipes import load_recipe, recipe_path
from cramjax.show.numbers import format_bytes
from cramjax.show.values import Viewed
from cramjax.training.continuing import continued
from cramjax.training.methods import method_of
from cramjax.training.parts import Vocabulary, flops_per_token

if TYPE_CHECKING:
    from cramjax.show.figures import Plot
    from cramjax.show.tables import Page

_CPU_UTILISATION = 0.5
_LONGEST_MICROBATCH = 10.0
"""Seconds; a CPU's microbatch that is to take longer is not timed."""
_ON_HOST = "train.offload_optimizer=true and train.param_dtype=bfloat16"


@dataclass(frozen=True)
class Option:
    """One policy on the device, with the largest microbatch that fits it, or with the smallest if none does."""

    policy: str
    config: RunConfig
    """The run under this policy."""
    memory: Memory
    lacks: str | None
    """Why it does not fit; None: it does."""
    speed: Speed | None
    """None on a CPU, unless this is the policy chosen: there the real step is timed."""

    @property
    def fits(self) -> bool:
        """Whether the device, and its host, hold it."""
        return self.lacks is None

    @property
    def microbatch(self) -> int:
        """Sequences per forward-backward pass over all devices."""
        return self.config.batch.microbatch or self.config.batch.size

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of whole steps."""
        return None if self.speed is None else self.speed.tokens_per_second(self.config.batch.size // self.microbatch)


@dataclass(frozen=True, repr=False)
class Plan(Viewed):
    """A run on a device, before it runs."""

    name: str
    """Of the recipe."""
    device: Device
    parameters: int
    active_parameters: int
    """Those that have a part in what is computed of a token: without experts, all."""
    flops_per_token: float
    options: tuple[Option, ...]
    chosen: Option
    """The fastest that fits."""
    given: RunConfig
    """The run as the recipe has it."""
    budget: str
    purchase: Purchase
    price: float | None = None
    exact_device_bytes: int | None = None
    """The compiler's bytes of the chosen option's step; None where it was not compiled."""

    @property
    def config(self) -> RunConfig:
        """The run as planned, to train with."""
        return self.chosen.config

    @property
    def changes(self) -> dict[str, Any]:
        """What the plan has chosen otherwise than the recipe, by the fields' names."""
        sections = (("batch", ("microbatch",)), ("train", ("remat", "offload_optimizer", "param_dtype", "zero")))
        given = dataclasses.replace(self.given.batch, microbatch=self.given.batch.microbatch or self.given.batch.size)
        before = dataclasses.replace(self.given, batch=given)
        return {
            f"{section}.{name}": value
            for section, names in sections
            for name in names
            if (value := getattr(getattr(self.config, section), name)) != getattr(getattr(before, section), name)
        }

    def json(self) -> dict[str, Any]:
        """The plan as plain values."""
        chosen = self.chosen
        return {
            "recipe": self.name,
            "device": self.device.name,
            "devices": self.device.count,
            "usable_bytes": self.device.usable,
            "parameters": self.parameters,
            "active_parameters": self.active_parameters,
            "flops_per_token": self.flops_per_token,
            "policy": chosen.policy,
            "microbatch": chosen.microbatch,
            "batch": chosen.config.batch.size,
            "changes": self.changes,
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
                    "lacks": option.lacks,
                    "microbatch": option.microbatch,
                    "device_bytes": option.memory.device_bytes,
                    "host_bytes": option.memory.host_bytes,
                    "tokens_per_second": option.tokens_per_second,
                }
                for option in self.options
            ],
        }

    def plot(self) -> "Plot":
        """Stacked bars of the memory of each policy, against what the device has."""
        from cramjax.planning.show import memory_of_policies

        return memory_of_policies(self)

    def __rich__(self) -> "Page":
        from cramjax.planning.show import page

        return page(self)


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
        recipe: a configuration, the name or file of a recipe, or a model directory, whose training is planned.
        device: a card (`rtx4090`, `a100-80gb`), or `cpu`. Default: the device there is.
        devices: how many of them.
        budget: what is spent. Default: the configuration's.
        price: of an hour of all devices.
        exact: compile the chosen step ahead of time for the card, and report the compiler's bytes.
        policies: policies to consider, of `none`, `selective`, `full`, `offload`, and each with `+offload_optimizer`.
            Default: all that the optimizer allows.
        overrides: as for `cramjax.recipe`, when `recipe` is a name.

    Raises:
        ConfigError: the recipe, device or budget cannot be; the budget buys no step; the step fits under no policy; or
            `exact`, and nothing can be compiled for the card here.
    """
    if isinstance(recipe, RunConfig):
        if overrides:
            raise ConfigError(f"{', '.join(overrides)}: give overrides to `recipe`, where the configuration is made.")
        name, config = "run", recipe
    else:
        name, config = named_config(recipe, overrides)
    config = continued(config)
    if budget is not None:
        config = dataclasses.replace(config, budget=budget)
    if not isinstance(device, str | None):
        raise ConfigError(
            f"device must be a card's name or cpu, got {device!r}: give one such as {next(iter(GPUS))!r}, and how many "
            "as devices."
        )
    if isinstance(devices, bool) or not isinstance(devices, int):
        raise ConfigError(f"devices must be a whole number, got {devices!r}.")
    if devices < 1:
        raise ConfigError(f"devices must be at least 1, got {devices}.")
    if price is not None and not 0 <= price < math.inf:
        raise ConfigError(f"price must be at least 0, got {price:g}: give the price of an hour.")
    amount = Budget.parse(config.budget)
    where = device_named(device, devices)
    vocabulary = vocabulary_of(config)
    config = _on(config, devices)
    options = tuple(_options(config, vocabulary, where, policies))
    chosen = _best(config, vocabulary, where, options)
    if where.gpu is None:
        chosen = dataclasses.replace(chosen, speed=_speed_here(chosen.config, vocabulary))
        options = tuple(chosen if option.policy == chosen.policy else option for option in options)
    assert chosen.speed is not None
    least = smallest_budget(chosen.config, chosen.speed, amount.unit)
    if amount.amount < least.amount:
        start = ""
        if amount.unit == "seconds" and chosen.speed.start_seconds:
            start = f", of which compiling and the first state take {chosen.speed.start_seconds:.2g}s"
        about = Budget(float(f"{least.amount:.2g}"), least.unit) if amount.unit == "seconds" else least
        raise ConfigError(
            f"budget {amount} buys no step on {where}: one takes about {about}{start}. Give a larger one."
        )
    sizes = {"vocab_size": vocabulary.vocab_size, "sequence_length": config.data.sequence_length}
    parameters = count_parameters(config.model, **sizes)
    purchase = what_it_buys(
        chosen.config,
        chosen.speed,
        amount,
        parameters=parameters.active,
        tokens_per_epoch=_tokens_per_epoch(config),
        price=price,
    )
    return Plan(
        name=name,
        device=where,
        parameters=parameters.total,
        active_parameters=parameters.active,
        flops_per_token=chosen.speed.flops_per_token,
        options=options,
        chosen=chosen,
        given=config,
        budget=str(amount),
        purchase=purchase,
        price=price,
        exact_device_bytes=exact_bytes(chosen.config, where) if exact else None,
    )


def named_config(recipe: str | Path, overrides: Mapping[str, Any]) -> tuple[str, RunConfig]:
    """The name and the configuration of a recipe, or of a model directory.

    Raises:
        UserError: it is neither, or a field is unknown or impossible.
    """
    if is_model_directory(recipe):
        return Path(recipe).name, model_config(recipe, overrides)
    return recipe_path(recipe).stem, load_recipe(recipe, overrides)


def choose(config: RunConfig, device: Device, policies: Sequence[str]) -> Option:
    """The best of some policies on a device, those that it does not allow left out.

    Args:
        config: the run, as of `plan`.
        device: what it is to fit.
        policies: what to consider.

    Raises:
        ConfigError: none fits.
    """
    config, vocabulary = _on(config, device.count), vocabulary_of(config)
    allowed = [policy for policy in policies if policy in choices(config, device)]
    return _best(config, vocabulary, device, tuple(_options(config, vocabulary, device, allowed)))


def _best(config: RunConfig, vocabulary: Vocabulary, device: Device, options: Sequence[Option]) -> Option:
    """The simplest option within a hundredth of the fastest that fits; on a CPU, where they are not timed, the one that
    recomputes least.
    """
    fitting = [option for option in options if option.fits]
    if not fitting:
        raise ConfigError(_nothing_fits(config, vocabulary, device, options))
    fastest = max(option.tokens_per_second or 0.0 for option in fitting)
    return next(option for option in fitting if (option.tokens_per_second or 0.0) >= 0.99 * fastest)


def choices(config: RunConfig, device: Device) -> list[str]:
    """Policies that an optimizer and a device allow, the cheaper ones first; a CPU has no host to offload to."""
    remats = [remat for remat in get_args(Remat) if device.gpu is not None or remat != "offload"]
    if config.train.offload_optimizer:
        return [f"{remat}+offload_optimizer" for remat in remats]
    walks = config.train.layer_loop != "unroll"
    plain = not config.optim.ema and not config.train.freeze and config.adapter is None
    host = config.optim.traits.offloadable and plain and walks and device.gpu is not None
    return remats + host * [f"{remat}+offload_optimizer" for remat in remats]


def under(config: RunConfig, policy: str) -> RunConfig:
    """A configuration under a policy."""
    remat, _, host = policy.partition("+")
    changes: dict[str, Any] = {"remat": remat}
    if host and not config.train.offload_optimizer:
        changes |= {"offload_optimizer": True, "param_dtype": "bfloat16", "zero": 3}
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def largest_microbatch(config: RunConfig, vocabulary: Vocabulary, device: Device) -> tuple[RunConfig, Memory, bool]:
    """A configuration with the largest microbatch whose step fits the device, or with the smallest if none does.

    A microbatch divides the batch and is shared equally by the devices. LOMO and AdaLomo have no accumulation, so
    theirs is the batch; a batch that is to grow starts at half of its size at most.
    """
    size, dtype = config.batch.size, compute_dtype_of(config, device)
    smallest = 1 if method_of(config).accumulates else size
    largest = size // 2 if config.batch.ramp else size
    sizes = [n for n in range(largest, smallest - 1, -1) if size % n == 0 and n % device.count == 0]
    tried = config, Memory({}), False
    for microbatch in sizes:
        candidate = dataclasses.replace(config, batch=dataclasses.replace(config.batch, microbatch=microbatch))
        memory = estimate_memory(candidate, vocab_size=vocabulary.vocab_size, compute_dtype=dtype, gpu=device.gpu)
        tried = candidate, memory, device.holds(memory)
        if tried[2]:
            break
    if not tried[1].by_kind:
        parts, start = (2, f", {largest} of them as batch.ramp starts") if config.batch.ramp else (1, "")
        raise ConfigError(
            f"batch.size is {size}{start}, which {device.count} devices cannot share equally: make it a multiple of "
            f"{parts * device.count}."
        )
    return tried


def compute_dtype_of(config: RunConfig, device: Device) -> str:
    """The precision of a configuration's products on a device."""
    if config.train.compute_dtype != "auto":
        return config.train.compute_dtype
    return "bfloat16" if device.gpu is not None or machine.fast_bfloat16() else "float32"


def exact_bytes(config: RunConfig, device: Device) -> int:
    """Bytes of a step by the compiler: ahead of time for a card, or for the CPU there is.

    Raises:
        ConfigError: nothing can be compiled for the card here.
    """
    if device.gpu is None:
        return compile_here(config).device_bytes
    return compile_step(config, device.gpu.name, device.count).device_bytes


def _on(config: RunConfig, devices: int) -> RunConfig:
    """A configuration for so many devices: shared by data, unless it says how."""
    if devices > 1 and config.train.fsdp == 1 and config.train.data_parallel is None:
        return dataclasses.replace(config, train=dataclasses.replace(config.train, data_parallel=devices))
    if config.train.data_parallel is None and devices % config.train.fsdp:
        divisors = ", ".join(str(n) for n in range(1, devices + 1) if devices % n == 0)
        raise ConfigError(
            f"train.fsdp must divide the devices, which are {devices}: one of {divisors}, got {config.train.fsdp}."
        )
    shared = (config.train.data_parallel or devices // config.train.fsdp) * config.train.fsdp
    if shared != devices:
        raise ConfigError(
            f"devices is {devices}, but train.data_parallel × train.fsdp is {shared}: make them equal, or leave "
            "train.data_parallel out."
        )
    replaced = dataclasses.replace(config.train, data_parallel=devices // config.train.fsdp)
    return dataclasses.replace(config, train=replaced)


def _options(
    config: RunConfig, vocabulary: Vocabulary, device: Device, policies: Sequence[str] | None
) -> Iterator[Option]:
    allowed = choices(config, device)
    for policy in policies or allowed:
        if policy not in allowed:
            raise ConfigError(
                f"There is no policy {policy!r} for optim.name={config.optim.name} on {device}: choose from "
                f"{', '.join(allowed)}."
            )
        candidate, memory, _ = largest_microbatch(under(config, policy), vocabulary, device)
        speed = None
        if device.gpu is not None:
            speed = estimate_speed(
                candidate,
                vocab_size=vocabulary.vocab_size,
                compute_dtype=compute_dtype_of(config, device),
                gpu=device.gpu,
                devices=device.count,
            )
        yield Option(policy, candidate, memory, device.lacks(memory), speed)


def _nothing_fits(config: RunConfig, vocabulary: Vocabulary, device: Device, options: Sequence[Option]) -> str:
    """By how much a model does not fit, and what would."""
    least = min(options, key=lambda option: option.memory.device_bytes)
    remats = {option.policy.partition("+")[0] for option in options}
    hosted = any("+" in option.policy for option in options)

    def fitting(candidate: RunConfig, where: Device = device) -> list[str]:
        policies = choices(candidate, where)
        return [policy for policy in policies if largest_microbatch(under(candidate, policy), vocabulary, where)[2]]

    def fits(candidate: RunConfig, where: Device = device) -> bool:
        """Whether it does under a policy like those that were to be considered."""
        remat_and_host = (policy.partition("+") for policy in fitting(candidate, where))
        return any(remat in remats and (hosted or not host) for remat, _, host in remat_and_host)

    advice = []
    if others := fitting(config):
        remat, _, host = others[0].partition("+")
        advice.append(f"train.remat={remat}{f' with {_ON_HOST}' * bool(host)}")
    length = config.data.sequence_length
    while length >= 128:
        length //= 2
        if fits(dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=length))):
            advice.append(f"data.sequence_length={length}")
            break
    if method_of(config).accumulates:
        layerwise, whole = _with_adalomo(config, device.count), not config.train.freeze and config.adapter is None
        if config.train.layer_loop != "unroll" and whole and fits(layerwise):
            advice.append("optim.name=adalomo with train.param_dtype=bfloat16 and a batch.size of one microbatch")
        if not config.optim.traits.offloadable:
            plain = dataclasses.replace(config, optim=dataclasses.replace(config.optim, name="adamw"))
            if policies := fitting(plain):
                advice.append(f"optim.name=adamw{f' with {_ON_HOST}' * ('+' in policies[0])}")
    elif config.batch.size > device.count:
        for size in (n for n in range(config.batch.size - 1, 0, -1) if n % device.count == 0):
            if fits(dataclasses.replace(config, batch=dataclasses.replace(config.batch, size=size, microbatch=None))):
                advice.append(f"batch.size={size}")
                break
    if device.count > 1 and config.train.fsdp < device.count:
        shared = dataclasses.replace(config.train, fsdp=device.count, data_parallel=1)
        if fits(dataclasses.replace(config, train=shared)):
            advice.append(f"train.fsdp={device.count}")
    larger = sorted(GPUS, key=lambda key: GPUS[key].memory)
    cards = {
        key: dataclasses.replace(device_named(key, device.count), host_memory=device.host_memory) for key in larger
    }
    card = next((key for key in larger if fits(config, cards[key])), None)
    if card is not None:
        advice.append(f"a card with {format_bytes(GPUS[card].memory)}, such as --device {card}")
    what = "; ".join(advice) or "no single change that is known here does: give a smaller model"
    policy = f"the most frugal policy ({least.policy}, microbatch {least.microbatch})"
    over = least.memory.device_bytes - device.usable
    if over > 0:
        reason = (
            f"of {format_bytes(device.usable)} that a step may take, {policy} needs "
            f"{format_bytes(least.memory.device_bytes)}, {format_bytes(over)} too much"
        )
    else:
        reason = f"{policy} has room on the device, but: {least.lacks}"
    return f"The model does not fit {device}: {reason}. What would fit: {what}."


def _with_adalomo(config: RunConfig, devices: int) -> RunConfig:
    return dataclasses.replace(
        config,
        optim=dataclasses.replace(config.optim, name="adalomo", ema=0.0),
        batch=dataclasses.replace(config.batch, size=devices, microbatch=None, ramp=0.0),
        train=dataclasses.replace(config.train, param_dtype="bfloat16", remat="full", offload_optimizer=False),
    )


def _speed_here(config: RunConfig, vocabulary: Vocabulary) -> Speed:
    """The speed of this CPU: measured, unless a microbatch would take too long for that."""
    flops = flops_per_token(config, vocabulary.vocab_size)
    tokens = (config.batch.microbatch or config.batch.size) * config.data.sequence_length
    dtype = compute_dtype_of(config, device_named("cpu"))
    peak = machine.peak_flops(jax.local_devices(backend="cpu")[0], dtype)
    assert peak is not None, "a CPU's peak is measured"
    seconds = tokens * flops / (_CPU_UTILISATION * peak)
    if seconds < _LONGEST_MICROBATCH:
        return measured_speed(config, vocabulary)
    source = f"{_CPU_UTILISATION:.0%} of this CPU's measured peak, assumed: a microbatch is too long to be timed"
    return Speed(seconds, 0.0, tokens, flops, peak, source=source)


def _tokens_per_epoch(config: RunConfig) -> float | None:
    prepared = prepared_already(config.data, config.tokenizer)
    return None if prepared is None else float(len(prepared.train.tokens))
