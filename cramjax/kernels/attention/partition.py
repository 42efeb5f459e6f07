"""A kernel on a mesh: the compiler cannot look into it, so it is told here that sequences are independent."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning


def by_sequence(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let each device of a mesh compute the sequences it holds.

    Args:
        function: takes one static argument and arrays (or None) whose first axis is the batch; returns such arrays.
    """
    split = custom_partitioning(function, static_argnums=(0,))

    def partition(static: Any, mesh: Any, arguments: Any, results: Any) -> tuple[Any, Callable[..., Any], Any, Any]:
        def shardings(tree: Any) -> Any:
            return jax.tree.map(lambda x: x.sharding, tree)

        return mesh, functools.partial(function, static), shardings(results), shardings(arguments)

    def rule(static: Any, mesh: Any, arguments: Any, results: Any) -> tuple[str, dict[str, Any]]:
        whole: list[str] = []

        def axes(array: Any) -> str:
            own = [f"x{len(whole) + i}" for i in range(array.rank - 1)]
            whole.extend(own)
            return " ".join(["batch", *own])

        text = " -> ".join(", ".join(map(axes, arrays)) for arrays in (arguments, results))
        return text, {"need_replication_factors": tuple(whole)}

    split.def_partition(partition, sharding_rule=rule)
    return split
