"""In which form a machine reads a model's weights fastest, token by token.

On GPUs that is the form they have. On CPUs a kernel reads each form at the speed of memory (`cramjax.kernels.dense`);
where it cannot be built, XLA does so with float32 alone. A probe of a second says which, once for a machine.
"""

import functools
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import jaxlib.version
from jaxtyping import Array, PyTree

from cramjax.cache import cache_directory, write_atomically
from cramjax.devices import cpu_fingerprint, target, usable_cores
from cramjax.errors import ConfigError
from cramjax.kernels.attention.pages import refusal as attention_refusal
from cramjax.kernels.dense.few_rows import SOURCE, few_rows, refusal
from cramjax.kernels.native import digest
from cramjax.kernels.packed import Packed, Quantised, Streamed, is_packed, quantise, streams, table_of
from cramjax.language_model import LanguageModel
from cramjax.serve.host_memory import give_back_blocks, lay_out

_log = logging.getLogger(__name__)

Weights = Literal["auto", "float32", "bfloat16", "int8", "int4", "w8a8", "w4a8"]
"""How weights are held: `auto` is the precision that the model computes in, which changes none of them. `w8a8` and
`w4a8` are int8 and int4 with activations of 8 bits."""

Reader = Literal["kernel", "xla"]
"""What multiplies a few rows with the weights."""

_SMALL = 16 << 20
"""Bytes of a model in float32, that caches hold: `auto` leaves it as it is, for its steps do not wait for memory."""
_ROUNDED = {"w8a8": "int8", "w4a8": "int4"}
"""Precisions with activations of 8 bits, and those of their weights."""
_GROUP = 64
"""Inputs that share a scale, where weights are rounded to codes."""
_SHAPE = (4, 1024, 4096)
"""Of the matrices that the probe multiplies with, layers first: 64 MiB of float32."""
_ROWS = (1, 8)


def for_decoding(given: LanguageModel, weights: str = "auto") -> LanguageModel:
    """The same model, with its weights in the form that this machine decodes fastest.

    On a CPU, matrices and the embedding that is the head too are held in the precision asked for, and activations in
    float32. A model whose form is the best already, one made by this function, one that is divided over devices, and,
    by `auto`, a small one, are returned as they are. Adapters, matrices that are packed already, and adaptive heads
    stay.

    Args:
        given: a model.
        weights: of `Weights`. `int8` and `int4` round to codes with a scale for 64 inputs; of `int4`, the head has 8
            bits. `w8a8` and `w4a8` round the activations of each token in the same groups, where the kernel reads them
            (up to eight rows; more are multiplied as they are).

    Raises:
        ConfigError: another word; or the model's matrices cannot be rounded so.
    """
    if weights not in get_args(Weights):
        raise ConfigError(f"weights must be one of {', '.join(get_args(Weights))}, got {weights!r}.")
    leaves = jax.tree.leaves(given.params, is_leaf=is_packed)
    if any(isinstance(leaf, Streamed) for leaf in leaves) or _divided(given.params):
        return given
    model, on_cpu = given.model, target().platform == "cpu"
    if weights == "auto" and (not on_cpu or 4 * sum(math.prod(leaf.shape) for leaf in leaves) < _SMALL):
        return given
    precision = model.compute_dtype if weights == "auto" else weights
    rounds, precision = precision in _ROUNDED, _ROUNDED.get(precision, precision)
    reader = choose(speeds() if on_cpu else {}, precision)
    if reader == "xla" and precision == "float32" == model.compute_dtype == model.param_dtype:
        return given
    if on_cpu or precision == "float32":
        by_kernel = reader == "kernel" and attention_refusal() is None
        model = replace(model, compute_dtype="float32", cached_by_kernel=by_kernel)
    elif precision == "bfloat16":
        model = replace(model, compute_dtype="bfloat16")
    if on_cpu:
        give_back_blocks()
    params = _held(given, precision, reader, rounds)
    if on_cpu:
        lay_out(leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array))
    return replace(given, model=model, params=params)


def choose(seconds: Mapping[str, float], precision: str) -> Reader:
    """What is to multiply a few rows with weights of a precision.

    Args:
        seconds: of the same products, by names like those of `speeds`; without those that cannot run.
        precision: of the weights. Where XLA multiplies, those of bfloat16 are held as float32.
    """
    own = seconds.get(f"{precision} kernel", math.inf)
    # XLA unpacks codes at many times the cost of a product, whatever that is.
    plain = seconds.get("float32 xla", 0.0) if precision in ("float32", "bfloat16") else math.inf
    return "kernel" if own < plain else "xla"


def speeds() -> Mapping[str, float]:
    """Seconds that products of one row, and of eight, with the same matrices take on this machine, measured once.

    Returns:
        By precision and reader, such as `bfloat16 kernel`. Nothing, where the kernel cannot run: that is said once.
    """
    if (reason := refusal()) is not None:
        _say_slow(reason)
        return {}
    return _speeds(cache_directory() / "decoding.json")


@functools.cache
def _speeds(path: Any) -> Mapping[str, float]:
    source = digest(SOURCE)[:8]
    name = f"{cpu_fingerprint()}-{usable_cores()}-jaxlib-{jaxlib.version.__version__}-{source}"
    try:
        known: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8"))
        return {form: float(seconds) for form, seconds in known[name].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):  # none, or damaged
        measured = _probed()
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        known = dict(known) if isinstance(known, dict) else {}
    except (OSError, ValueError):
        known = {}
    write_atomically(path, json.dumps(known | {name: measured}, indent=1))
    return measured


@functools.cache
def _say_slow(reason: str) -> None:
    _log.warning(
        "Decoding reads weights as float32 by XLA, not by the kernel for few rows, because %s: with a C++ compiler, "
        "bfloat16 takes about half the time.",
        reason,
    )


def _probed(rounds: int = 4) -> dict[str, float]:
    """What `speeds` gives: of each form the fastest of some rounds, in which they take turns."""
    layers, inner, outer = _SHAPE
    scale = jnp.ones((layers, inner // _GROUP, outer), jnp.float32)
    forms: dict[str, tuple[Array, Array | None]] = {
        "float32": (jnp.ones(_SHAPE, jnp.float32), None),
        "bfloat16": (jnp.ones(_SHAPE, jnp.bfloat16), None),
        "int8": (jnp.ones(_SHAPE, jnp.int8), scale),
        "int4": (jnp.ones((layers, inner // 2, outer), jnp.uint8), scale),
    }

    @jax.jit
    def by_kernel(x: Array, w: Array, scale: Array | None) -> Array:
        return jax.lax.map(lambda layer: few_rows(x, w, layer, scale=scale)[0, 0], jnp.arange(layers))

    @jax.jit
    def by_xla(x: Array, w: Array, _: None) -> Array:
        return jax.lax.map(lambda own: jnp.matmul(x, own).sum(), w)

    readers: dict[str, Callable[..., Array]] = {f"{form} kernel": by_kernel for form in forms}
    readers["float32 xla"] = by_xla
    fastest: dict[str, float] = dict.fromkeys(readers, 0.0)
    for rows in _ROWS:
        x, best = jnp.ones((rows, inner), jnp.float32), dict.fromkeys(readers, math.inf)
        for attempt in range(rounds + 1):
            for name, read in readers.items():
                start = time.perf_counter()
                read(x, *forms[name.split()[0]]).block_until_ready()
                if attempt:  # the first one compiles
                    best[name] = min(best[name], time.perf_counter() - start)
        fastest = {name: fastest[name] + best[name] for name in readers}
    return fastest


def _divided(params: PyTree) -> bool:
    return any(isinstance(leaf, jax.Array) and len(leaf.devices()) > 1 for leaf in jax.tree.leaves(params))


def _held(given: LanguageModel, precision: str, reader: Reader, rounds: bool) -> PyTree:
    """The parameters, with the matrices that a token's step reads as they are to be held."""
    stack = given.model
    plain_head, codes = not stack.sizes.tails, precision in ("int8", "int4")

    def held(path: Any, weight: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        tied = stack.config.tied and name == "embed/token/table" and plain_head
        if not (tied or weight.role == "matrix" or (weight.role == "head" and plain_head)):
            return leaf
        if tied and (isinstance(leaf, Packed) or (codes and reader == "xla")):
            return leaf
        own = leaf.T if tied and reader == "kernel" else leaf  # the table is read as the head: (embed, vocab)
        if tied and reader == "kernel" and not codes:
            return table_of(_rounded(own, precision, reader))
        if isinstance(own, Packed):
            made = own
        elif not codes:
            made = _rounded(own, precision, reader)
        else:
            made = _coded(name, own, 4 if precision == "int4" and weight.role == "matrix" else 8)
        coded = isinstance(made, Quantised)
        rounding = coded and (made.rounds or rounds) and made.group % 4 == 0
        # A router says which of experts is read; and the kernel rounds rows in whole fours of inputs.
        if reader == "kernel" and streams(made) and "expert" not in weight.axes:
            if rounding or not (coded and made.rounds):
                return Streamed(made, rounds=rounding)
        return made

    return jax.tree_util.tree_map_with_path(held, stack.weights, given.params)


def _rounded(leaf: Array, precision: str, reader: Reader) -> Array:
    """A matrix in float32 or bfloat16; rounded to that, but held as float32, where XLA reads it on a CPU."""
    rounded = leaf.astype(precision)
    return rounded.astype(jnp.float32) if reader == "xla" and target().platform == "cpu" else rounded


def _coded(name: str, leaf: Array, bits: int) -> Quantised:
    inner = leaf.shape[-2]
    group = math.gcd(inner, _GROUP)
    try:
        made = quantise(leaf, bits, group)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    if not bool(jnp.isfinite(made.scale).all()):
        raise ConfigError(f"{name} has weights that are not finite, which no code stands for: mend the model first.")
    return made
