"""What this machine does in a second of a compression's work: a block's forward pass, Hessians and the solver.

Each is timed with the programs that a compression runs, on a block like the model's (or one as wide as 2048, for a
wider model), and kept.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np

from cramjax.cache import cache_directory, write_atomically
from cramjax.compress import hessian
from cramjax.compress.grid import find_grid
from cramjax.compress.solve import factor, solve
from cramjax.compress.watch import Inputs
from cramjax.config import ModelConfig
from cramjax.devices import cpu_fingerprint, undisturbed, usable_cores
from cramjax.model import Stack, make_model, train_flops_per_token

_WIDEST = 2048
_TOKENS = 4096
_OUTER = 1024
_SMALL = 256


@dataclass(frozen=True)
class Rates:
    """Work per second of one device."""

    forward: float
    """FLOPs of a block's products, with all that is between them."""
    hessians: float
    """FLOPs of sums of outer products: those that are done."""
    factors: float
    """FLOPs of a Cholesky decomposition and an inverse."""
    corrections: float
    """FLOPs of the solver's products, and of the error of what it made."""
    steps: float
    """Weights that are rounded, and correct those next to them."""


def measured_rates(stack: Stack, inner: int, length: int, device: Any) -> Rates:
    """The rates of a device, timed once for models like this one.

    Args:
        stack: the model, in the precision that calibration is computed in.
        inner: inputs of its widest matrix.
        length: tokens of a calibration sequence.
        device: that computes.
    """
    stack, inner = _narrowed(stack, length), min(inner, 2 * _WIDEST)
    path = cache_directory() / "compress.json"
    said = repr((stack.config, stack.vocab_size, stack.causal, stack.compute_dtype, inner, length))
    name = f"{cpu_fingerprint()}-{usable_cores()}-{device.device_kind}-jaxlib-{jaxlib.version.__version__}"
    key = f"{name}: {hashlib.sha256(said.encode()).hexdigest()[:12]}"
    known = _known(path)
    if key in known:
        return Rates(**known[key])

    def measure() -> Rates:
        with jax.default_device(device):
            return Rates(_forward(stack, length), _hessians(inner, stack.compute_dtype), *_solver(inner))

    made, alone = undisturbed(measure)
    if alone:  # else they are the best that is known now, and not kept
        write_atomically(path, json.dumps(known | {key: asdict(made)}, indent=1))
    return made


def forward_flops(stack: Stack, length: int) -> float:
    """Of a token, in the blocks of one step of the walk."""
    config, period = stack.config, len(stack.period)
    whole = train_flops_per_token(config, stack.vocab_size, length, causal=stack.causal) / 3
    ends = train_flops_per_token(replace(config, layers=period), stack.vocab_size, length, causal=stack.causal) / 3
    return (whole - ends) / (stack.repeats - 1) if stack.repeats > 1 else ends


def _narrowed(stack: Stack, length: int) -> Stack:
    """Two steps of the walk of a model like this one, and no wider than what is timed."""
    config, share = stack.config, min(1.0, _WIDEST / stack.config.width)
    kv_heads = max(1, int((config.kv_heads or config.heads) * share))
    narrow: dict[str, Any] = (
        {}
        if share == 1
        else {
            "width": _WIDEST,
            "kv_heads": kv_heads,
            "heads": max(1, int(config.heads * share) // kv_heads) * kv_heads,
            "head_dim": stack.sizes.head_dim,
            "mlp": max(64, int(config.mlp * share) // 64 * 64),
        }
    )
    own: ModelConfig = replace(config, layers=2 * len(stack.period), **narrow)
    return make_model(
        own,
        vocab_size=64,
        sequence_length=max(length, 2),
        causal=stack.causal,
        separator_id=0,
        compute_dtype=stack.compute_dtype,  # pyright: ignore[reportArgumentType]
        param_dtype=stack.param_dtype,  # pyright: ignore[reportArgumentType]
    )


def _forward(stack: Stack, length: int) -> float:
    rows = max(1, _TOKENS // length)
    params = stack.init(jax.random.key(0))
    block = jax.tree.map(lambda leaf: leaf[0], params["blocks"])
    x, context = jax.jit(stack.embed)(params, jnp.zeros((rows, length), jnp.int32))
    del params
    run = jax.jit(stack.block)
    return rows * length * forward_flops(stack, length) / _seconds(lambda: run(block, x, context, 0))


def _hessians(inner: int, dtype: str) -> float:
    inputs = Inputs(jnp.asarray(np.random.default_rng(0).standard_normal((_TOKENS, inner)), dtype))
    total = hessian.empty(inputs)

    def add() -> Any:
        nonlocal total
        total = hessian.added({"": total}, {"": inputs})[""]
        return total

    return 2 * _TOKENS * inner**2 * hessian.share(inner) / _seconds(add)


def _solver(inner: int) -> tuple[float, float, float]:
    """FLOPs of factors and corrections, and steps: two sizes tell the last two apart."""
    rng, large = np.random.default_rng(0), max(4 * _SMALL, min(inner, _WIDEST))
    mixed = jnp.asarray(rng.standard_normal((large, large)), jnp.float32)
    whole = jnp.matmul(mixed, mixed.T, precision="highest") / large
    factors = 4 / 3 * large**3 / _seconds(lambda: factor(whole, 0.01).u)
    times = []
    for size in (_SMALL, large):
        u = factor(whole[:size, :size], 0.01).u
        w = jnp.asarray(rng.standard_normal((size, _OUTER)), jnp.float32)
        grid = find_grid(w, bits=4, group=size, symmetric=True, mse=False, scale_dtype="float32")
        times.append(_seconds(lambda w=w, u=u, grid=grid: solve(w, u, grid=grid, order=jnp.arange(len(w)))))
    # seconds = weights / steps + inner · weights / corrections, neither of them for nothing
    each = [seconds / (size * _OUTER) for seconds, size in zip(times, (_SMALL, large), strict=True)]
    slope = max((each[1] - each[0]) / (large - _SMALL), 0.1 * each[1] / large)
    return factors, 1 / slope, 1 / max(each[0] - _SMALL * slope, 0.1 * each[0])


def _seconds(run: Callable[[], Any]) -> float:
    """The least of some calls, after one that compiles: what comes between only makes them longer."""
    jax.block_until_ready(run())
    least, began = math.inf, time.perf_counter()
    for _ in range(3):
        since = time.perf_counter()
        jax.block_until_ready(run())
        least = min(least, time.perf_counter() - since)
        if time.perf_counter() > began + 4:
            break
    return least


def _known(path: Any) -> dict[str, dict[str, float]]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return {key: {name: float(value) for name, value in own.items()} for key, own in known.items()}
    except (OSError, ValueError, AttributeError, TypeError):  # none, or damaged
        return {}
