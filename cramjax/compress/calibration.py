"""The sequences that a model is calibrated on: drawn from the beginning of a text, as the model reads it."""

from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from jaxtyping import Int

from cramjax.compression import CompressConfig
from cramjax.config import DataConfig
from cramjax.data.clean import DigestSet, Tally, clean
from cramjax.data.sources import find_sources, read_documents
from cramjax.data.store import TokenWriter
from cramjax.errors import ConfigError, DataError
from cramjax.language_model import LanguageModel

LONGEST = 2048
"""Most tokens of a sequence, where the configuration does not say."""
_POOL = 4
"""Sequences that are read for each that is drawn."""


def sequence_length(config: CompressConfig, model: LanguageModel) -> int:
    """Tokens of a calibration sequence.

    Raises:
        ConfigError: more than the model can see.
    """
    length = config.sequence_length or min(model.context, LONGEST)
    if length > model.context:
        raise ConfigError(f"sequence_length must be at most the model's context {model.context}, got {length}.")
    return length


def calibration_tokens(config: CompressConfig, model: LanguageModel) -> Int[np.ndarray, "sequences seq"]:
    """Token ids of the calibration sequences, int32.

    A masked model sees as many masks as when it is scored; a model of others whose texts begin with a token of their
    own sees that first.

    Args:
        config: with data.
        model: whose vocabulary and normalisation they have.

    Raises:
        DataError: the text cannot be read, or is too short.
        ConfigError: sequences are longer than the model's context.
    """
    assert config.data, "text is given where some is needed"
    length, rng = sequence_length(config, model), np.random.default_rng(config.seed)
    tokens = _read(config, model, _POOL * config.sequences * length)
    pool = tokens[: len(tokens) // length * length].reshape(-1, length)
    if len(pool) < config.sequences:
        listed = config.data if isinstance(config.data, str) else ", ".join(config.data)
        raise DataError(
            f"{listed} has {len(tokens):,} tokens, and {config.sequences} sequences of {length} to calibrate on need "
            f"at least {config.sequences * length:,}: give more text"
            + (f", or --sequences={len(pool)}." if len(pool) else ", or a shorter --sequence_length.")
        )
    drawn = pool[rng.permutation(len(pool))[: config.sequences]].astype(np.int32)
    tokenizer = model.tokenizer
    if model.kind == "masked" and tokenizer.mask_id is not None:
        hidden = rng.random(drawn.shape).argsort(axis=1) < round(model.mask_rate * length)
        drawn[hidden] = tokenizer.mask_id
    elif tokenizer.begin_ids:
        drawn[:, 0] = tokenizer.begin_ids[0]
    return drawn


def _read(config: CompressConfig, model: LanguageModel, most: int) -> np.ndarray:
    """Tokens from the beginning of the text, at most so many and the rest of a document."""
    data = DataConfig(normalize=model.normalize, text_field=config.text_field)  # pyright: ignore[reportArgumentType]
    files = [config.data] if isinstance(config.data, str) else list(config.data or ())
    documents = clean(read_documents(find_sources(files), data), data, DigestSet(), Tally(), filtered=False)
    with TemporaryDirectory(prefix="cramjax-") as directory:
        path = Path(directory) / "text.tokens"
        with closing(TokenWriter(path, model.tokenizer)) as writer:
            for document in documents:
                writer.append(document, model.tokenizer.encode_batch([document.text])[0])
                if writer.tokens >= most:
                    break
        return np.fromfile(path, model.tokenizer.dtype)
