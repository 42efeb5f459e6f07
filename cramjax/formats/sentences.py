"""What sentence-transformers writes beside a model: how the vectors of a text's tokens become one."""

import json
from pathlib import Path
from typing import Any

from cramjax.embeddings import EmbeddingConfig, Pooling
from cramjax.errors import ModelError
from cramjax.formats.tokens import read_json

MODULES = "modules.json"
_POOLINGS: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}
_NEWER: dict[str, Pooling] = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
_WITHOUT = f"remove {MODULES} to import the model alone."


def read_embedding(path: Path, context: int) -> EmbeddingConfig | None:
    """How a model embeds texts, as `modules.json` and the modules' directories say.

    Args:
        path: the model's directory.
        context: tokens that the model sees.

    Returns:
        It, or None where the directory does not say.

    Raises:
        ModelError: a file is missing or damaged, or it says what is not here.
    """
    if not (path / MODULES).is_file():
        return None
    pooling, normalise = None, False
    for kind, directory in _modules(path / MODULES):
        match kind:
            case "Transformer":
                pass
            case "Pooling":
                pooling = _pooling(path / directory / "config.json")
            case "Normalize":
                normalise = True
            case _:
                raise ModelError(
                    f"{path / MODULES} has a module of type {kind!r}, which is not here (Transformer, Pooling and "
                    f"Normalize are): {_WITHOUT}"
                )
    if pooling is None:
        raise ModelError(f"{path / MODULES} has no module of type Pooling, and no text would be one vector: {_WITHOUT}")
    return EmbeddingConfig(pooling, normalise, _most_tokens(path, context))


def _modules(file: Path) -> list[tuple[str, str]]:
    """Types and directories of the modules, in turn."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return [(str(module["type"]).rpartition(".")[2], str(module["path"])) for module in found]
    except (ValueError, TypeError, KeyError):
        raise ModelError(f"{file} is damaged: copy or download it again, or {_WITHOUT}") from None


def _pooling(file: Path) -> Pooling:
    config = read_json(file)
    if "pooling_mode" in config:
        mode = config["pooling_mode"]
        chosen = [mode] if isinstance(mode, str) else mode
        known: dict[str, Pooling] = _NEWER
    else:
        chosen = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
        known = _POOLINGS
    if not isinstance(chosen, list) or len(chosen) != 1 or chosen[0] not in known:
        raise ModelError(f"{file} pools by {chosen!r}, which is not here (one of {', '.join(known)} is): {_WITHOUT}")
    return known[chosen[0]]


def _most_tokens(path: Path, context: int) -> int | None:
    """The length that texts are cut to, where it is less than the context."""
    file = path / "sentence_bert_config.json"
    given: Any = read_json(file).get("max_seq_length") if file.is_file() else None
    return given if type(given) is int and 0 < given < context else None
