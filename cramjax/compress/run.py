"""Compress a model: calibrate, walk the stack, write a model directory and say what came of it."""

import json
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import PyTree

from cramjax.compress.awq import check_scaling, scaled_block
from cramjax.compress.calibration import calibration_tokens
from cramjax.compress.matrix import refusal, rewrite, rewrite_experts, rounded_to_nearest
from cramjax.compress.plots import html
from cramjax.compress.report import Compression, MatrixReport, Size
from cramjax.compress.rotate import rotated_model
from cramjax.compress.shares import check_patterns, owl_shares, with_share
from cramjax.compress.unfinished import Unfinished, unfinished, was_made
from cramjax.compress.walk import BlockWalk, Calibration, microbatch
from cramjax.compression import PRUNING, CompressConfig, resolved
from cramjax.errors import ConfigError, ModelError
from cramjax.evaluation import evaluate_text
from cramjax.formats.directory import require_new
from cramjax.formats.sparse import stored_bytes
from cramjax.formats.table import flatten
from cramjax.formats.ternary import ternary_outputs
from cramjax.kernels.packed import (
    Coded,
    Packed,
    is_adapter,
    is_packed,
    rounding_rows,
    stack_coded,
)
from cramjax.language_model import LanguageModel, load_model, save_model
from cramjax.model_yaml import is_model_directory
from cramjax.show.numbers import format_seconds
from cramjax.start import start
from cramjax.training import Evaluation, Run
from cramjax.training.given import Given, language_model, load

Tell = Callable[[str, int, int], None]
"""Is told what is being done, and how many of how many blocks are."""

_PROJECTIONS = "attention/qkv/kernel"


def compress_model(given: Given, config: CompressConfig, out: str | Path, *, tell: Tell | None = None) -> Compression:
    """Make a model directory of a model in fewer bits, or with weights set to 0.

    Where it was interrupted, the same call goes on from the last block that was done, and gives the same weights.

    Args:
        given: a run or a model, or the path of one.
        config: how.
        out: the model directory to make.
        tell: is told how far it is.

    Raises:
        UserError: the configuration cannot be, or the model, the text or the directory cannot be used so.
    """
    config, out = resolved(config), Path(out).expanduser()
    if not was_made(out):
        require_new(out)
    if isinstance(given, str | Path):
        given = read_model(given)
    model = language_model(given)
    _check_model(model)
    if config.awq:
        check_scaling(model.config)
    turned = rotated_model(model, config.seed) if config.rotate else model
    walk = BlockWalk(turned.model, start()[0], config.sequential, config.only)
    _check_matrices(model, walk, config)
    tokens = None if config.data is None else calibration_tokens(config, model)
    with unfinished(out, _job(model, config, tokens)) as kept:
        if kept.made is not None and was_made(out):
            kept.remove()
            return Compression.of(kept.made["report"])
        scored = _scorer(given, config)
        if scored is not None and kept.noted("before") is None:
            _say(tell, "scoring the held-out text", 0, model.model.repeats)
            kept.note("before", scored(model))
        params, matrices, seconds = _walked(walk, turned, config, tokens, kept, tell)
        params = rounding_rows(params) if config.activation_bits else params
        score = None
        if scored is not None:
            _say(tell, "scoring the held-out text again", model.model.repeats, model.model.repeats)
            score = (kept.noted("before"), scored(replace(turned, params=params)))
        made = Compression(
            model=model.path,
            out=out,
            config={key: value for key, value in asdict(config).items() if value is not None},
            tokens=0 if tokens is None else tokens.size,
            matrices=matrices,
            sizes=_sizes(model.params, params, walk),
            seconds=seconds,
            bits_per_byte=score,
            notes=_notes(model, config, matrices, tokens),
        )
        done = {**made.json(), "with": f"cramjax {version('cramjax')}", "at": datetime.now(UTC).isoformat()}
        kept.making({"at": done["at"], "report": made.record()})
        origin = {**model.origin, "compressed": [*model.origin.get("compressed", []), done]}
        save_model(replace(turned, path=out, params=params, origin=origin), out, beside={"report.html": html(made)})
        kept.remove()
    return made


def read_model(path: str | Path, checkpoint: Literal["best", "latest"] = "latest") -> Run | LanguageModel:
    """A run or a model directory; the weights of a model stay in host memory.

    Args:
        path: the directory.
        checkpoint: of a run: the newest, or the one with the lowest held-out bits per byte.

    Raises:
        UserError: it is neither, or a file of it is damaged.
    """
    if is_model_directory(path):
        return load_model(path, put=lambda _, array: array)
    return load(path, checkpoint)


def _check_model(model: LanguageModel) -> None:
    """Refuse a model whose matrices are not there as they are.

    Raises:
        UserError: it is one.
    """
    model.require_tokens()
    if model.kind == "encoder":
        raise ModelError(f"{model.path} is an encoder without a head: compress the model with its head.")
    leaves = flatten(model.params["blocks"])
    if any(is_adapter(leaf) for _, leaf in flatten(model.params)):
        raise ModelError(f"{model.path} has an adapter: put it into the weights first (cramjax merge).")
    if packed := [name for name, leaf in leaves if is_packed(leaf)]:
        raise ModelError(
            f"{model.path}: {packed[0]} is packed in few bits already: give the model that it was packed from."
        )


def _check_matrices(model: LanguageModel, walk: BlockWalk, config: CompressConfig) -> None:
    """Refuse groups and patterns that do not divide some matrix.

    Raises:
        ConfigError: they do not.
    """
    leaves = dict(flatten(model.params["blocks"]))
    if not walk.names and "experts" in config.only and model.model.config.experts is None:
        raise ConfigError(f"only={config.only!r} names experts, and this model has none: leave it out.")
    if not walk.names:
        names = ", ".join(replace(walk, only="*").names)
        raise ConfigError(f"only={config.only!r} is the name of no matrix of a block; they are {names}.")
    if isinstance(config.shares, Mapping):
        check_patterns(config.shares, walk.names, walk.stack.repeats)
    for name in walk.names:
        shape = tuple(leaves[name].shape[-2:])
        inner = shape[0]
        if (why := refusal(config, shape)) is not None:
            raise ConfigError(f"{name}: {why}")
        if config.kept is not None and inner % config.kept[1]:
            raise ConfigError(f"{name}: the pattern {config.pattern} does not divide its {inner} inputs.")


def _job(model: LanguageModel, config: CompressConfig, tokens: np.ndarray | None) -> dict[str, Any]:
    """What makes a compression the same one."""
    checksum = 0
    for _, leaf in flatten(model.params):
        checksum = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data, checksum)
    return {
        "cramjax": version("cramjax"),
        "options": json.loads(json.dumps(asdict(config))),
        "weights": checksum,
        "tokens": None if tokens is None else zlib.crc32(tokens.tobytes()),
    }


def _walked(
    walk: BlockWalk,
    model: LanguageModel,
    config: CompressConfig,
    tokens: np.ndarray | None,
    kept: Unfinished,
    tell: Tell | None,
) -> tuple[PyTree, tuple[MatrixReport, ...], float]:
    """The parameters after the walk, what is reported of each matrix, and the seconds that it took in all."""
    blocks, first, total = model.params["blocks"], kept.blocks, model.model.repeats
    calibration: Calibration | None = None
    if tokens is not None and first < total:
        calibration = _begun(walk, model, config, tokens)
        if first:
            calibration = calibration.after(kept.streams(first - 1))
    shares, unclipped = _shares(walk, model, config, tokens, kept, tell), sum(model.model.sizes.qkv[:2])
    began = time.monotonic()
    for repeat in range(first, total):
        _say(tell, f"block {repeat + 1} of {total}{_left(began, repeat - first, total - repeat)}", repeat, total)
        reports: list[MatrixReport] = []
        started = [time.monotonic()]

        def visit(name: str, w: Any, hessian: Any, repeat: int = repeat, reports: Any = reports, at: Any = started):
            try:
                own = with_share(config, repeat, name, shares)
                if w.ndim > 2:
                    made = rewrite_experts(w, hessian, own, _stacked)
                else:
                    made = rewrite(w, hessian, own, first_clipped=unclipped if name.endswith(_PROJECTIONS) else 0)
            except ModelError as error:
                raise ModelError(f"block {repeat}: {name}: {error}") from error
            _check_finite(made.error, f"block {repeat}: {name}")
            now = time.monotonic()
            of = (made.error, made.zeros, now - at[0], made.damp, made.dead, made.unseen)
            reports.append(MatrixReport(repeat, name, tuple(w.shape), *of))
            at[0] = now
            return made.leaf, made.weights

        block = jax.tree.map(lambda leaf, repeat=repeat: np.asarray(leaf[repeat]), blocks)
        changed: dict[str, Any] = {}
        if config.awq and calibration is not None:
            nearest = partial(rounded_to_nearest, config=config)
            block, changed = scaled_block(walk, block, repeat, calibration, nearest)
        leaves, calibration = walk.visit(block, repeat, calibration, visit)
        streams = None if calibration is None else calibration.streams
        kept.save(repeat, {**changed, **leaves}, streams, [asdict(report) for report in reports])
    done = [kept.load(repeat) for repeat in range(total)]
    matrices = tuple(MatrixReport(**{**row, "shape": tuple(row["shape"])}) for _, rows in done for row in rows)
    stacked: Mapping[str, Any] = jax.tree.map(_stacked, *(leaves for leaves, _ in done), is_leaf=is_packed)
    params = {**model.params, "blocks": _replaced(blocks, stacked)}
    return params, matrices, sum(matrix.seconds for matrix in matrices)


def _begun(walk: BlockWalk, model: LanguageModel, config: CompressConfig, tokens: np.ndarray) -> Calibration:
    return walk.begin(model.params, tokens, microbatch(config.batch, tokens.shape[1]))


def _shares(
    walk: BlockWalk,
    model: LanguageModel,
    config: CompressConfig,
    tokens: np.ndarray | None,
    kept: Unfinished,
    tell: Tell | None,
) -> list[float] | None:
    """Shares of zeros of each block, where they are found from the text; None: they are not."""
    if config.shares != "owl":
        return None
    if (known := kept.noted("shares")) is not None:
        return known
    assert tokens is not None and config.sparsity is not None, "of a resolved configuration"
    total = walk.stack.repeats
    found = owl_shares(
        walk,
        model.params["blocks"],
        _begun(walk, model, config, tokens),
        config.sparsity,
        lambda done: _say(tell, f"looking for outliers in block {done + 1} of {total}", done, total),
    )
    kept.note("shares", found)
    return found


def _stacked(*leaves: Any) -> Any:
    """What became of a matrix in each block, in one."""
    if isinstance(leaves[0], Coded):
        return stack_coded(leaves)
    return jax.tree.map(lambda *parts: np.stack(parts), *leaves)


def _left(began: float, done: int, more: int) -> str:
    """How long blocks still take, as those that are done took."""
    return f", {format_seconds((time.monotonic() - began) / done * more)} left" if done else ""


def _check_finite(error: float, what: str) -> None:
    if not np.isfinite(error):
        raise ModelError(f"{what} has weights that are not finite, which no code stands for: mend the model first.")


def _replaced(tree: PyTree, leaves: Mapping[str, Any]) -> PyTree:
    """Parameters with those in the place of their own that `leaves`, nested as they are, has."""
    return {
        key: value
        if key not in leaves
        else (_replaced(value, leaves[key]) if isinstance(value, Mapping) else leaves[key])
        for key, value in tree.items()
    }


def _scorer(given: Run | LanguageModel, config: CompressConfig) -> Callable[[LanguageModel], float] | None:
    """Measures the bits per byte of held-out text by a model; None: there is no such text."""
    has_text = isinstance(given, Run) and given.config.objective.kind != "preference"
    if config.text is None and not has_text:
        return None
    device = start()[0]

    def score(model: LanguageModel) -> float:
        own = replace(given, model=model.model, params=jax.device_put(model.params, device))
        found = evaluate_text(own, config.text)  # pyright: ignore[reportArgumentType]
        assert isinstance(found, Evaluation), "a run on pairs has no text"
        return found.bits_per_byte

    return score


def _sizes(before: PyTree, after: PyTree, walk: BlockWalk) -> tuple[Size, ...]:
    """Bytes of the parts of a model."""
    olds, news = dict(flatten(before)), dict(flatten(after))
    parts: dict[str, list[int]] = {}
    for name, new in news.items():
        first, _, rest = name.partition("/")
        part = first if first != "blocks" else "matrices of blocks" if rest in walk.names else "rest of blocks"
        sums = parts.setdefault(part, [0, 0, 0])
        sums[0] += _bytes(olds[name]) if name in olds else 0
        sums[1] += _bytes(new)
        sums[2] += int(np.prod(new.shape))
    return tuple(Size(part, *sums) for part, sums in parts.items())


def _bytes(leaf: Any) -> int:
    """That it takes in a file."""
    if isinstance(leaf, Coded):
        return sum(output.bytes for output in ternary_outputs("", leaf))
    return leaf.bytes if isinstance(leaf, Packed) else stored_bytes(leaf)


def _notes(
    model: LanguageModel, config: CompressConfig, matrices: tuple[MatrixReport, ...], tokens: np.ndarray | None
) -> tuple[str, ...]:
    """What of a compression a reader should know."""
    notes = []
    if config.rotate and model.config.tied:
        notes.append("rotated, the head is a matrix of its own beside the embedding, and counted as one.")
    if damped := [m for m in matrices if m.damp is not None and m.damp > config.damp]:
        worst = max(damped, key=lambda matrix: matrix.damp or 0)
        notes.append(
            f"{len(damped)} Hessians could not be factored with damp {config.damp:g}, which grew, up to "
            f"{worst.damp:g} (block {worst.block}, {worst.name}): more text may help."
        )
    if dead := [matrix for matrix in matrices if matrix.dead]:
        notes.append(
            f"{sum(matrix.dead for matrix in dead)} inputs of {len(dead)} matrices were 0 for all of the text; their "
            "weights were set to 0."
        )
    if unseen := sum(matrix.unseen for matrix in matrices):
        count = sum(matrix.shape[0] for matrix in matrices if len(matrix.shape) == 3)
        notes.append(
            f"{unseen} of {count} experts' matrices were sent nothing of the text, and rounded without it: give more."
        )
    if tokens is not None and (wide := [m for m in matrices if m.damp is not None and m.shape[-2] > tokens.size]):
        most = max(m.shape[-2] for m in wide)
        notes.append(f"{tokens.size:,} tokens are fewer than the {most:,} inputs of a matrix.")
    if config.method in PRUNING and config.bits is None:
        notes.append("weights that are 0 save bytes in the file, where each takes a bit; in memory they are as large.")
    elif config.method in PRUNING:
        notes.append("weights that are 0 have codes like any others: they save no bytes.")
    return tuple(notes)


def _say(tell: Tell | None, what: str, done: int, total: int) -> None:
    if tell is not None:
        tell(what, done, total)
