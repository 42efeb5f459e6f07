"""Tokenizers in GGUF: byte-level BPE, whose way of splitting text into words has a name in llama.cpp."""

import json
from collections.abc import Collection, Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from cramjax.data import Tokenizer
from cramjax.errors import ModelError

_CONTROL, _USER, _NORMAL, _UNUSED = 3, 4, 1, 5

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _splitters() -> dict[str, pre_tokenizers.PreTokenizer]:
    """How text becomes words, by llama.cpp's names."""
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return {
        "gpt-2": plain,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain]),
        "llama-bpe": _split(_LLAMA3),
        "qwen2": _split(_QWEN2),
    }


def read_backend(values: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer of a file's metadata.

    Raises:
        ModelError: it is no byte-level BPE, or splits text in a way that is not known here.
    """
    kind, pre = values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.pre", "gpt-2")
    tokens, merges = values.get("tokenizer.ggml.tokens"), values.get("tokenizer.ggml.merges")
    if kind != "gpt2" or not tokens or merges is None:
        raise ModelError(
            f"the file's tokenizer is of kind {kind!r}, and byte-level BPE ('gpt2') is read from GGUF: import the "
            "model's Hugging Face directory instead."
        )
    known = _splitters()
    if pre not in known:
        raise ModelError(
            f"the file's tokenizer splits text as {pre!r}, which is not known here ({', '.join(known)} are): import "
            "the model's Hugging Face directory instead."
        )
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    types = values.get("tokenizer.ggml.token_type") or []
    used = len(tokens)  # rows past the last token are filled up with unused ones
    while 0 < used <= len(types) and types[used - 1] == _UNUSED:
        used -= 1
    vocabulary = {token: index for index, token in enumerate(tokens[:used])}
    model = models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre == "llama-bpe")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = known[pre]
    backend.decoder = decoders.ByteLevel()
    for token, type_ in zip(tokens, types, strict=False):
        if type_ == _CONTROL:
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif type_ == _USER:
            backend.add_tokens([AddedToken(token, normalized=False)])
    begin = special_ids(values, ("bos",)).get("bos")
    if values.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe") and begin is not None:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{tokens[begin]} $A", pair=f"{tokens[begin]} $A $B:1", special_tokens=[(tokens[begin], begin)]
        )
    return backend


def special_ids(values: Mapping[str, Any], names: Collection[str]) -> dict[str, int]:
    """Ids of those special tokens that a file's metadata names.

    Raises:
        ModelError: one is no token of the file.
    """
    count = len(values.get("tokenizer.ggml.tokens") or ())
    found = {name: values.get(f"tokenizer.ggml.{name}_token_id") for name in names}
    for name, index in found.items():
        if index is not None and not 0 <= index < count:
            raise ModelError(
                f"the file's tokenizer.ggml.{name}_token_id is {index}, and it has tokens 0 to {count - 1}: copy or "
                "download it again, or import the model's Hugging Face directory instead."
            )
    return {name: index for name, index in found.items() if index is not None}


def write_backend(writer: Any, tokenizer: Tokenizer, rows: int) -> None:
    """Write a tokenizer's metadata.

    Args:
        writer: of the file.
        tokenizer: byte-level BPE.
        rows: of the vocabulary in the model; llama.cpp wants a token for each, so those beyond the tokenizer's are
            written as unused ones.

    Raises:
        ModelError: it is no byte-level BPE, or llama.cpp splits no text as it does.
    """
    state = json.loads(tokenizer.plain_json())
    pre = _splitter_of(tokenizer.backend)
    if state["model"]["type"] != "BPE" or pre is None or state.get("normalizer") is not None:
        raise ModelError(
            "llama.cpp has no name for how this tokenizer splits text, so its tokens would differ: use --format hf, or "
            f"train with the tokenizer.json of another model (tokenizer.kind=file) that splits as {_names()} do."
        )
    special = {token["id"]: token["special"] for token in state["added_tokens"]}
    texts = {index: token for token, index in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([texts.get(index, f"[unused{index}]") for index in range(rows)])
    unknown = {index: _UNUSED for index in range(rows) if index not in texts}
    kinds = {index: _CONTROL if is_special else _USER for index, is_special in special.items()} | unknown
    writer.add_token_types([kinds.get(index, _NORMAL) for index in range(rows)])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
    writer.add_token_merges(merges)
    begin = (tokenizer.separator_id,) if tokenizer.begin_ids is None else tokenizer.begin_ids
    writer.add_bos_token_id(begin[0] if begin else tokenizer.separator_id)
    writer.add_add_bos_token(bool(begin))
    writer.add_eos_token_id(tokenizer.separator_id)
    writer.add_pad_token_id(tokenizer.pad_id)


def _splitter_of(backend: tokenizers.Tokenizer) -> str | None:
    if backend.pre_tokenizer is None:
        return None
    state = json.loads(backend.pre_tokenizer.__getstate__())
    return next((name for name, each in _splitters().items() if _same(state, json.loads(each.__getstate__()))), None)


def _same(a: Any, b: Any) -> bool:
    """Whether two states split alike: offsets are no matter of ids."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = (set(a) | set(b)) - {"trim_offsets"}
        return all(_same(a.get(key), b.get(key)) for key in keys)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b


def _names() -> str:
    return ", ".join(_splitters())
