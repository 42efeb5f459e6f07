"""What a model makes of the end of a walk: the loss of predictions, or logits, by the cross entropy kernels."""

from typing import Any

import jax
from jaxtyping import Array, Float, Int, PyTree

from cramjax.kernels.cross_entropy import (
    CrossEntropySums,
    Tail,
    adaptive_cross_entropy_sum,
    adaptive_logits,
    cross_entropy_sum,
    head_logits,
)
from cramjax.kernels.packed import Streamed, unpacked
from cramjax.model.stack import Stack


def loss_sums(
    stack: Stack,
    params: PyTree,
    hidden: Float[Array, "tokens embed"],
    targets: Int[Array, " tokens"],
    token_weights: Float[Array, " tokens"] | None = None,
    *,
    z_loss: float = 0.0,
) -> CrossEntropySums:
    """Summed cross entropy of predictions; see `cramjax.kernels.cross_entropy`.

    Args:
        params: all parameters.
        hidden: from `hidden` (tokens, embed).
        targets: true token ids (tokens,).
        token_weights: weight of each token in the sums. Default: 1.
        z_loss: weight of the squared log-partition.
    """
    arguments = {"targets": targets, "token_weights": token_weights, "z_loss": z_loss, **_decoder(stack, params)}
    with jax.named_scope("cross_entropy"):
        if stack.sizes.tails:
            return adaptive_cross_entropy_sum(hidden, **arguments)
        return cross_entropy_sum(hidden, **arguments, tied=stack.config.tied)


def logits(stack: Stack, params: PyTree, hidden: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
    """Logits of the real vocabulary, float32; of an adaptive softmax, log-probabilities.

    Args:
        params: all parameters.
        hidden: from `hidden` or `decode`.
    """
    compute = adaptive_logits if stack.sizes.tails else head_logits
    return compute(hidden, **_decoder(stack, params))[..., : stack.vocab_size]


def _decoder(stack: Stack, params: PyTree) -> dict[str, Any]:
    """The decoder as arguments of the cross entropy kernels."""
    head, own = params["head"], params["head"].get("decoder", {})
    table = params["embed"]["token"]["table"]
    if stack.config.tied:
        weight = table if isinstance(table, Streamed) else unpacked(table).T
    else:
        weight = own["kernel"] if isinstance(own["kernel"], Streamed) else unpacked(own["kernel"])
    arguments: dict[str, Any] = {
        "weight": weight,
        "softcap": stack.config.logit_softcap,
        "vocab_size": stack.vocab_size,
    }
    if not stack.sizes.tails:
        return arguments | {"bias": own.get("bias")}
    tails = [head[f"tail{index}"] for index in range(len(stack.sizes.tails))]
    matrices = [(unpacked(t["down"]["kernel"]), unpacked(t["decoder"]["kernel"])) for t in tails]
    return arguments | {"tails": [Tail(*pair) for pair in matrices]}
