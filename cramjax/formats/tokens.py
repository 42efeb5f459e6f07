"""Tokenizers of others: which of their tokens separate, mask, pad and begin, and their chat templates; both ways."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from cramjax.data import Tokenizer
from cramjax.data.tokenizer import MASKS, PADS, SEPARATORS
from cramjax.errors import ModelError

CHAT_TEMPLATE = "chat_template.jinja"


def read_json(file: Path) -> dict[str, Any]:
    """A JSON mapping.

    Raises:
        ModelError: it is missing or something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{file} does not exist: copy or download it.") from None
    except ValueError:  # not UTF-8, not JSON
        raise ModelError(f"{file} is not JSON: copy or download it again.") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file} must be a JSON mapping, got a {type(content).__name__}: copy or download it again.")
    return content


def read_text(file: Path) -> str | None:
    """The text of a file; None where there is none.

    Raises:
        ModelError: it is not text.
    """
    if not file.is_file():
        return None
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ModelError(f"{file} is not text: copy or download it again.") from None


def read_tokenizer(directory: Path, config: Mapping[str, Any], *, causal: bool) -> Tokenizer:
    """The tokenizer of a Hugging Face directory, with the roles that its files give to special tokens.

    Args:
        directory: holds `tokenizer.json`, and perhaps `tokenizer_config.json`, `special_tokens_map.json` and
            `generation_config.json`.
        config: the contents of `config.json`.
        causal: whether the model continues text, so that its end of text separates; else `[SEP]` does.

    Raises:
        ModelError: there is no tokenizer.json, it is damaged, or no token of it can separate documents.
    """
    file = directory / "tokenizer.json"
    if not file.is_file():
        others = [name for name in ("tokenizer.model", "vocab.json", "vocab.txt") if (directory / name).exists()]
        raise ModelError(
            f"{directory} has no tokenizer.json{f', only {others[0]}' if others else ''}: make one with "
            'transformers.AutoTokenizer.from_pretrained("DIR").save_pretrained("DIR").'
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{file} is not a tokenizer.json ({error}): copy or download it again.") from None
    if isinstance(config.get("vocab_size"), int):
        backend = _within(backend, config["vocab_size"])
    named = {
        **_optional(directory / "special_tokens_map.json"),
        **_optional(directory / "tokenizer_config.json"),
    }
    ended = [
        *_ids(_optional(directory / "generation_config.json").get("eos_token_id")),
        *_ids(config.get("eos_token_id")),
    ]
    return with_roles(backend, named, ended, causal=causal, where=str(file))


def with_roles(
    backend: tokenizers.Tokenizer, named: Mapping[str, Any], ended: list[int], *, causal: bool, where: str
) -> Tokenizer:
    """A tokenizer with roles for its special tokens.

    Args:
        backend: of the library.
        named: special tokens by role (`eos_token`, `sep_token`, `mask_token`, `pad_token`), as texts or mappings.
        ended: ids of tokens that end a text, by other files.
        causal: see `read_tokenizer`.
        where: what messages call it.

    Raises:
        ModelError: no token of it can separate documents.
    """
    backend.no_padding()
    backend.no_truncation()

    def find(roles: tuple[str, ...], names: tuple[str, ...]) -> int | None:
        given = [named.get(role) for role in roles]
        texts = [item.get("content") if isinstance(item, Mapping) else item for item in given]
        known = [backend.token_to_id(text) for text in [*texts, *names] if isinstance(text, str)]
        return next((index for index in known if index is not None), None)

    count = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    ended = [token for token in dict.fromkeys(ended) if 0 <= token < count]
    separator = find(("eos_token",) if causal else ("sep_token", "eos_token"), ())
    if separator is None:
        separator = ended[0] if causal and ended else find((), SEPARATORS)
    if separator is None:
        raise ModelError(
            f"{where}: no token that can separate documents: name one as eos_token in tokenizer_config.json, or add "
            f"one of {', '.join(SEPARATORS)}."
        )
    pad = find(("pad_token",), PADS)
    return Tokenizer(
        backend,
        separator_id=separator,
        mask_id=find(("mask_token",), MASKS),
        pad_id=separator if pad is None else pad,
        begin_ids=_begin(backend),
        end_ids=tuple(token for token in ended if token != separator) if causal else (),
    )


def _within(backend: tokenizers.Tokenizer, rows: int) -> tokenizers.Tokenizer:
    """A tokenizer without the special tokens that were added past the rows of its model, which cannot read them.

    Gemma 3's has one for images, and its models of text alone have no row for it.
    """
    added = backend.get_added_tokens_decoder()
    beyond = {token.content for index, token in added.items() if index >= rows and token.special}
    if not beyond:
        return backend
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in beyond]
    if isinstance(state["model"].get("vocab"), dict):
        state["model"]["vocab"] = {text: i for text, i in state["model"]["vocab"].items() if text not in beyond}
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def _begin(backend: tokenizers.Tokenizer) -> tuple[int, ...]:
    """The tokens that the tokenizer's own template puts before a text."""
    plain, framed = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    for start in range(len(framed) - len(plain) + 1):
        if framed[start : start + len(plain)] == plain:
            return tuple(framed[:start])
    return ()


def read_chat_template(directory: Path) -> str | None:
    """A chat template in any of its three forms: a file of its own, a text or a list in `tokenizer_config.json`."""
    if (template := read_text(directory / CHAT_TEMPLATE)) is not None:
        return template
    given = _optional(directory / "tokenizer_config.json").get("chat_template")
    if given is None:
        given = _optional(directory / "chat_template.json").get("chat_template")
    if isinstance(given, list):  # several, by name
        named = {item.get("name"): item.get("template") for item in given if isinstance(item, Mapping)}
        given = named.get("default") or next(iter(named.values()), None)
    return given if isinstance(given, str) else None


def write_tokenizer(
    directory: Path, tokenizer: Tokenizer, chat_template: str | None, context: int, *, causal: bool
) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and the chat template, for `AutoTokenizer`.

    A tokenizer of ours gets a template that puts the separator before a text, as we do before a prompt.
    """
    backend = tokenizers.Tokenizer.from_str(tokenizer.plain_json())
    separator = _token(tokenizer, tokenizer.separator_id)
    if tokenizer.begin_ids is None:
        ends = "" if causal else f" {separator}:0"
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{separator}:0 $A:0{ends}",
            pair=f"{separator}:0 $A:0 {separator}:0 $B:0{ends}",
            special_tokens=[(separator, tokenizer.separator_id)],
        )
    backend.save(str(directory / "tokenizer.json"))
    begin = (tokenizer.separator_id,) if tokenizer.begin_ids is None else tokenizer.begin_ids
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "eos_token": separator,
        "pad_token": _token(tokenizer, tokenizer.pad_id),
    }
    if begin:
        config["bos_token"] = _token(tokenizer, begin[0])
    if tokenizer.mask_id is not None:
        config["mask_token"] = _token(tokenizer, tokenizer.mask_id)
    if not causal:
        config |= {"sep_token": separator, "cls_token": config.get("bos_token", separator)}
    unknown = getattr(backend.model, "unk_token", None)
    if unknown is not None:
        config["unk_token"] = unknown
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if chat_template is not None:
        (directory / CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")


def special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """Ids of special tokens as `config.json` and `generation_config.json` name them."""
    ends = tokenizer.ends
    ids: dict[str, Any] = {
        "eos_token_id": ends[0] if len(ends) == 1 else list(ends),
        "pad_token_id": tokenizer.pad_id,
    }
    begin = (tokenizer.separator_id,) if tokenizer.begin_ids is None else tokenizer.begin_ids
    return ids | {"bos_token_id": begin[0] if begin else None}


def _token(tokenizer: Tokenizer, index: int) -> str:
    return tokenizer.backend.id_to_token(index) or ""


def _optional(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _ids(given: Any) -> list[int]:
    values = given if isinstance(given, list) else [given]
    return [value for value in values if type(value) is int]
