"""Import and export: models of others as ours, and ours as those of others."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp

from cramjax.errors import ModelError
from cramjax.formats.codes import keeps
from cramjax.formats.directory import require_new
from cramjax.formats.hub import Source, download, open_directory
from cramjax.formats.table import read_params
from cramjax.kernels.packed import is_adapter, is_packed, unpacked
from cramjax.language_model.directory import model_of, save_model
from cramjax.language_model.value import Format, LanguageModel
from cramjax.model_yaml import Description, is_model_directory
from cramjax.start import start

FORMATS: tuple[Format, ...] = get_args(Format)
_PRECISIONS = ("float32", "bfloat16")


def import_model(
    source: str | Path,
    out: str | Path | None = None,
    *,
    dtype: str | None = None,
    codes: bool = False,
    put: Callable[[str, Any], Any] | None = None,
) -> LanguageModel:
    """Read another library's model; with `out`, also write it as a model directory.

    Args:
        source: a Hugging Face directory, `hub:NAME`, or a GGUF file.
        out: the model directory to make.
        dtype: precision of the weights. Default: bfloat16 if all are stored in it, else float32.
        codes: keep the codes of matrices that are quantised, where a packed leaf holds them: of GGUF Q8_0, Q4_0 and
            Q4_1, of GPTQ and compressed-tensors all in groups of neighbours. Others become floating point numbers, as
            all do without.
        put: places an array that has been read, given the path of its parameter. Default: on the default device.

    Raises:
        UserError: the source cannot be read as one of the families known here, or has no codes that are kept, or the
            directory exists.
    """
    if out is not None:
        require_new(out)
    if dtype not in (None, *_PRECISIONS):
        raise ModelError(f"dtype must be one of {', '.join(_PRECISIONS)}, got {dtype!r}.")
    opened = open_source(source)
    architecture = opened.architecture
    precision = dtype or opened.param_dtype
    description = Description(
        architecture=architecture.config,
        vocab_size=architecture.vocab_size,
        context=architecture.context,
        kind=architecture.kind,
        param_dtype=precision,  # pyright: ignore[reportArgumentType]
        compute_dtype=precision,  # pyright: ignore[reportArgumentType]
    )
    start()
    model = model_of(description, opened.tokenizer.separator_id)
    family = opened.family
    params = read_params(
        opened.tensors,
        family.table(opened.hf_config),
        model,
        ignored=family.ignored,
        prefix=family.prefix,
        put=put,
        keep=keeps(opened.tensors, model.sizes.head_dim) if codes else None,
    )
    kept = sum(map(is_packed, jax.tree.leaves(params, is_leaf=is_packed)))
    matrices = sum(weight.role == "matrix" for weight in jax.tree.leaves(model.weights))
    if codes and not kept:
        raise ModelError(
            f"{source} has no codes that are kept (GGUF's Q8_0, Q4_0 and Q4_1, GPTQ and compressed-tensors in groups "
            "of neighbours): leave --codes out, and compress what is imported."
        )
    imported = LanguageModel(
        path=Path(source) if out is None else Path(out).expanduser(),
        kind=architecture.kind,
        tokenizer=opened.tokenizer,
        context=architecture.context,
        model=model,
        params=params,
        chat_template=opened.chat_template,
        embedding=opened.embedding,
        origin={
            "imported_from": str(source),
            "family": family.name,
            **({"codes": f"of {kept} of {matrices} stacks of matrices"} if codes else {}),
            "with": f"cramjax {version('cramjax')}",
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )
    if out is not None:
        save_model(imported, out)
    return imported


def open_source(source: str | Path) -> Source:
    """Open another library's model: its files are judged, and no weight is read yet.

    Raises:
        ModelError: it is none that can be read.
    """
    name = str(source)
    if name.startswith("hub:"):
        return open_directory(download(name.removeprefix("hub:")))
    path = Path(source).expanduser()
    if is_model_directory(path):
        raise ModelError(f"{path} is a model directory already: use it as it is.")
    if (path / "config.yaml").is_file():
        raise ModelError(f"{path} is a run of cramjax: use it as it is, or give its model to `cramjax export`.")
    if path.is_file():
        from cramjax.formats.gguf import open_gguf

        return open_gguf(path)
    return open_directory(path)


def export_model(given: LanguageModel, out: str | Path, format: Format = "hf", *, dequantise: bool = False) -> Path:
    """Write a model for other libraries; see `LanguageModel.export`."""
    given.require_tokens()
    if format not in FORMATS:
        raise ModelError(f"format must be one of {', '.join(FORMATS)}, got {format!r}.")
    if format == "peft":
        from cramjax.formats.peft import write_adapter

        return write_adapter(out, given.params, replace(given, model=given.model.bare))
    from cramjax.formats.export import Exported, export_gguf, export_hf, export_quantised

    leaves = jax.tree.leaves(given.params, is_leaf=is_packed)
    if any(map(is_adapter, leaves)):
        raise ModelError(
            f"{given.path} has an adapter: merge it first (`cramjax merge`), or export it alone (--format peft)."
        )
    coded, params = any(map(is_packed, leaves)), given.params
    if dequantise:
        if format not in ("hf", "gguf"):
            raise ModelError(f"--dequantise writes floating point numbers, and {format} holds codes: leave one out.")
        params = jax.tree.map(lambda leaf: _numbers(leaf, given.model.param_dtype), params, is_leaf=is_packed)
    elif coded and format == "hf":
        raise ModelError(
            f"{given.path} has packed weights: export its codes (--format gguf, compressed-tensors or gptq), or "
            "floating point numbers in their place (--dequantise)."
        )
    exported = Exported(
        model=given.model,
        params=params,
        tokenizer=given.tokenizer,
        kind=given.kind,
        context=given.context,
        chat_template=given.chat_template,
        family=given.origin.get("family"),
    )
    out = Path(out).expanduser()
    if format in ("compressed-tensors", "gptq"):
        return export_quantised(exported, out, format)
    return (export_gguf if format == "gguf" else export_hf)(exported, out)


def _numbers(leaf: Any, dtype: str) -> Any:
    """A packed leaf as an array, a layer after the other."""
    if not is_packed(leaf):
        return leaf
    if leaf.ndim == 2:
        return unpacked(leaf).astype(dtype)
    return jnp.stack([unpacked(leaf[index]).astype(dtype) for index in range(leaf.shape[0])])
