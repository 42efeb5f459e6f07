"""A run directory, read back: configuration, tokenizer, model and parameters."""

import dataclasses
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
from jaxtyping import PyTree

from cramjax.compiling import keep_programs
from cramjax.config import RunConfig
from cramjax.data import Tokenizer
from cramjax.errors import ConfigError, RunError
from cramjax.formats.tokens import CHAT_TEMPLATE, read_text
from cramjax.language_model import LanguageModel
from cramjax.language_model.directory import read_origin
from cramjax.model import Model
from cramjax.model_yaml import is_model_directory, kind_of
from cramjax.parallel import make_mesh
from cramjax.recipes import differing_fields, from_yaml, to_yaml
from cramjax.show.tables import figures_html
from cramjax.start import start
from cramjax.training.checkpoint import (
    FORMAT,
    best_intact,
    newest_intact,
    read_meta,
    require_known,
    restore_part,
)
from cramjax.training.display import summary_figures
from cramjax.training.methods import method_of
from cramjax.training.metrics import read_records
from cramjax.training.parts import build_model
from cramjax.training.step import State

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
        return figures_html(str(self.path), summary_figures(self.summary) or [("state", "not finished")])

    @property
    def language_model(self) -> LanguageModel:
        """The model as one value, which is all that generation and evaluation read of a run."""
        objective = self.config.objective
        return LanguageModel(
            path=self.path,
            kind=kind_of(self.config),
            tokenizer=self.tokenizer,
            context=self.config.context,
            model=self.model,
            params=self.params,
            normalize=self.config.data.normalize,
            mask_rate=objective.mask_rate_end or objective.mask_rate,
            chat_template=read_text(self.path / CHAT_TEMPLATE),
            origin={**_base_of(self.config), "trained": to_yaml(self.config), "summary": self.summary},
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


def _base_of(config: RunConfig) -> dict[str, str]:
    """The family of the model that a run starts from, if it is known, and what an adapter's base is called: what it was
    imported from, or its path.
    """
    if config.start_from is None:
        return {}
    path, origin = Path(config.start_from), {}
    if is_model_directory(path):
        origin = read_origin(path)
    elif (path / "config.yaml").is_file():
        origin = {"family": _base_of(read_config(path)).get("family")}
    family = {"family": str(origin["family"])} if origin.get("family") else {}
    if config.adapter is None:
        return family
    imported = None if "merged" in origin else origin.get("imported_from")
    return {**family, "base": str(imported or path)}


def config_text(config: RunConfig) -> str:
    """What `config.yaml` of a run directory holds."""
    return f"# cramjax run, format {FORMAT}\n{to_yaml(config)}"


def read_config(path: Path) -> RunConfig:
    """The resolved configuration of a run directory.

    Raises:
        RunError: the path is not a run directory, or is of a newer format, or its configuration is damaged.
    """
    file = path / "config.yaml"
    if not file.is_file():
        what = "has no config.yaml" if path.is_dir() else "is a file" if path.exists() else "does not exist"
        raise RunError(
            f"{path} is not a run directory (it {what}): give the directory that `cramjax train` printed, or, where no "
            "training is to go on, a model directory."
        )
    try:
        text = file.read_text(encoding="utf-8")
        if header := re.match(r"# cramjax run, format (\d+)$", text, re.MULTILINE):
            require_known(int(header[1]), path)
        config = from_yaml(text, str(file))
    except (ConfigError, ValueError, TypeError) as error:
        raise RunError(
            f"{file} is damaged: {str(error).rstrip('.')}. Mend it: `config` in the meta.json of the run's checkpoints "
            "is a copy."
        ) from error
    return _with_its_vocabulary(config, path)


def _with_its_vocabulary(config: RunConfig, path: Path) -> RunConfig:
    """A run that started from a model goes on without it: where that has gone, the vocabulary is the run's own copy."""
    own, given = path / "tokenizer.json", config.tokenizer.path
    if config.start_from is None or given is None or Path(given).is_file() or not own.is_file():
        return config
    return dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, path=str(own.absolute())))


def read_summary(path: Path) -> dict[str, Any]:
    """A run's `summary.json`; empty if it has none yet.

    Raises:
        RunError: it is damaged.
    """
    file = path / "summary.json"
    try:
        summary = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if isinstance(summary, dict):
            return summary
        what = "not a JSON object"
    except ValueError as error:
        what = f"not JSON, {error}"
    raise RunError(f"{file} is damaged ({what}): remove it, and `cramjax train --resume {path}` writes it again.")


def load_run(path: str | Path, checkpoint: Literal["best", "latest"] = "latest") -> Run:
    """Load a run directory.

    Args:
        path: the run directory.
        checkpoint: the newest checkpoint, or the one with the lowest held-out bits per byte.

    Raises:
        RunError: it is not a run directory, or is damaged, or holds no intact checkpoint.
    """
    path = Path(path)
    config, summary = read_config(path), read_summary(path)
    start()
    keep_programs(config.data.cache_dir)
    find = best_intact if checkpoint == "best" else newest_intact
    damaged: list[str] = []
    chosen = find(path / "checkpoints", damaged.append)
    for message in damaged:
        _log.warning(message)
    if chosen is None:
        raise RunError(" ".join([f"{path} holds no intact checkpoint yet: train it, or resume it.", *damaged]))
    meta = read_meta(chosen)
    _require_same(from_yaml(meta.config, "the checkpoint's configuration"), config, path)
    tokenizer = Tokenizer.from_json(meta.tokenizer, str(chosen))
    model = build_model(config, tokenizer)
    params = _evaluation_params(config, model, chosen)
    return Run(path, config, tokenizer, model, params, summary)


def _require_same(then: RunConfig, now: RunConfig, path: Path) -> None:
    """Refuse a configuration under which a checkpoint's weights would be taken for what they are not."""
    kept = ("model", "objective", "optim", "adapter")
    alone = ("data.sequence_length", "data.normalize", "train.param_dtype", "train.freeze")
    for key, (was, is_now) in differing_fields(then, now).items():
        if key.partition(".")[0] in kept or key in alone:
            raise RunError(
                f"{path / 'config.yaml'} has {key}={is_now}, and its checkpoint was trained with {was}: restore what "
                "it was."
            )


def _evaluation_params(config: RunConfig, model: Model, checkpoint: Path) -> PyTree:
    """The weights to use, on one device; of a state, only what they are made of is read."""
    device, method = start()[0], method_of(config)
    optimizer = method.optimizer(config, model)
    like = method.state_like(config, model, optimizer, make_mesh(1, 1, [device]))
    leaves, structure = jax.tree.flatten(like)

    def weights(*leaves: Any) -> PyTree:
        return method.evaluation_params(structure.unflatten(leaves), optimizer)

    traced = jax.make_jaxpr(weights)(*leaves).jaxpr
    read = {id(value) for values in (traced.outvars, *(each.invars for each in traced.eqns)) for value in values}
    pairs = zip(leaves, traced.invars, strict=True)
    needed: State = structure.unflatten([x if id(value) in read else None for x, value in pairs])
    if config.adapter is None:
        state = restore_part(checkpoint, needed)
    else:
        from cramjax.training.based import base_params, require_same_base  # here, because a base may be a run

        require_same_base(read_meta(checkpoint), config)
        state = restore_part(checkpoint, needed._replace(frozen=()))._replace(frozen=base_params(config, model))
    return jax.device_put(method.evaluation_params(state, optimizer), device)
