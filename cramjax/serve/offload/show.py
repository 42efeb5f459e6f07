"""A plan of offloaded generation for the eye: a table of batches, and sentences."""

from typing import TYPE_CHECKING

from cramjax.serve.offload.cost_model import Policy, Shares
from cramjax.show.numbers import format_bytes, format_count, format_seconds
from cramjax.show.tables import Grid, Page, Row

if TYPE_CHECKING:
    from cramjax.serve.offload.plan import OffloadPlan

_COLUMNS = ("rows × batches", "weights", "cache", "activations", "tok/s")


def page(plan: "OffloadPlan") -> Page:
    """The best block of each size of a batch, and what the chosen one takes."""
    chosen = plan.policy
    rows = [
        Row(
            (
                f"{found.policy.batch} × {found.policy.batches}",
                *_divided(found.policy),
                f"{found.tokens_per_second:.3g}",
            ),
            "bold" if found.policy.batch == chosen.batch else "",
        )
        for found in plan.considered
    ]
    title = f"{plan.name}: {format_bytes(plan.model_bytes)} of weights; shares on device/host/disk"
    weights, cache, hidden = _divided(chosen)
    memory, limits = plan.memory, plan.limits
    return Page(
        [
            Grid(title, _COLUMNS, rows),
            f"Chosen: batches of {chosen.batch} rows, {chosen.batches} for each pass over the weights. As whole "
            f"tensors and rows: weights {weights}, cache {cache}, activations {hidden}.",
            f"Memory: device {format_bytes(memory.device)} of {format_bytes(limits.device)}, host "
            f"{format_bytes(memory.host)} of {format_bytes(limits.host)}, disk {format_bytes(memory.disk)}. What "
            "Python, JAX and compiled programs take comes on top, as with any model.",
            f"{format_count(plan.prompts)} prompts of at most {plan.prompt} tokens, {plan.output} more for each: "
            f"{plan.tokens_per_second:.3g} tokens/s, {format_seconds(plan.seconds)}, by constants measured here (the "
            f"disk reads {format_bytes(plan.disk.read)}/s).",
        ],
        width=110,
    )


def _divided(policy: Policy) -> list[str]:
    def words(shares: Shares) -> str:
        return f"{shares.device:.0%}/{shares.host:.0%}/{shares.disk:.0%}"

    return [words(shares) for shares in (policy.weights, policy.cache, policy.hidden)]
