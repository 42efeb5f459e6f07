"""Rematerialisation: what the backward pass of a block finds kept, and what it computes again.

Layers name what is worth keeping with `checkpoint_name`, which is the identity in a compiled program; a policy here
says what becomes of the names. Any walk over the stack wraps its block with `remat_block`.
"""

from collections.abc import Callable
from typing import Any

import jax

from cramjax.config import Remat

BLOCK_INPUT = "block_input"
"""The residual stream that a block reads."""
PRODUCTS = ("qkv", "attention_out", "up", "down")
"""Results of a block's dense layers. Attention's own result is not among them: keeping it would save one forward pass
of a fused kernel, and cost a tenth more memory. What the backward pass does not need is not kept, such as the last
product of a block that adds it to its stream."""

CHOICES = "choices"
"""Which experts each token goes to: computed again, rounding might send it elsewhere than what is kept was sent."""


def remat_block(block: Callable[..., Any], policy: Remat, *, scanned: bool = False) -> Callable[..., Any]:
    """A block that keeps for its backward pass what a policy says, and recomputes the rest.

    Args:
        block: a pure function such as `Model.block`.
        policy: `none` keeps all; `selective` the products; `full` nothing but the arguments; `offload` holds the
            products and the residual stream in pinned host memory, and on the device one block's at a time.
        scanned: the forward and the backward pass are loops of their own, as `jax.lax.scan` makes them. Anywhere else
            the compiler would find that it has computed everything before, and keep it.
    """
    if policy == "none":
        return block
    return jax.checkpoint(block, prevent_cse=not scanned, policy=_POLICIES[policy])


_keeping = jax.checkpoint_policies
_POLICIES: dict[Remat, Callable[..., Any] | None] = {
    "full": None,
    "selective": _keeping.save_only_these_names(*PRODUCTS, CHOICES),
    "offload": _keeping.save_and_offload_only_these_names(
        names_which_can_be_saved=[CHOICES],
        names_which_can_be_offloaded=[BLOCK_INPUT, *PRODUCTS],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
