"""A recommendation for the eye: the run beside the fit's best, and the rules that carried settings to its size."""

from cramjax.scaling.advice.recommendation import Recommendation
from cramjax.scaling.advice.rules import RULES
from cramjax.scaling.advice.show import best_of
from cramjax.show.numbers import number, span
from cramjax.show.tables import Grid, Page, warning


def page(made: Recommendation) -> Page:
    """The run beside the fit's best, warnings, and the rules that carried settings to its size."""
    found, model, optim, batch = made.advice, made.config.model, made.config.optim, made.config.batch
    rates = {"embeddings": optim.embed_lr, "head": optim.head_lr, "scalars": optim.scalar_lr}
    others = "".join(f", {name} {rate:g}" for name, rate in rates.items() if rate is not None)
    micro = f" ({batch.microbatch} at a time)" if batch.microbatch else ""
    rows = [
        ["parameters", f"{made.params_counted:,}", *best_of(found, "params")],
        ["tokens", number(made.tokens), *best_of(found, "tokens")],
        ["loss", "", *best_of(found, "loss")],
    ]
    if made.bits_per_byte is not None:
        value, interval = made.bits_per_byte
        rows.append(["bits per byte", "", number(value, interval), span(interval)])
    chosen = {
        "layers × width": f"{model.layers} × {model.width}",
        "heads, feed-forward": f"{model.heads}, {model.mlp}",
        "batch": f"{batch.size} sequences of {made.config.data.sequence_length}{micro}",
        "learning rate": f"{optim.lr:g}{others}",
        "weight decay": f"{optim.weight_decay:g}",
    }
    if made.tokens_per_second is not None:
        chosen["tokens/s"] = f"{made.tokens_per_second:,.0f} on {made.device}, by the planner"
    rows += [[name, value, "", ""] for name, value in chosen.items()]
    flops = f"{found.flops:.3g} FLOPs as the fit's table counts them"
    title = f"{made.config.budget}, {flops}, by the {found.source} fit"
    table = Grid(title, ["", "this run", "the fit's best", "95% interval"], rows, plain=True)
    return Page([table, *map(warning, made.warnings), *(f"rule: {rule}" for rule in RULES)])
