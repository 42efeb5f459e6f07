"""The base of a run with an adapter: weights that are in no checkpoint, but where the run started from."""

import hashlib
from pathlib import Path

from jaxtyping import PyTree

from cramjax.config import RunConfig
from cramjax.errors import RunError
from cramjax.language_model.directory import INDEX
from cramjax.model import Model
from cramjax.model_yaml import is_model_directory
from cramjax.training.checkpoint import Meta, list_checkpoints
from cramjax.training.continuing import starting_params
from cramjax.training.frozen import split, untrained


def base_params(config: RunConfig, model: Model) -> PyTree:
    """What of a run's parameters is not trained, as it is in the state.

    Args:
        config: the run; it has an adapter.
        model: its model.

    Raises:
        UserError: the model that it started from is gone, or cannot be read.
    """
    assert config.start_from is not None, "an adapter has a base"
    params = starting_params(config.start_from, model, config.seed)
    return split(params, untrained(model, config.train.freeze))[1]


def base_identity(config: RunConfig) -> str | None:
    """What tells the weights of a run's base from all others: a digest; None where it has none.

    Raises:
        RunError: the base is gone.
    """
    if config.adapter is None or config.start_from is None:
        return None
    digest = weights_digest(config.start_from)
    if digest is None:
        raise RunError(
            f"the adapter belongs to the weights of {config.start_from}, which are not there any more: put them back."
        )
    return digest


def weights_digest(path: str | Path) -> str | None:
    """What tells the weights of a model or run directory from all others; None where there are none.

    It is of their checksums, which were written with them: no weight is read.
    """
    path = Path(path).expanduser()
    if is_model_directory(path):
        file = path / INDEX
    else:
        newest = list_checkpoints(path / "checkpoints")[-1:]
        file = newest[0] / "checksums.json" if newest else path
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def require_same_base(meta: Meta, config: RunConfig) -> None:
    """Refuse a base that is not the one that a checkpoint's adapter was trained beside.

    Raises:
        RunError: it is another.
    """
    if meta.base != base_identity(config):
        raise RunError(
            f"the adapter was trained beside other weights than {config.start_from} now holds: put those back."
        )
