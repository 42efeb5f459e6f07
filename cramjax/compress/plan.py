"""What a compression will take, before it runs: seconds by part, memory at the peak, bytes of what it makes.

Seconds are work over rates that this machine reaches (`cramjax.compress.rates`). Memory is of the walk: a block at a
time on the device, the calibration's inputs in host memory.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from cramjax.compress import hessian
from cramjax.compress.awq import check_scaling
from cramjax.compress.calibration import LONGEST
from cramjax.compress.grid import find_ternary_grid
from cramjax.compress.matrix import grid_of, refusal
from cramjax.compress.rates import forward_flops, measured_rates
from cramjax.compress.reads import later
from cramjax.compress.rotate import check_rotation
from cramjax.compress.walk import BlockWalk, microbatch
from cramjax.compression import COLUMNS, CompressConfig, resolved
from cramjax.devices import describe
from cramjax.errors import ConfigError
from cramjax.kernels.coding.entropy import entropy
from cramjax.language_model.directory import model_of
from cramjax.model import Stack, make_model
from cramjax.model_yaml import is_model_directory, read_description
from cramjax.recipes import load_recipe
from cramjax.show.values import Viewed
from cramjax.start import start
from cramjax.training.parts import resolve_dtype

if TYPE_CHECKING:
    from cramjax.show.tables import Page

_FLOAT = 4


@dataclass(frozen=True)
class _Matrix:
    """What the walk visits in each block."""

    name: str
    experts: int
    """1, or how many there are of it."""
    inner: int
    outer: int
    rows: float
    """Share of the tokens that one of them is given."""

    @property
    def weights(self) -> int:
        return self.experts * self.inner * self.outer


@dataclass(frozen=True, repr=False)
class CompressionPlan(Viewed):
    """What a compression will take."""

    name: str
    """Of the model."""
    device: str
    config: CompressConfig
    blocks: int
    """Steps of the walk."""
    tokens: int
    """Of calibration; 0: none."""
    seconds: Mapping[str, float]
    """Of one block, by part."""
    device_bytes: Mapping[str, int]
    """At the peak, beside the process itself, by what they hold."""
    host_bytes: Mapping[str, int]
    """At the peak, likewise. On a CPU, the device's memory is the host's."""
    before: int
    """Bytes of the model."""
    after: int
    """Bytes of what is made of it."""
    parameters: int

    @property
    def total_seconds(self) -> float:
        """Of all blocks."""
        return self.blocks * sum(self.seconds.values())

    def json(self) -> dict[str, Any]:
        """All of it, in JSON's types."""
        return {
            "model": self.name,
            "device": self.device,
            "blocks": self.blocks,
            "calibration_tokens": self.tokens,
            "seconds_of_a_block": dict(self.seconds),
            "seconds": self.total_seconds,
            "device_bytes": dict(self.device_bytes),
            "host_bytes": dict(self.host_bytes),
            "bytes_before": self.before,
            "bytes_after": self.after,
            "bits_per_parameter": 8 * self.after / self.parameters,
        }

    def __rich__(self) -> "Page":
        from cramjax.compress.show import plan_page

        return plan_page(self)


def plan_compression(model: str | Path, config: CompressConfig) -> CompressionPlan:
    """What compressing a model will take on the device there is; nothing is compressed, and no weight is read.

    Args:
        model: a model directory, a run, a recipe's name, or a YAML file.
        config: how; where the method needs text, that there will be some is taken for granted.

    Raises:
        UserError: there is no such model, or the configuration cannot be.
    """
    stack, name = _stack_of(model)
    config = resolved(replace(config, data=config.data or "text"))
    length = config.sequence_length or min(stack.sequence_length, LONGEST)
    if length > stack.sequence_length:
        raise ConfigError(f"sequence_length must be at most the model's context {stack.sequence_length}, got {length}.")
    calibrated = config.method in ("gptq", "sparsegpt", "wanda")
    if config.awq:
        check_scaling(stack.config)
    if config.rotate:
        check_rotation(name, stack.config)
    walk = BlockWalk(stack, start()[0], config.sequential, config.only)
    matrices = _matrices(stack, walk)
    _check(matrices, config)
    tokens = config.sequences * length if calibrated else 0
    before, after, parameters = _sizes(stack, config, matrices)
    return CompressionPlan(
        name=name,
        device=describe(walk.device),
        config=config,
        blocks=stack.repeats,
        tokens=tokens,
        seconds=_seconds(walk, config, matrices, tokens, length),
        device_bytes=_device_bytes(walk, config, matrices, tokens, length),
        host_bytes=_host_bytes(walk, matrices, tokens, before, after),
        before=before,
        after=after,
        parameters=parameters,
    )


def _stack_of(model: str | Path) -> tuple[Stack, str]:
    path = Path(model).expanduser()
    if is_model_directory(path):
        description = read_description(path)
        return model_of(description, description.separator_id), path.name
    recipe = load_recipe(path / "config.yaml" if (path / "config.yaml").is_file() else str(model))
    start()
    made = make_model(
        replace(recipe.model, mask_documents=False),
        vocab_size=recipe.tokenizer.vocab_size,
        sequence_length=recipe.data.sequence_length,
        causal=recipe.objective.causal,
        separator_id=0,
        compute_dtype=resolve_dtype(recipe.train.compute_dtype),  # pyright: ignore[reportArgumentType]
        param_dtype=recipe.train.param_dtype,  # pyright: ignore[reportArgumentType]
    )
    return made, path.name


def _matrices(stack: Stack, walk: BlockWalk) -> list[_Matrix]:
    blocks, found, own = stack.abstract_params()["blocks"], [], stack.config.experts
    for name in walk.names:
        leaf = blocks
        for key in name.split("/"):
            leaf = leaf[key]
        _, *lead, inner, outer = leaf.shape
        share = 1.0 if not lead or own is None else own.active / own.number
        found.append(_Matrix(name, math.prod(lead), inner, outer, share))
    return found


def _check(matrices: list[_Matrix], config: CompressConfig) -> None:
    if not matrices:
        raise ConfigError(f"only={config.only!r} is the name of no matrix of a block.")
    for own in matrices:
        if (why := refusal(config, (own.inner, own.outer))) is not None:
            raise ConfigError(f"{own.name}: {why}")


def _seconds(
    walk: BlockWalk, config: CompressConfig, matrices: list[_Matrix], tokens: int, length: int
) -> dict[str, float]:
    """Of one block, by part."""
    stack = walk.stack
    rates = measured_rates(stack, max(own.inner for own in matrices), length, walk.device)
    solved = 0.0
    corrected = config.method in ("gptq", "sparsegpt")
    for own in matrices:
        solved += own.weights / rates.steps
        if tokens:
            solved += 4 * own.inner * own.weights / rates.corrections / _ERROR_SPEED
        if corrected:
            solved += 4 / 3 * own.experts * own.inner**3 / rates.factors + own.inner * own.weights / rates.corrections
    if not tokens:
        return {"forward": 0.0, "Hessians": 0.0, "solving": solved}
    # A pass, and what a program computes that another has computed.
    by_name = {own.name: 2 * own.inner * own.outer * own.rows * own.experts for own in matrices}
    every = [name for reads in walk.programs for name in reads.matrices]
    again = sum(by_name.get(name, 0.0) for name in every) - sum(by_name[name] for name in set(every) & set(by_name))
    hessians = sum(
        2 * own.rows * own.experts * own.inner**2 * (hessian.share(own.inner) if own.experts == 1 else 1)
        for own in matrices
    )
    return {
        "forward": tokens * (forward_flops(stack, length) + again) / rates.forward,
        "Hessians": tokens * hessians / rates.hessians,
        "solving": solved,
    }


_ERROR_SPEED = 2.0
"""How much faster the two products of an error are than the solver's, whose blocks are small."""


def _device_bytes(
    walk: BlockWalk, config: CompressConfig, matrices: list[_Matrix], tokens: int, length: int
) -> dict[str, int]:
    """At the peak of one block, by what they hold."""
    stack = walk.stack
    blocks = stack.abstract_params()["blocks"]
    block = sum(leaf.size // leaf.shape[0] * leaf.dtype.itemsize for leaf in jax.tree.leaves(blocks))
    corrected = config.method in ("gptq", "sparsegpt")
    peak, parts = -1, (0, 0, 0)
    item = jnp.dtype(stack.compute_dtype).itemsize
    rows = microbatch(config.batch, length) * length if tokens else 0
    widest = max(max(own.inner, own.outer) * own.rows * own.experts for own in matrices)
    for own in matrices:
        one, weights = _FLOAT * own.inner**2, _FLOAT * own.inner * own.outer
        sums = one * own.experts if tokens else 0
        # Summing: the sums, their last stretch, and what the pass through the block holds.
        passing = (sums, 0, int(rows * (item * (widest + 2 * stack.config.width) + _FLOAT * own.inner)))
        # Factoring: the Hessian turned round and its inverse beside it. Solving: U, and the weights three times.
        columns = -(-own.inner // COLUMNS) * COLUMNS
        solving = max(2 * one, one + 3 * _FLOAT * columns * own.outer) if corrected else 2 * weights
        for found in (passing, (sums, solving + weights, 0)):
            if sum(found) > peak:
                peak, parts = sum(found), found
    return {"block": block, "Hessian": parts[0], "solver": parts[1], "activations": parts[2]}


def _host_bytes(walk: BlockWalk, matrices: list[_Matrix], tokens: int, before: int, after: int) -> dict[str, int]:
    stack = walk.stack
    item = jnp.dtype(stack.compute_dtype).itemsize
    stream = tokens * stack.config.width * item
    wide = {own.name: own.inner * own.rows * own.experts for own in matrices}
    # Inputs take the place of those that are read last for them, a microbatch at a time.
    left = later(walk.programs) if tokens and walk.sequential else []
    held = [sum(wide[name] for name in walk.names[: place + 1] if name in names) for place, names in enumerate(left)]
    inputs = int(tokens * item * max(held, default=0))
    # What is made is read again when all blocks are done, and stacked, when the streams are gone.
    return {"model": before, "streams": 2 * stream, "inputs": inputs, "result": max(0, 2 * after - 2 * stream - inputs)}


def _sizes(stack: Stack, config: CompressConfig, matrices: list[_Matrix]) -> tuple[int, int, int]:
    """Bytes before and after, and parameters."""
    leaves = jax.tree.leaves(stack.abstract_params())
    parameters = sum(leaf.size for leaf in leaves)
    before = after = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    item = jnp.dtype(stack.param_dtype).itemsize
    for own in matrices:
        after += stack.repeats * own.experts * (_made(own, config, item) - item * own.inner * own.outer)
    if config.rotate and stack.config.tied:  # the head is a matrix of its own then
        head = stack.abstract_params()["embed"]["token"]["table"].size
        after, parameters = after + item * head, parameters + head
    return before, after, parameters


def _made(own: _Matrix, config: CompressConfig, item: int) -> int:
    """Bytes of one matrix after it is compressed."""
    size = own.inner * own.outer
    if config.bits is None:
        zeros = config.sparsity if config.kept is None else 1 - config.kept[0] / config.kept[1]
        assert zeros is not None, "what is not quantised is pruned"
        return min(item * size, -(-size // 8) + round(item * size * (1 - zeros)))
    if config.bits == "ternary":  # as many zeros as rows of a Gaussian have
        w = np.random.default_rng(0).standard_normal((own.inner, 64)).astype(np.float32)
        zeros = float(np.mean(np.asarray(find_ternary_grid(w, means=True).rounded(w, 0)) == 0))
        return round(size * entropy(zeros) / 8) + 2 * 2 * own.outer

    def leaf(w: Any) -> Any:
        grid = grid_of(w, config)
        assert grid is not None, "what is quantised has bits"
        return grid.leaf(w)

    made = jax.eval_shape(leaf, jax.ShapeDtypeStruct((own.inner, own.outer), jnp.float32))
    return sum(part.size * part.dtype.itemsize for part in jax.tree.leaves(made))
