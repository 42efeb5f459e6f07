"""A run directory, read back: configuration, tokenizer, model and parameters."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
from jaxtyping import PyTree

from cramjax.config import RunConfig
from cramjax.data import Tokenizer
from cramjax.errors import RunError
from cramjax.model import Model
from cramjax.optim import make_optimizer
from cramjax.recipes import from_yaml
from cramjax.train.checkpoint import best_intact, newest_intact, restore
from cramjax.train.parts import build_model
from cramjax.train.step import State, initial_state


@dataclass(frozen=True)
class Run:
    """A trained (or partly trained) model and where it came from."""

    path: Path
    config: RunConfig
    tokenizer: Tokenizer
    model: Model
    params: PyTree = field(repr=False)
    """The weights to use: averaged where the optimizer keeps an average."""
    summary: dict[str, Any]
    """The run's `summary.json`; empty while it has not finished."""


def read_config(path: Path) -> RunConfig:
    """The resolved configuration of a run directory.

    Raises:
        RunError: the path is not a run directory.
    """
    file = path / "config.yaml"
    if not file.is_file():
        what = "has no config.yaml" if path.is_dir() else "does not exist"
        raise RunError(f"{path} is not a run directory (it {what}): give the directory that `cramjax train` printed.")
    return from_yaml(file.read_text())


def load_run(path: str | Path, checkpoint: Literal["best", "latest"] = "latest") -> Run:
    """Load a run directory.

    Args:
        path: the run directory.
        checkpoint: the newest checkpoint, or the one with the lowest held-out bits per byte.

    Raises:
        RunError: it is not a run directory, or holds no intact checkpoint.
    """
    path = Path(path)
    config = read_config(path)
    find = best_intact if checkpoint == "best" else newest_intact
    damaged: list[str] = []
    chosen = find(path / "checkpoints", damaged.append)
    if chosen is None:
        raise RunError(" ".join([f"{path} holds no intact checkpoint yet: train it, or resume it.", *damaged]))
    tokenizer = Tokenizer.load(path / "tokenizer.json")
    model = build_model(config, tokenizer)
    optimizer = make_optimizer(config.optim, model.abstract_params())
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like: State = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        jax.eval_shape(lambda p: initial_state(p, optimizer, config.seed), model.abstract_params()),
    )
    state: State = restore(chosen, like)
    file = path / "summary.json"
    summary = json.loads(file.read_text()) if file.exists() else {}
    return Run(
        path, config, tokenizer, model, optimizer.evaluation_params(state.params, state.optimizer), summary
    )
