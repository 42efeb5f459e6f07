"""Score text with a trained model: any files, or the held-out text of its run."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from cramjax.compiling import BRIEF
from cramjax.config import DataConfig, ObjectiveConfig
from cramjax.data import TokenFile, Tokenizer
from cramjax.data.clean import DigestSet, Tally, clean
from cramjax.data.examples import ExampleFile
from cramjax.data.sources import find_sources, read_documents
from cramjax.data.store import TokenWriter
from cramjax.errors import DataError, RunError
from cramjax.language_model import LanguageModel
from cramjax.model import objective_for
from cramjax.training import Evaluation, HeldOut, Run
from cramjax.training.given import Given, language_model, load
from cramjax.training.heldout import HeldOutPairs, HeldOutRows, PairEvaluation
from cramjax.training.opening import prepared_data

_LENGTH = 2048
"""Most tokens of a sequence that is scored; a longer context would not be used by most texts."""
_BATCH_TOKENS = 8192
"""Tokens that are scored at once, where a run does not say."""


def evaluate_text(given: Given, files: str | Path | Sequence[str | Path] | None = None) -> Evaluation | PairEvaluation:
    """Score every token of some text once, as held-out text is scored in training.

    Text is normalised as the model's data was, and read whole: nothing is filtered. Bits per byte count the bytes of
    the normalised text. A model of others whose texts begin with a token of their own (`<s>`) sees it before each
    sequence.

    Args:
        given: a run or a model, or the path of one.
        files: text, JSONL or Parquet files (also compressed), or anything else that `data.source` takes. Default: a
            run's own held-out text, which is prepared again if the cache has lost it; a model has none.

    Returns:
        The scores; of a run's own preferences those of pairs.

    Raises:
        DataError: a file is missing, empty or not text, or the run's own data cannot be found any more.
        RunError: there are no files, and the model is not a run; or the model predicts nothing.
    """
    if isinstance(given, str | Path):
        given = load(given)
    model = language_model(given)
    model.require_tokens()
    if model.kind == "encoder":
        raise RunError(f"{model.path} is an encoder without a head: it predicts no tokens that could be scored.")
    data = given.config.data if isinstance(given, Run) else _data_of(model)
    batch = given.config.evaluate.batch if isinstance(given, Run) else max(1, _BATCH_TOKENS // data.sequence_length)
    if files is None:
        if not isinstance(given, Run):
            raise RunError(
                f"{model.path} is a model, which has no held-out text of its own: give files (--text FILE …)."
            )
        held_out = prepared_data(given.config, given.path, lambda _: None).validation
        if isinstance(held_out, ExampleFile):
            objective = objective_for(given.config.objective, model.model)
            kind = HeldOutPairs if given.config.objective.kind == "preference" else HeldOutRows
            return kind(objective, held_out, batch=batch, seconds=BRIEF).evaluate(model.params)
        assert isinstance(held_out, TokenFile), "a model of tokens has no labels"
        return _score(model, held_out, data.sequence_length, batch)
    listed = [files] if isinstance(files, str | Path) else list(files)
    with TemporaryDirectory(prefix="cramjax-") as directory:
        path = Path(directory) / "text.tokens"
        text_bytes = _write_tokens(path, [str(file) for file in listed], data, model.tokenizer)
        tokens = np.fromfile(path, model.tokenizer.dtype)
    return _score(model, TokenFile(tokens, text_bytes), data.sequence_length, batch)


def _data_of(model: LanguageModel) -> DataConfig:
    length = min(model.context, _LENGTH)
    return DataConfig(normalize=model.normalize, sequence_length=length)  # pyright: ignore[reportArgumentType]


def _write_tokens(path: Path, files: list[str], data: DataConfig, tokenizer: Tokenizer) -> int:
    """Write the tokens of some files and return the UTF-8 bytes of their text."""
    documents = clean(read_documents(find_sources(files), data), data, DigestSet(), Tally(), filtered=False)
    with closing(TokenWriter(path, tokenizer)) as writer:
        for document in documents:
            writer.append(document, tokenizer.encode_batch([document.text])[0])
    if writer.text_bytes == 0:
        raise DataError(f"there is no text in {', '.join(files)}: give files with at least one character.")
    return writer.text_bytes


def _score(given: LanguageModel, file: TokenFile, length: int, batch: int) -> Evaluation:
    causal = given.kind == "causal"
    objective = ObjectiveConfig(kind="causal" if causal else "masked", mask_rate=given.mask_rate)
    loss_function = objective_for(objective, given.model, mask_id=given.tokenizer.mask_id)
    first = given.tokenizer.begin_ids
    begin = first[0] if first else None
    held_out = HeldOut(loss_function, file, length, causal=causal, batch=batch, seconds=BRIEF, begin=begin)
    return held_out.evaluate(given.params)
