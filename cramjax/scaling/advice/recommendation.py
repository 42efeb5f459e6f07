"""A whole run for a budget: a fit's advice as a configuration that trains, with the planner's speed for a device."""

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from cramjax.budget import Budget
from cramjax.config import RunConfig
from cramjax.errors import ConfigError
from cramjax.planning.plan import plan
from cramjax.planning.steps import vocabulary_of
from cramjax.scaling.advice.advice import Advice, advise
from cramjax.scaling.advice.rules import with_decay_for
from cramjax.scaling.fit.scaling_fit import ScalingFit
from cramjax.scaling.fit.table import SIX_ND
from cramjax.scaling.shapes import TOLERANCE, Count, parameters_of, shape_for
from cramjax.show.numbers import Interval, ends
from cramjax.show.values import Viewed
from cramjax.training.parts import flops_per_token
from cramjax.validation import validate

if TYPE_CHECKING:
    from cramjax.show.tables import Page

_ROUNDS = 12
_CLOSE = 1e-3
_NEAR = 0.25
"""How far a shape may be from the size advised: the loss hardly changes so near the best size, and small families have
few shapes."""


@dataclass(frozen=True, repr=False)
class Recommendation(Viewed):
    """What to train for a budget.

    Attributes:
        config: the run, to train with.
        advice: of the fit, for the FLOPs that the budget buys.
        params: parameters of the run's model, all of them.
        params_counted: the same, counted as in the fit's table.
        tokens: what the run will see.
        bits_per_byte: to be expected, with its 95% interval; None where the fit does not know tokens per byte.
        device: what the throughput is of; None where the budget needs none.
        tokens_per_second: by the planner, over the whole budget.
        warnings: what a reader should know.
    """

    config: RunConfig
    advice: Advice
    params: int
    params_counted: int
    tokens: float
    bits_per_byte: tuple[float, Interval] | None
    device: str | None
    tokens_per_second: float | None
    warnings: tuple[str, ...]

    def json(self) -> dict[str, Any]:
        """All of it as plain values."""
        bits = self.bits_per_byte
        return {
            "params": self.params,
            "params_counted": self.params_counted,
            "tokens": self.tokens,
            "bits_per_byte": None if bits is None else bits[0],
            "bits_per_byte_interval": None if bits is None else ends(bits[1]),
            "device": self.device,
            "tokens_per_second": self.tokens_per_second,
            "advice": self.advice.json(),
            "warnings": list(self.warnings),
            "config": dataclasses.asdict(self.config),
        }

    def __rich__(self) -> "Page":
        from cramjax.scaling.advice.show_recommendation import page

        return page(self)


def recommend(
    fit: ScalingFit,
    base: RunConfig,
    budget: str,
    *,
    device: str | None = None,
    devices: int = 1,
    tuned_at: str | None = None,
) -> Recommendation:
    """The run that a budget buys the lowest loss with, by a fit.

    A time budget buys as many tokens as the planner says a device processes at the size advised, and the size advised
    depends on that: both are repeated until they agree. A token budget is taken as the best number of tokens of some
    size, which is then advised. Counts of parameters and FLOPs are those of the fit's table.

    Args:
        fit: from `fit_scaling` or `read_fit`.
        base: the family of models, and hyperparameters that are right for `tuned_at`.
        budget: a time, tokens or FLOPs.
        device: as of `plan`; the device there is, for a time budget.
        devices: how many of them.
        tuned_at: budget that the base's batch and decay are right for. Default: the base's own, where that is known
            without a device (not a time), or a device is named.

    Raises:
        ConfigError: a budget of steps; no shape of the family has the size; nothing fits the device.
    """
    amount = Budget.parse(budget)
    if amount.unit == "steps":
        raise ConfigError(f"budget is {budget}, but a step is as long as its batch: give a time, tokens or FLOPs.")
    count: Count = "params_non_embedding" if fit.runs.columns.params == "params_non_embedding" else "params"
    timed = amount.unit == "seconds"
    # What the base was tuned at needs a device if it is a time, and so does the plan, if one is asked for.
    planned = timed or device is not None
    on = partial(plan, device=device, devices=devices)
    tuned = _flops_of(tuned_at or base.budget, base, fit, count, on if planned else None)
    shaped = partial(_shaped, base=base, fit=fit, count=count, tuned=tuned)
    warnings = []
    if tuned is None:
        warnings.append(
            f"batch and decay time are the base's: its budget, {base.budget}, is worth so many FLOPs on some device. "
            "Name it, or give tuned_at."
        )
    if timed:
        advice, config, made = _fixed_point(fit, base, budget, shaped, on, count)
        tokens = made.purchase.tokens
    else:
        flops = amount.amount if amount.unit == "flops" else _flops_for_tokens(fit, amount.amount)
        advice = advise(fit, flops=flops)
        config = shaped(advice)
        tokens = amount.amount if amount.unit == "tokens" else flops / _flops_per_token(config, fit, count)
        config = dataclasses.replace(config, budget=f"{round(tokens)}tok")
        made = on(config) if planned else None
        config = config if made is None else made.config
    validate(config)
    counted = parameters_of(config)
    size = counted.blocks if count == "params_non_embedding" else counted.total
    if abs(size / advice.params - 1) > TOLERANCE:
        warnings.append(f"the fit says {advice.params:,.0f} parameters; the nearest model of this family has {size:,}.")
    bits = fit.runs.bits_per_byte_of
    if bits is None:
        warnings.append("bits per byte are not known: the fit's table has no column bits_per_byte beside its loss.")
    else:
        interval = advice.intervals["loss"]
        bits = bits * advice.loss, (bits * interval[0], bits * interval[1])
    return Recommendation(
        config=config,
        advice=advice,
        params=counted.total,
        params_counted=size,
        tokens=tokens,
        bits_per_byte=bits,
        device=None if made is None else str(made.device),
        tokens_per_second=None if made is None else made.purchase.tokens_per_second,
        warnings=(*advice.warnings, *warnings),
    )


def _fixed_point(fit: ScalingFit, base: RunConfig, budget: str, shaped: Any, on: Any, count: Count) -> Any:
    """Advice, configuration and plan that agree: the plan's tokens are worth the FLOPs that the advice is for."""
    made = on(dataclasses.replace(base, budget=budget))
    config, flops = made.config, 0.0
    seen: set[Any] = set()
    for _ in range(_ROUNDS):
        before, flops = flops, made.purchase.tokens * _flops_per_token(config, fit, count)
        advice = advise(fit, flops=flops)
        config = dataclasses.replace(shaped(advice), budget=budget)
        close = before and abs(math.log(flops / before)) < _CLOSE
        # Sizes are steps: two shapes may each point to the other.
        settled = close or config.model in seen
        seen.add(config.model)
        made = on(config)
        config = made.config
        if settled:
            break
    return advice, config, made  # pyright: ignore[reportPossiblyUnboundVariable]


def _shaped(advice: Advice, *, base: RunConfig, fit: ScalingFit, count: Count, tuned: float | None) -> RunConfig:
    """The base at the advised size, with batch, rates and decay for it."""
    config = shape_for(advice.params, base, count=count, flops=advice.flops, tuned_at=tuned, tolerance=_NEAR)
    longer = None
    if tuned is not None:
        batches = [
            flops / _flops_per_token(run, fit, count) / run.batch.size
            for flops, run in ((advice.flops, config), (tuned, base))
        ]
        longer = batches[0] / batches[1]
    return dataclasses.replace(config, optim=with_decay_for(base.optim, config.optim, longer))


def _flops_of(budget: str, config: RunConfig, fit: ScalingFit, count: Count, on: Any) -> float | None:
    """FLOPs of a budget spent on a configuration, counted as in the fit's table; None: a time, and no device."""
    amount = Budget.parse(budget)
    each = _flops_per_token(config, fit, count)
    match amount.unit:
        case "flops":
            return amount.amount
        case "tokens":
            return amount.amount * each
        case "steps":
            return amount.amount * config.batch.size * config.data.sequence_length * each
        case "seconds":
            return None if on is None else on(dataclasses.replace(config, budget=budget)).purchase.tokens * each


def _flops_per_token(config: RunConfig, fit: ScalingFit, count: Count) -> float:
    """Training FLOPs of a token, counted as in the fit's table."""
    if fit.runs.columns.flops == SIX_ND:
        counted = parameters_of(config)
        return 6.0 * (counted.blocks if count == "params_non_embedding" else counted.total)
    return flops_per_token(config, vocabulary_of(config).vocab_size)


def _flops_for_tokens(fit: ScalingFit, tokens: float) -> float:
    """The budget whose best use is so many tokens."""
    flops = float(fit.runs.flops.max())
    for _ in range(50):
        ratio = tokens / advise(fit, flops=flops).tokens
        flops *= ratio ** (1 / fit.b)
        if abs(math.log(ratio)) < _CLOSE:
            break
    return flops
