"""Turns text into tokens and back: trains byte-level BPE, WordPiece or bytes, or loads a `tokenizer.json`.

Documents are encoded by `encode_batch` (as they are, fast); prompts by `encode`, which normalises them. In both the
names of special tokens are text as any other: who wants a special token adds its id.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import yaml
from numpy.typing import NDArray
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from cramjax.config import TokenizerConfig
from cramjax.data.encode import bytes_encoder, library_encoder, word_encoder
from cramjax.errors import DataError

SEPARATOR, MASK, UNKNOWN = "<sep>", "[MASK]", "[UNK]"

SEPARATORS = (SEPARATOR, "[SEP]", "</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>", "<s>")
MASKS = (MASK, "<mask>", "<|mask|>")
PADS = ("[PAD]", "<pad>", "<|pad|>")

_PARTS = ("separator_id", "mask_id", "pad_id", "begin_ids", "end_ids")
_PARTS_KEY = "cramjax"

# Words are found with explicit character classes, because `\s` and `\p{L}` differ between regular expression engines,
# and the fast encoder must cut exactly where the tokenizers library does.
_SPACE = r" \t\n\r\f\v"
_PUNCTUATION = r"!-/:-@\[-`{-~"
_WIDE_PUNCTUATION = "\u00a1-\u00bf\u2010-\u205e\u3001-\u3020"
_LETTER = f"[^{_SPACE}0-9{_PUNCTUATION}{_WIDE_PUNCTUATION}]"
BPE_WORD = (
    f" ?{_LETTER}+|'(?:s|t|re|ve|m|ll|d)| ?[{_PUNCTUATION}{_WIDE_PUNCTUATION}]+"
    f"| ?[0-9]+|[{_SPACE}]+(?![^{_SPACE}])|[{_SPACE}]+"
)
WORDPIECE_WORD = f"[^{_SPACE}{_PUNCTUATION}]+|[{_PUNCTUATION}]"
"""What one word is, as in BERT's basic tokenizer: white space separates and is dropped; punctuation stands alone."""


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary and how text maps to it.

    Args:
        backend: The tokenizer of the `tokenizers` library.
        separator_id: Token that stands before and after every document.
        mask_id: Token that hides another from a masked model; None when the vocabulary has none.
        pad_id: Token that fills up short rows (the separator when the vocabulary has none).
        begin_ids: Tokens that stand before a text, where it is not the separator (another's `<s>` or `[CLS]`; or none).
        end_ids: Tokens that end a text, beside the separator.
    """

    backend: tokenizers.Tokenizer
    separator_id: int
    mask_id: int | None
    pad_id: int
    begin_ids: tuple[int, ...] | None = None
    end_ids: tuple[int, ...] = ()

    def opening(self, ids: Sequence[int] = ()) -> list[int]:
        """What stands before a text of some ids: at least one token, if it has none."""
        begin = [self.separator_id] if self.begin_ids is None else list(self.begin_ids)
        return begin or ([] if len(ids) else [self.separator_id])

    @property
    def ends(self) -> tuple[int, ...]:
        """All tokens that end a text."""
        return (self.separator_id, *(token for token in self.end_ids if token != self.separator_id))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the tokens that text is decoded without, unless they are asked for."""
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def dtype(self) -> np.dtype:
        """Narrowest unsigned integer that token files store ids in."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, normalised as the data was; everything in it is text."""
        return self._literal.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.unsignedinteger]]:
        """Ids of documents, in `dtype`: everything in them is text, and no normalisation is applied to them.

        Give this the output of `clean.normalize`; a loaded tokenizer (kind `file`) applies its own normaliser too.
        """
        return self._encode_documents(texts)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of token ids, with or without the names of special tokens."""
        return self.backend.decode(list(ids), skip_special_tokens=not special)

    def token(self, index: int) -> str:
        """Text of one token, special tokens by name."""
        return self.backend.decode([index], skip_special_tokens=False)

    def token_bytes(self, index: int) -> bytes:
        """Bytes of one token within a text; of a special token, those of its name."""
        name = self.backend.id_to_token(index) or ""
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return bytes([int(name[3:5], 16)])
        text = self.token(index)
        if "\ufffd" in text and all(letter in _BYTES for letter in name):
            return bytes(_BYTES[letter] for letter in name)
        return (name.replace("\u2581", " ") if name.startswith("\u2581") else text).encode("utf-8")

    def plain_json(self) -> str:
        """The text of a `tokenizer.json`, which other libraries read too; which token does what it does not say."""
        return self.backend.to_str(pretty=True)

    def to_json(self) -> str:
        """The same, with the parts of special tokens where their names do not tell; equal tokenizers give equal texts.

        Other libraries read it unless the names do not tell.
        """
        text = self.plain_json()
        try:
            told = _with_special_ids(self.backend, "")
        except DataError:
            told = None
        own = {name: getattr(self, name) for name in _PARTS}
        if told is not None and own == {name: getattr(told, name) for name in _PARTS}:
            return text
        return json.dumps({_PARTS_KEY: own, **json.loads(text)}, indent=2, ensure_ascii=False)

    def save(self, path: Path) -> None:
        """Write `to_json` to a file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @staticmethod
    def load(path: Path, **special: Any) -> "Tokenizer":
        """Read a `tokenizer.json`, written by `save` or from elsewhere.

        Args:
            path: The file.
            special: The fields of special tokens, where they are known. Default: found by their names.

        Raises:
            DataError: It is missing or damaged, or has no separator among `SEPARATORS` and none is given.
        """
        if not Path(path).is_file():
            raise DataError(f"{path}: no such tokenizer file. Give the path of a tokenizer.json.")
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not a tokenizer.json ({error}).") from error
        return Tokenizer.from_json(text, str(path), **special)

    @staticmethod
    def from_json(text: str, where: str, **special: Any) -> "Tokenizer":
        """The tokenizer of `to_json`'s text, or of another `tokenizer.json`'s.

        Args:
            text: what is in the file.
            where: names its origin in error messages.
            special: as for `load`.

        Raises:
            DataError: It is damaged, or has no separator among `SEPARATORS` and none is given.
        """
        try:
            if f'"{_PARTS_KEY}"' in text:
                state = json.loads(text)
                parts = state.pop(_PARTS_KEY, {})
                for name in ("begin_ids", "end_ids"):
                    parts |= {name: tuple(parts[name])} if parts.get(name) is not None else {}
                text, special = json.dumps(state), {**parts, **special}
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # The library raises bare Exception.
            raise DataError(f"{where}: not a tokenizer.json ({error}).") from error
        backend.no_padding()
        backend.no_truncation()
        return Tokenizer(backend, **special) if special else _with_special_ids(backend, where)

    @cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        literal = tokenizers.Tokenizer.from_str(self.backend.to_str())
        literal.encode_special_tokens = True  # that is, as text
        return literal

    @cached_property
    def _encode_documents(self) -> Callable[[Sequence[str]], list[NDArray[np.unsignedinteger]]]:
        word = _word_pattern(self.backend)
        if word is None:
            return library_encoder(self._literal, self.dtype)
        if _is_bytes(self.backend):
            return bytes_encoder(self.dtype)
        # Our own normalisers only repeat what cleaning did, slowly.
        literal = tokenizers.Tokenizer.from_str(self.backend.to_str())
        literal.encode_special_tokens = True
        literal.normalizer = None  # pyright: ignore[reportAttributeAccessIssue]
        return word_encoder(literal, word, self.dtype)


def make_tokenizer(config: TokenizerConfig, texts: Iterable[str], normalize: str = "none") -> Tokenizer:
    """The tokenizer a configuration asks for; `texts` are read only if it must be trained.

    Args:
        config: Kind, vocabulary size, path.
        texts: Normalised text, already limited to what may be read.
        normalize: As in `DataConfig`; trained tokenizers apply the same to prompts.

    Raises:
        DataError: The vocabulary is too small, the texts are empty, or a given file cannot be used.
    """
    if config.kind == "file":
        if config.path is None:
            raise DataError("tokenizer.kind is 'file' but tokenizer.path is not set. Give the path of a file.")
        path = Path(config.path).expanduser()
        return Tokenizer.load(path, **parts_beside(path))
    if config.kind == "bytes":
        return _bytes_tokenizer(normalize)
    return train_tokenizer(config, texts, normalize)


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str], normalize: str = "none") -> Tokenizer:
    """Train byte-level BPE (Radford et al. 2019, section 2.2) or WordPiece (Devlin et al. 2019) on texts.

    Args:
        config: `kind` is `bpe` or `wordpiece`; `vocab_size` counts the special tokens too.
        texts: Normalised text. Memory grows with the number of different words, not with its length.
        normalize: What the tokenizer applies to prompts; the texts are taken as they are.

    Raises:
        DataError: The vocabulary is too small to hold the alphabet.
    """
    if config.kind == "bpe":
        backend, special = tokenizers.Tokenizer(models.BPE()), [SEPARATOR, MASK]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer
        backend.pre_tokenizer = _split_words(BPE_WORD, byte_level=True)
        backend.decoder = decoders.ByteLevel()
    else:
        backend, special = tokenizers.Tokenizer(models.WordPiece(unk_token=UNKNOWN)), [SEPARATOR, MASK, UNKNOWN]
        alphabet = [chr(code) for code in range(33, 127)]
        trainer = trainers.WordPieceTrainer
        backend.pre_tokenizer = _split_words(WORDPIECE_WORD, byte_level=False)
        backend.decoder = decoders.WordPiece()
    sample = _Sample(texts)
    least = len(special) + len(alphabet)
    if config.vocab_size < least:
        raise DataError(
            f"tokenizer.vocab_size is {config.vocab_size}; {config.kind} needs at least {least} "
            f"({len(alphabet)} characters and {len(special)} special tokens)."
        )
    backend.train_from_iterator(
        sample,
        trainer(
            vocab_size=config.vocab_size,
            special_tokens=special,
            initial_alphabet=alphabet,
            limit_alphabet=max(len(alphabet), config.vocab_size // 4),
            show_progress=False,
        ),
    )
    return _normalizing(_commonest_first(backend, len(special), sample.kept), normalize)


class _Sample:
    """Passes texts on, and keeps the first few megabytes of them."""

    def __init__(self, texts: Iterable[str], characters: int = 4_000_000):
        self._texts, self._room = texts, characters
        self.kept: list[str] = []

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            if self._room > 0:
                self.kept.append(text[: self._room])
                self._room -= len(text)
            yield text


def _commonest_first(backend: tokenizers.Tokenizer, specials: int, texts: list[str]) -> tokenizers.Tokenizer:
    """The same tokenizer with its ids, after the special ones, in falling order of frequency in some texts.

    Training numbers tokens in the order of their merges; an adaptive softmax wants the common ones first.
    """
    counts = np.zeros(backend.get_vocab_size(), np.int64)
    for encoding in backend.encode_batch_fast(texts, add_special_tokens=False):
        np.add.at(counts, np.asarray(encoding.ids, np.int64), 1)
    order = np.argsort(-counts[specials:], kind="stable") + specials
    new_id = {int(old): new for new, old in enumerate([*range(specials), *order])}
    state = json.loads(backend.to_str())
    state["model"]["vocab"] = {token: new_id[index] for token, index in state["model"]["vocab"].items()}
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def require_mask(tokenizer: Tokenizer) -> int:
    """The mask token of a tokenizer.

    Raises:
        DataError: It has none, so that a masked model cannot be trained with it.
    """
    if tokenizer.mask_id is None:
        raise DataError(
            f"the tokenizer has no mask token, which the masked objective needs: none of {', '.join(MASKS)}. "
            "Add one to tokenizer.json, train a tokenizer (tokenizer.kind=wordpiece), or set objective.kind=causal."
        )
    return tokenizer.mask_id


def sentence_ends(tokenizer: Tokenizer) -> list[int]:
    """Ids of the tokens that end a sentence: their text ends in a full stop, question or exclamation mark."""
    ids = range(tokenizer.vocab_size)
    texts = tokenizer.backend.decode_batch([[index] for index in ids], skip_special_tokens=False)
    return [index for index, text in zip(ids, texts, strict=True) if text.rstrip().endswith((".", "?", "!"))]


def _bytes_tokenizer(normalize: str) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(vocab=_byte_vocabulary(), merges=[]))
    backend.pre_tokenizer = _split_words(BPE_WORD, byte_level=True)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([SEPARATOR, MASK])
    return _normalizing(backend, normalize)


def _byte_vocabulary() -> dict[str, int]:
    """Byte b is token b; the keys are the printable characters that stand for bytes in byte-level tokenizers."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_vocabulary()


def _is_bytes(backend: tokenizers.Tokenizer) -> bool:
    return isinstance(backend.model, models.BPE) and backend.get_vocab(with_added_tokens=False) == _byte_vocabulary()


def _split_words(pattern: str, *, byte_level: bool) -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    if not byte_level:
        return words
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _word_pattern(backend: tokenizers.Tokenizer) -> str | None:
    """The pattern of words if the backend is one of ours; only then may words be encoded one by one."""
    if backend.pre_tokenizer is None:
        return None
    state = backend.pre_tokenizer.__getstate__()
    for pattern, byte_level in ((BPE_WORD, True), (WORDPIECE_WORD, False)):
        if json.loads(state) == json.loads(_split_words(pattern, byte_level=byte_level).__getstate__()):
            return pattern
    return None


def _normalizing(backend: tokenizers.Tokenizer, normalize: str) -> Tokenizer:
    normalizer = {
        "none": None,
        "nfc": normalizers.NFC(),
        "nfkc": normalizers.NFKC(),
        "ascii_lower": normalizers.Sequence(
            [normalizers.NFD(), normalizers.Replace(Regex(r"[^\x00-\x7f]"), ""), normalizers.Lowercase()]
        ),
    }[normalize]
    if normalizer is not None:
        backend.normalizer = normalizer
    return _with_special_ids(backend, "the trained tokenizer")


def parts_beside(path: Path) -> dict[str, Any]:
    """What the `model.yaml` of a model directory says of the special tokens of the vocabulary beside it."""
    file = path.with_name("model.yaml")
    if path.name != "tokenizer.json" or not file.is_file():
        return {}
    try:
        said = yaml.safe_load(file.read_text(encoding="utf-8"))
        parts = {name: said[name] for name in _PARTS if name in said}
    except (UnicodeDecodeError, yaml.YAMLError, TypeError) as error:
        raise DataError(f"{file} cannot be read ({error}): copy the model again, or make it again.") from None
    return {name: tuple(value) if isinstance(value, list) else value for name, value in parts.items()}


def _with_special_ids(backend: tokenizers.Tokenizer, where: str) -> Tokenizer:
    def find(names: Sequence[str]) -> int | None:
        return next((index for name in names if (index := backend.token_to_id(name)) is not None), None)

    separator = find(SEPARATORS)
    if separator is None:
        special = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
        raise DataError(
            f"{where}: no token that can separate documents. Its special tokens are {special or 'none'}; "
            f"one of {', '.join(SEPARATORS)} is needed. Add one to tokenizer.json or train a tokenizer."
        )
    pad = find(PADS)
    return Tokenizer(backend, separator, find(MASKS), separator if pad is None else pad)
