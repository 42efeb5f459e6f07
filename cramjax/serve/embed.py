"""One vector for each text: what a model makes of its tokens, pooled as the model says."""

from collections.abc import Callable, Sequence
from functools import partial

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from cramjax.compiling import BRIEF, jit
from cramjax.embeddings import EmbeddingConfig, Pooling
from cramjax.errors import ConfigError, DataError
from cramjax.language_model import LanguageModel
from cramjax.model import Model
from cramjax.model.ragged import Ragged
from cramjax.serve.lengths import Programs, batches, costs_of, ragged_of
from cramjax.training.given import Given, language_model

Ids = Sequence[int]
Progress = Callable[[int, int], None]
"""Is told how many of how many texts are done."""


def embed(
    given: Given,
    texts: Sequence[str | Ids],
    *,
    pooling: Pooling | None = None,
    cut: bool = False,
    programs: Programs | None = None,
    progress: Progress | None = None,
) -> Float[np.ndarray, "texts embed"]:
    """One vector for each text.

    A text's vector does not depend on what else is given, beyond the rounding of products of other shapes.

    Args:
        given: a run or a model, or the path of one.
        texts: each as text, or as the ids of `tokens_to_embed`.
        pooling: `mean`, `cls` or `last`. Default: as the model says, else the mean.
        cut: leave out the end of a text that is too long, instead of refusing it.
        programs: that there are, of who embeds again and again. Default: those of these texts.
        progress: is told of each batch.

    Returns:
        Vectors, float32 (texts, embed); of length 1, unless the model says otherwise.

    Raises:
        DataError: a text is too long for the model, or has no tokens.
        ConfigError: there is no such pooling.
    """
    model = language_model(given)
    config = _config(model)
    chosen = config.pooling if pooling is None else pooling
    if chosen not in ("mean", "cls", "last"):
        raise ConfigError(f"pooling must be one of mean, cls, last, got {chosen!r}.")
    rows = tokens_to_embed(model, texts, cut=cut)
    vectors = np.zeros((len(rows), model.config.width), np.float32)
    done = 0
    lengths = [len(row) for row in rows]
    for batch in batches(lengths, costs_of(model, sum(lengths)), programs):
        pooled = _pooled(model.model, model.params, ragged_of(batch, rows), chosen)
        vectors[list(batch.texts)] = np.asarray(pooled)[: len(batch.texts)]
        done += len(batch.texts)
        if progress is not None:
            progress(done, len(rows))
    if config.normalise:
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors


def tokens_to_embed(model: LanguageModel, texts: Sequence[str | Ids], *, cut: bool = False) -> list[list[int]]:
    """The ids that a model reads of each text, with what its tokenizer puts around a text.

    Args:
        model: that reads them.
        texts: each as text; or as ids, which are left as they are.
        cut: leave out the end of a text that is too long, instead of refusing it.

    Raises:
        DataError: a text is too long for the model, or ids are none, or none of its vocabulary.
    """
    begin, end = _frame(model)
    most = min(_config(model).max_tokens or model.context, model.context)
    rows = []
    for number, text in enumerate(texts):
        if isinstance(text, str):
            ids, around = model.tokenizer.encode(text), len(begin) + len(end)
        else:
            ids, around = list(text), 0
            if not ids or not all(0 <= token < model.tokenizer.vocab_size for token in ids):
                raise DataError(
                    f"text {number} must be ids from 0 to {model.tokenizer.vocab_size - 1}, got {ids!r:.80}."
                )
        if len(ids) + around > most and not cut:
            raise DataError(
                f"text {number} has {len(ids):,} tokens; {model.path} embeds texts of at most {most - around:,}: "
                "shorten it, or have texts cut (--cut, cut=True)."
            )
        ids = ids[: most - around]
        rows.append([*begin, *ids, *end] if around or isinstance(text, str) else ids)
        if not rows[-1]:
            raise DataError(f"text {number} has no tokens, so it has no vector: leave it out.")
    return rows


def _config(model: LanguageModel) -> EmbeddingConfig:
    return model.embedding or EmbeddingConfig()


def _frame(model: LanguageModel) -> tuple[list[int], list[int]]:
    """What stands before and after a text: what the tokenizer's own template puts there, or our separator."""
    tokenizer = model.tokenizer
    if tokenizer.begin_ids is None:
        return [tokenizer.separator_id], [tokenizer.separator_id]
    plain, framed = (tokenizer.backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    return list(tokenizer.begin_ids), framed[len(tokenizer.begin_ids) + len(plain) :]


@partial(jit, seconds=BRIEF, static_argnames=("model", "pooling"))
def _pooled(model: Model, params: PyTree, texts: Ragged, pooling: Pooling) -> Float[Array, "texts embed"]:
    x = model.normed(params, model.unpadded(params, texts)).astype(jnp.float32)
    if pooling == "cls":
        return x[texts.starts]
    if pooling == "last":
        return x[texts.starts + jnp.maximum(texts.lengths - 1, 0)]
    total = jnp.sum(jnp.where(texts.real[..., None], texts.apart(x), 0.0), axis=1)
    return total / jnp.maximum(texts.lengths, 1)[:, None]
