"""Score text with a trained model: any files, or the held-out text of its run."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from cramjax.compiling import BRIEF
from cramjax.config import DataConfig
from cramjax.data import TokenFile, Tokenizer, prepare
from cramjax.data.clean import DigestSet, Tally, clean
from cramjax.data.sources import find_sources, read_documents
from cramjax.data.store import TokenWriter
from cramjax.errors import DataError
from cramjax.model import objective_for
from cramjax.training import Evaluation, HeldOut, Run


def evaluate_text(run: Run, files: str | Path | Sequence[str | Path] | None = None) -> Evaluation:
    """Score every token of some text once, as held-out text is scored in training.

    Text is normalised as the run's data was, and read whole: nothing is filtered. Bits per byte count the bytes of
    the normalised text.

    Args:
        run: a loaded run.
        files: text, JSONL or Parquet files (also compressed), or anything else that `data.source` takes. Default: the
            run's own held-out text, which is prepared again if the cache has lost it.

    Raises:
        DataError: a file is missing, empty or not text, or the run's own data cannot be found any more.
    """
    if files is None:
        return _score(run, prepare(run.config.data, run.config.tokenizer).validation)
    given = [files] if isinstance(files, str | Path) else list(files)
    with TemporaryDirectory(prefix="cramjax-") as directory:
        path = Path(directory) / "text.tokens"
        text_bytes = _write_tokens(path, [str(file) for file in given], run.config.data, run.tokenizer)
        tokens = np.fromfile(path, run.tokenizer.dtype)
    return _score(run, TokenFile(tokens, text_bytes))


def _write_tokens(path: Path, files: list[str], data: DataConfig, tokenizer: Tokenizer) -> int:
    """Write the tokens of some files and return the UTF-8 bytes of their text."""
    documents = clean(read_documents(find_sources(files), data), data, DigestSet(), Tally(), filtered=False)
    with closing(TokenWriter(path, tokenizer)) as writer:
        for document in documents:
            writer.append(document, tokenizer.encode_batch([document.text])[0])
    if writer.text_bytes == 0:
        raise DataError(f"there is no text in {', '.join(files)}: give files with at least one character.")
    return writer.text_bytes


def _score(run: Run, file: TokenFile) -> Evaluation:
    config = run.config
    loss_function = objective_for(config.objective, run.model, mask_id=run.tokenizer.mask_id)
    causal = config.objective.kind == "causal"
    length, batch = config.data.sequence_length, config.evaluate.batch
    return HeldOut(loss_function, file, length, causal=causal, batch=batch, seconds=BRIEF).evaluate(run.params)
