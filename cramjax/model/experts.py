"""Experts: several feed-forward layers in the place of one, and a router that sends each token to a few of them.

What keeps them equally busy goes through no walk: the block's result is handed on as it is, and on the way back the
router's losses, and the loads of its experts, come beside its gradient (`_beside`). So whatever differentiates a block
trains its router.
"""

import abc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from cramjax import devices
from cramjax.config import Activation, ModelConfig
from cramjax.experts import ExpertsConfig
from cramjax.kernels.activation import activate
from cramjax.kernels.grouped import Arrangement, arrange, arrange_within, combine, dispatch, grouped, rows_of_block
from cramjax.kernels.mesh import each_its_tokens
from cramjax.model.layers import Context, FeedForward, Kernel, declare
from cramjax.model.remat import CHOICES
from cramjax.model.sizes import Sizes
from cramjax.model.weights import Constant, Normal, Weight

LOAD_UNIT = 2.0**-30
"""What a token too many is in the place of a gradient, by a router's bias: too little for a norm to tell, and a power
of two, so that sums over microbatches are exact."""


class Chooser(abc.ABC):
    """What may stand in the place of a router's bias, and has the last word on the choice. It is a pytree."""

    base: Any
    """The bias."""

    @abc.abstractmethod
    def taken(self, chosen: Int[Array, "tokens active"]) -> Int[Array, "tokens active"]:
        """The experts that tokens go to.

        Args:
            chosen: those that the bias itself would choose.
        """


def choose(
    scores: Float[Array, "tokens experts"], bias: Float[Array, " experts"] | Chooser, active: int
) -> Int[Array, "tokens active"]:
    """The experts of each token: those of the highest scores with the bias, which has a part in the choice alone.

    Args:
        scores: of experts for tokens.
        bias: of experts.
        active: how many each token goes to.

    Source: DeepSeek-AI 2024, arXiv:2412.19437, equation 16.
    """
    if isinstance(bias, Chooser):
        return bias.taken(choose(scores, bias.base, active))
    return jax.lax.top_k(jax.lax.stop_gradient(scores + bias.astype(jnp.float32)), active)[1]


class Router(nnx.Module):
    """Scores of experts for tokens, and the choice of some, in float32."""

    def __init__(self, config: ModelConfig, sizes: Sizes, rngs: nnx.Rngs | None) -> None:
        experts, std = _of(config), sizes.std(config.width)
        kernel = Weight((config.width, experts.number), ("embed", "expert"), "router", Normal(std))
        self.kernel = declare(kernel, rngs)
        rate = experts.balance_rate if experts.balance == "bias" else 0.0
        self.bias = declare(Weight((experts.number,), ("expert",), "balance", Constant(0.0), rate=rate), rngs)
        self.config = experts

    def __call__(
        self, x: Float[Array, "tokens embed"], real: Float[Array, " tokens"] | None
    ) -> tuple[Int[Array, "tokens active"], Float[Array, "tokens active"], Callable[[Array], Array]]:
        """Choose.

        Args:
            x: what experts read.
            real: 0 at padding, which counts for nobody's load; None: all are 1.

        Returns:
            Experts of each token, the weights of what they give, and what hands a result on with the router's losses
            and loads beside it.
        """
        config, held = self.config, self.bias[...]
        bias = held.base if isinstance(held, Chooser) else held
        logits = jnp.dot(x.astype(jnp.float32), self.kernel[...].astype(jnp.float32), precision="highest")
        scores = jax.nn.softmax(logits) if config.scores == "softmax" else jax.nn.sigmoid(logits)
        chosen = checkpoint_name(choose(scores, held, config.active), CHOICES)
        gates = jnp.take_along_axis(scores, chosen, axis=1)
        if config.normalised:
            gates = gates / jnp.sum(gates, axis=1, keepdims=True)
        weights = jnp.ones(len(x)) if real is None else real
        count = jnp.maximum(jnp.sum(weights), 1.0)
        loads = jnp.einsum("tke,t->e", jax.nn.one_hot(chosen, config.number), weights)
        loss = config.z_loss * jnp.sum(weights * jnp.square(jax.nn.logsumexp(logits, axis=1)))
        if config.balance == "loss":
            shares = jnp.einsum("te,t->e", scores / jnp.sum(scores, axis=1, keepdims=True), weights) / count
            loss = loss + config.balance_loss * config.number * jnp.sum(loads / config.active * shares)
        over = (LOAD_UNIT * (loads - jnp.mean(loads))).astype(bias.dtype)
        return chosen, gates, lambda y: _beside(y, bias, over, loss)


class Experts(nnx.Module):
    """The feed-forward layers that each token's router chooses, and the one that all tokens share."""

    def __init__(self, config: ModelConfig, sizes: Sizes, *, dtype: str, rngs: nnx.Rngs | None) -> None:
        experts, width, inner = _of(config), config.width, sizes.expert
        up = sizes.up_of(inner)
        self.router = Router(config, sizes, rngs)
        first = Weight(
            (experts.number, width, sum(up)),
            ("expert", "embed", "mlp"),
            "matrix",
            Normal(sizes.std(width)),
            up if len(up) > 1 else (),
        )
        second = Weight(
            (experts.number, inner, width), ("expert", "mlp", "embed"), "matrix", Normal(sizes.output_std(inner))
        )
        self.up, self.down = Kernel(first, rngs), Kernel(second, rngs)
        self.shared = FeedForward(config, sizes, sizes.shared, dtype=dtype, rngs=rngs) if sizes.shared else None
        gate = Weight((width, 1), ("embed", "rank"), "router", Normal(sizes.std(width)))
        self.shared_gate = Kernel(gate, rngs) if experts.shared_gate else None
        self.activation: Activation = config.activation
        self.config, self.dtype = experts, dtype

    def __call__(self, x: Float[Array, "batch seq embed"], context: Context) -> Float[Array, "batch seq embed"]:
        """Transform each token by its experts, which may have a capacity in training alone."""
        rows = x.reshape(-1, x.shape[-1])
        real = None if context.kv_mask is None else context.kv_mask.reshape(-1).astype(jnp.float32)
        with jax.named_scope("router"):
            chosen, gates, beside = self.router(rows, real)
        capacity = None if context.rng is None else self.config.capacity
        if capacity is not None and real is not None:  # padding takes nobody's room
            chosen = jnp.where(real[:, None] > 0, chosen, self.config.number)

        def own(matrices: tuple[Any, Any], tokens: tuple[Array, Array, Array]) -> Array:
            rows, chosen, gates = tokens
            made = _arranged(chosen, self.config.number, capacity)
            up = checkpoint_name(grouped(dispatch(rows, made), matrices[0], made.groups, dtype=self.dtype), "up")
            down = grouped(activate(self.activation, up), matrices[1], made.groups, dtype=self.dtype)
            return combine(checkpoint_name(down, "down"), gates, made)

        y = each_its_tokens(own, (self.up.kernel[...], self.down.kernel[...]), (rows, chosen, gates))
        y = beside(y).reshape(x.shape)
        return y if self.shared is None else y + self._of_all(x, self.shared)

    def _of_all(self, x: Float[Array, "batch seq embed"], shared: FeedForward) -> Float[Array, "batch seq embed"]:
        """What all tokens are given."""
        y = shared(x)
        if self.shared_gate is None:
            return y
        kernel = self.shared_gate.kernel[...].astype(jnp.float32)
        gate = jax.nn.sigmoid(jnp.dot(x.astype(jnp.float32), kernel, precision="highest"))
        return (gate * y.astype(jnp.float32)).astype(y.dtype)


def _arranged(chosen: Array, experts: int, capacity: float | None) -> Arrangement:
    if capacity is not None:
        return arrange_within(chosen, experts, max(1, -int(-capacity * chosen.size // experts)))
    return arrange(chosen, experts, rows_of_block(devices.target().platform, chosen.size, experts))


@jax.custom_vjp
def _beside(
    y: Float[Array, "tokens embed"], bias: Float[Array, " experts"], over: Float[Array, " experts"], loss: Array
) -> Float[Array, "tokens embed"]:
    """The result as it is. On the way back `loss` is added to what is summed, and `over` is the bias's gradient.

    Source: Megatron-LM (code, `MoEAuxLossAutoScaler`), for the loss.
    """
    del bias, over, loss
    return y


_beside.defvjp(
    lambda y, bias, over, loss: (y, over),
    lambda over, g: (g, over, jnp.zeros_like(over), jnp.ones(())),
)


def _of(config: ModelConfig) -> ExpertsConfig:
    assert config.experts is not None, "a model with experts"
    return config.experts
