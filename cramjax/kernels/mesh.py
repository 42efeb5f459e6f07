"""Kernels under a mesh whose devices share parameters and sequences: what each device computes, and what it fetches.

Left to itself the compiler moves activations to the weights, whatever the batch. Here weights come to the activations,
one layer at a time. The mesh is that of the context a function is traced in; without one, nothing here does anything.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Num, PyTree


@jax.custom_vjp
def whole(x: Num[Array, "*shape"]) -> Num[Array, "*shape"]:
    """A parameter that devices may share, gathered on each of them; its gradient is laid out as the caller wants it."""
    return jax.lax.with_sharding_constraint(x, PartitionSpec()) if mesh_axes() else x


# A constraint's own derivative would make the gradient whole on every device too.
whole.defvjp(lambda x: (whole(x), None), lambda _, g: (g,))


def by_token(function: Callable[..., tuple[PyTree, PyTree]], shared: PyTree, tokens: PyTree) -> tuple[PyTree, PyTree]:
    """Let each device of the mesh compute its own tokens, and sum what is summed over all of them once, at the end.

    Args:
        function: `(shared, tokens) -> (sums, per token)`: pytrees of arrays; sums over all tokens given, and arrays
            with a first axis of tokens.
        shared: arrays that every device reads whole.
        tokens: arrays with a first axis of tokens. A number of them that the devices cannot share is not shared.
    """
    axes = mesh_axes()
    devices = jax.sharding.get_abstract_mesh().size if axes else 1
    if devices == 1 or len(jax.tree.leaves(tokens)[0]) % devices:
        return function(shared, tokens)

    def own(shared: PyTree, tokens: PyTree) -> tuple[PyTree, PyTree]:
        sums, each = function(shared, tokens)
        return jax.tree.map(lambda x: x[None], sums), each

    rows = PartitionSpec(axes)
    mapped = jax.shard_map(own, in_specs=(PartitionSpec(), rows), out_specs=rows, check_vma=False)
    sums, each = mapped(shared, tokens)
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), sums), each


def each_its_tokens(
    function: Callable[[PyTree, PyTree], Array], shared: PyTree, tokens: PyTree
) -> Num[Array, "tokens *rest"]:
    """Let each device of the mesh compute its own tokens, of which none needs another; JAX finds the derivative.

    Args:
        function: `(shared, tokens) -> per token`: an array with a first axis of tokens.
        shared: parameters that devices may share, gathered on each of them.
        tokens: as of `by_token`.
    """
    axes = mesh_axes()
    devices = jax.sharding.get_abstract_mesh().size if axes else 1
    if devices == 1 or len(jax.tree.leaves(tokens)[0]) % devices:
        return function(shared, tokens)
    rows = PartitionSpec(axes)
    mapped = jax.shard_map(function, in_specs=(PartitionSpec(), rows), out_specs=rows, check_vma=False)
    return mapped(jax.tree.map(whole, shared), tokens)


def mesh_axes() -> tuple[str, ...]:
    """Axes of the mesh that this is traced for, if the compiler is to divide the work over them."""
    mesh = jax.sharding.get_abstract_mesh()
    return () if mesh.empty or mesh.size == 1 or mesh.manual_axes else mesh.axis_names
