"""A run directory, read back: configuration, tokenizer, model and parameters."""

import html
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
from jaxtyping import PyTree

from cramjax.compiling import keep_programs
from cramjax.config import RunConfig
from cramjax.data import Tokenizer
from cramjax.errors import RunError
from cramjax.language_model import LanguageModel
from cramjax.model import Model
from cramjax.parallel import make_mesh
from cramjax.recipes import from_yaml, to_yaml
from cramjax.start import start
from cramjax.training.checkpoint import best_intact, newest_intact, restore_part
from cramjax.training.display import summary_figures
from cramjax.training.metrics import read_records
from cramjax.training.offload_state import Layout
from cramjax.training.parts import build_model, optimizer_for
from cramjax.training.step import State, evaluation_params, initial_state

if TYPE_CHECKING:
    from cramjax.training.plots import Plot
    from cramjax.training.step_profile import StepProfile

_log = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class Run:
    """A trained (or partly trained) model and where it came from."""

    path: Path
    config: RunConfig
    tokenizer: Tokenizer
    model: Model
    params: PyTree
    """The weights to use: averaged where the optimizer keeps an average."""
    summary: dict[str, Any]
    """The run's `summary.json`; empty while it has not finished."""

    def __repr__(self) -> str:
        figures = ", ".join(f"{name} {value}" for name, value in summary_figures(self.summary))
        return f"Run({str(self.path)!r}: {figures or 'not finished'})"

    def _repr_html_(self) -> str:
        figures = summary_figures(self.summary) or [("state", "not finished")]
        rows = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in figures)
        return f"<table><caption>{html.escape(str(self.path))}</caption>{rows}</table>"

    @property
    def language_model(self) -> LanguageModel:
        """The model as one value, which is all that generation and evaluation read of a run."""
        objective = self.config.objective
        return LanguageModel(
            path=self.path,
            kind=objective.kind,
            tokenizer=self.tokenizer,
            context=self.config.data.sequence_length,
            model=self.model,
            params=self.params,
            normalize=self.config.data.normalize,
            mask_rate=objective.mask_rate_end or objective.mask_rate,
            origin={"trained": to_yaml(self.config), "summary": self.summary},
        )

    def plot(self) -> "Plot":
        """Bits per byte, against the baselines, and the learning rate over the budget; a notebook shows it."""
        from cramjax.training import plots  # here, because matplotlib is slow to import and most uses draw nothing

        return plots.Plot(plots.curves(read_records(self.path), self.summary.get("baselines")))

    def profile(self) -> "StepProfile":
        """Where the time of the traced steps went; for a run with `train.profile=true`, on a CPU or with its optimizer
        on the host.

        Raises:
            RunError: the run has no trace, or one in which nothing is named.
        """
        from cramjax.training.step_profile import read_step_profile

        return read_step_profile(self.path)


def read_config(path: Path) -> RunConfig:
    """The resolved configuration of a run directory.

    Raises:
        RunError: the path is not a run directory.
    """
    file = path / "config.yaml"
    if not file.is_file():
        what = "has no config.yaml" if path.is_dir() else "is a file" if path.exists() else "does not exist"
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
    start()
    keep_programs(config.data.cache_dir)
    find = best_intact if checkpoint == "best" else newest_intact
    damaged: list[str] = []
    chosen = find(path / "checkpoints", damaged.append)
    for message in damaged:
        _log.warning(message)
    if chosen is None:
        raise RunError(" ".join([f"{path} holds no intact checkpoint yet: train it, or resume it.", *damaged]))
    tokenizer = Tokenizer.load(path / "tokenizer.json")
    model = build_model(config, tokenizer)
    params = _evaluation_params(config, model, chosen)
    file = path / "summary.json"
    summary = json.loads(file.read_text()) if file.exists() else {}
    return Run(path, config, tokenizer, model, params, summary)


def _evaluation_params(config: RunConfig, model: Model, checkpoint: Path) -> PyTree:
    """The weights to use, on one device; of the optimizer's state, only what they are made of is read."""
    device = start()[0]
    if config.train.offload_optimizer:
        like = Layout(config, model, make_mesh(1, 1, [device])).state
        return restore_part(checkpoint, like._replace(step=None, optimizer=None, key=None)).params
    optimizer = optimizer_for(config, model)
    state = jax.eval_shape(
        lambda p: initial_state(p, optimizer, config.seed, config.train.freeze), model.abstract_params()
    )

    def wanted(params: PyTree, kept: PyTree, frozen: PyTree) -> PyTree:
        return evaluation_params(state._replace(params=params, optimizer=kept, frozen=frozen), optimizer)

    leaves, structure = jax.tree.flatten((state.params, state.optimizer, state.frozen))
    traced = jax.make_jaxpr(lambda *leaves: wanted(*structure.unflatten(leaves)))(*leaves).jaxpr
    read = {id(value) for values in (traced.outvars, *(each.invars for each in traced.eqns)) for value in values}
    place = jax.sharding.SingleDeviceSharding(device)
    like = structure.unflatten(
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) if id(value) in read else None
        for x, value in zip(leaves, traced.invars, strict=True)
    )
    part = State(None, like[0], like[1], None, like[2])  # pyright: ignore[reportArgumentType]
    restored: State = restore_part(checkpoint, part)
    return wanted(restored.params, restored.optimizer, restored.frozen)
