"""µP's coordinate check: do activations move by as much at any width, once training has started?

A few steps on one batch at several widths; the slope of log mean |change| over log width is 0 where the parametrisation
is right (Yang et al. 2022, arXiv:2203.03466, section 5 and figure 5).
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from cramjax.config import ModelConfig, RunConfig
from cramjax.errors import ConfigError
from cramjax.model import Model, make_model, objective_for, repeats_of
from cramjax.optim import Optimizer
from cramjax.show.values import Viewed
from cramjax.training.parts import optimizer_for
from cramjax.training.step import Batch, State, initial_state, make_step
from cramjax.validation import validate

if TYPE_CHECKING:
    from cramjax.show.figures import Plot
    from cramjax.show.tables import Page


@dataclass(frozen=True, eq=False, repr=False)
class CoordinateCheck(Viewed):
    """How large activations are, and by how much they have moved, at each width and step.

    Attributes:
        widths: the models' widths.
        names: of the activations: the embedding, each block's output (the residual stream), the logits.
        sizes: mean |x|, after 0, 1, … steps.
        changes: mean |x − x₀|, where x₀ is x before the first step.
    """

    widths: tuple[int, ...]
    names: tuple[str, ...]
    sizes: Float[np.ndarray, "width step name"]
    changes: Float[np.ndarray, "width step name"]

    @property
    def slopes(self) -> dict[str, float]:
        """Slope of log mean |x − x₀| over log width after the last step, by name; 0: it does not depend on width."""
        slopes = np.polyfit(np.log(self.widths), np.log(self.changes[:, -1]), 1)[0]
        return dict(zip(self.names, slopes.tolist(), strict=True))

    def plot(self) -> "Plot":
        """Mean change by width, a panel for each activation and a line for each step."""
        from cramjax.scaling.coordinates_show import changes_by_width

        return changes_by_width(self)

    def __rich__(self) -> "Page":
        from cramjax.scaling.coordinates_show import table

        return table(self)


def coordinate_check(
    config: RunConfig,
    widths: Sequence[int] = (64, 128, 256, 512),
    *,
    steps: int = 4,
    vocab_size: int = 256,
    seeds: int = 3,
) -> CoordinateCheck:
    """Train models of several widths for a few steps at the peak rate, and see whether activations move alike.

    The decoder is a matrix of its own here and starts at zero, as the authors advise (appendix D.2): the part of the
    logits that a random start makes falls as width^-½ under µP, and would hide how they move by learning.

    Args:
        config: the run; `batch.size` sequences of `data.sequence_length` random tokens are one batch for all steps.
            `model.mup_base_width` says whether it is of µP.
        widths: of the models; `widened` makes them of the configured one.
        steps: of the optimizer; the first moves the decoder alone.
        vocab_size: of the random tokens.
        seeds: models of each width that the means are over.

    Raises:
        ConfigError: fewer than two widths, one that the model cannot have, or fewer than two steps.
    """
    if len(set(widths)) < 2 or steps < 2 or seeds < 1:
        raise ConfigError(
            "a coordinate check needs two widths or more and at least two steps and one seed, got widths "
            f"{list(widths)}, {steps} steps, {seeds} seeds."
        )
    own = config.optim
    head_lr = own.embed_lr if config.model.tied else own.head_lr
    optim = dataclasses.replace(own, schedule="constant", warmup=0.0, ema=0.0, head_lr=head_lr)
    base = dataclasses.replace(config.model, tied=False)
    tokens = jax.random.randint(
        jax.random.key(config.seed), (config.batch.size, config.data.sequence_length), 2, vocab_size, jnp.int32
    )
    measured = []
    for width in sorted(set(widths)):
        wide = dataclasses.replace(config, model=widened(base, width), optim=optim)
        validate(wide)
        measured.append(_measure(wide, tokens, vocab_size, steps, seeds))
    sizes, changes = map(np.asarray, np.moveaxis(np.asarray(measured), 1, 0))
    names = ("embedding", *(f"block {layer}" for layer in range(repeats_of(base))), "logits")
    return CoordinateCheck(tuple(sorted(set(widths))), names, sizes, changes)


def widened(model: ModelConfig, width: int) -> ModelConfig:
    """A model at another width, all else in proportion: its feed-forward layer, and its heads.

    Heads keep their width and change in number, unless `mup_base_head_dim` says that they change in width.

    Args:
        model: the architecture.
        width: the new width.

    Raises:
        ConfigError: a size that would not be a whole number.
    """

    def scaled(name: str, value: int) -> int:
        if value * width % model.width:
            raise ConfigError(
                f"a model of width {model.width} with {name}={value} cannot be made {width} wide: {value} · {width} / "
                f"{model.width} is not a whole number. Choose another width."
            )
        return value * width // model.width

    head_dim = model.head_dim or model.width // model.heads
    changed: dict[str, Any] = {"width": width, "mlp": scaled("mlp", model.mlp)}
    if model.mup_base_head_dim is not None:
        return dataclasses.replace(model, **changed, head_dim=scaled("head_dim", head_dim))
    heads = scaled("heads", model.heads)
    kv_heads = None if model.kv_heads is None else scaled("kv_heads", model.kv_heads)
    return dataclasses.replace(model, **changed, heads=heads, kv_heads=kv_heads, head_dim=head_dim)


def _measure(
    config: RunConfig, tokens: Int[Array, "batch seq"], vocab_size: int, steps: int, seeds: int
) -> Float[np.ndarray, "2 step name"]:
    """Mean |x| and mean |x − x₀| of each activation, after 0, 1, … steps."""
    model = make_model(
        config.model,
        vocab_size=vocab_size,
        sequence_length=tokens.shape[1],
        causal=config.objective.kind == "causal",
        separator_id=0,
        layer_loop="scan",
    )
    optimizer = optimizer_for(config, model)
    assert isinstance(optimizer, Optimizer)  # `validate` has refused LOMO and AdaLomo with µP
    step = make_step(objective_for(config.objective, model, mask_id=1), optimizer)
    batch = Batch(tokens[None], jnp.ones((), jnp.int32))

    @jax.jit
    def run(seed: Array) -> Array:
        params = model.init(jax.random.key(seed))
        params["head"]["decoder"]["kernel"] *= 0
        state = initial_state(params, optimizer, 0)
        first = _activations(model, state.params, tokens)

        def look(params: PyTree) -> Array:
            now = _activations(model, params, tokens)
            means = [(jnp.abs(x).mean(), jnp.abs(x - start).mean()) for x, start in zip(now, first, strict=True)]
            return jnp.asarray(means).T

        def one(state: State, _: None) -> tuple[State, Array]:
            state = step(state, batch, jnp.zeros(()))[0]
            return state, look(state.params)

        seen = jax.lax.scan(one, state, None, length=steps)[1]
        return jnp.concatenate([look(state.params)[None], seen]).swapaxes(0, 1)

    return np.mean([run(jnp.asarray(seed)) for seed in range(seeds)], 0)


def _activations(model: Model, params: PyTree, tokens: Int[Array, "batch seq"]) -> list[Array]:
    """The embedding, the residual stream after each block, and the logits."""
    x, context = model.embed(params, tokens)

    def step(x: Array, item: tuple[PyTree, Array]) -> tuple[Array, Array]:
        x = model.block(item[0], x, context, item[1])
        return x, x

    last, streams = jax.lax.scan(step, x, (params["blocks"], jnp.arange(model.repeats)))
    return [x, *streams, model.logits(params, model.head(params, last))]
