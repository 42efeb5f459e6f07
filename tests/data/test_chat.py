"""Conversations as tokens: three families' templates, written out by hand, and against `transformers`."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from cramjax.data import Tokenizer
from cramjax.data.examples.chat import PLAIN_TEMPLATE, chat_template, read_template, special_texts, turns_of
from cramjax.data.examples.pieces import Example, PieceEncoder
from cramjax.data.records import Record
from cramjax.errors import DataError

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim"
    " + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)


def byte_tokenizer(*special: str, begin: str | None = None, end: str) -> Tokenizer:
    """Bytes are their own ids, and special tokens follow; a text begins with one of these."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)  # as Llama 3's
    backend.add_special_tokens(list(special))
    begins = () if begin is None else (backend.token_to_id(begin),)
    return Tokenizer(backend, backend.token_to_id(end), None, backend.token_to_id(end), begins)


SMOLLM = byte_tokenizer("<|endoftext|>", "<|im_start|>", "<|im_end|>", end="<|im_end|>")
LLAMA = byte_tokenizer(
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    begin="<|begin_of_text|>",
    end="<|eot_id|>",
)
GEMMA_TOKENS = byte_tokenizer("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", begin="<bos>", end="<eos>")


def say(*contents: str, first: str = "user") -> list[dict[str, str]]:
    """Turns of the user and the assistant, one after the other."""
    roles = ["system"] * (first == "system") + ["user", "assistant"] * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def example(turns: list[dict[str, str]], template: str, tokenizer: Tokenizer) -> Example:
    encoder = PieceEncoder(tokenizer)
    return encoder.encode(chat_template(template, encoder).pieces(turns, "a.jsonl, line 1"))


def written(tokenizer: Tokenizer, *parts: tuple[str, int]) -> tuple[list[int], list[int]]:
    """Ids and predictions of parts that were written by hand: a special token's name or a text, and 1 if predicted."""
    ids: list[int] = []
    predicted: list[int] = []
    for text, flag in parts:
        special = tokenizer.backend.token_to_id(text) if text.startswith("<") and text.endswith(">") else None
        own = list(text.encode()) if special is None else [special]
        ids, predicted = ids + own, predicted + [flag] * len(own)
    return ids, predicted


CASES = {
    "chatml": (
        say("Hi", "Hé! 🐋\n", "bye", ""),
        CHATML,
        SMOLLM,
        [
            ("<|im_start|>", 0),
            ("system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face", 0),
            ("<|im_end|>", 0),
            ("\n", 0),
            ("<|im_start|>", 0),
            ("user\nHi", 0),
            ("<|im_end|>", 0),
            ("\n", 0),
            ("<|im_start|>", 0),
            ("assistant\n", 0),
            ("Hé! 🐋\n", 1),
            ("<|im_end|>", 1),
            ("\n", 0),
            ("<|im_start|>", 0),
            ("user\nbye", 0),
            ("<|im_end|>", 0),
            ("\n", 0),
            ("<|im_start|>", 0),
            ("assistant\n", 0),
            ("<|im_end|>", 1),
            ("\n", 0),
        ],
    ),
    "llama3": (
        say("be brief", " 2+2? ", "\n 4 ", first="system"),
        LLAMA3,
        LLAMA,
        [
            ("<|begin_of_text|>", 0),
            ("<|start_header_id|>", 0),
            ("system", 0),
            ("<|end_header_id|>", 0),
            ("\n\nbe brief", 0),
            ("<|eot_id|>", 0),
            ("<|start_header_id|>", 0),
            ("user", 0),
            ("<|end_header_id|>", 0),
            ("\n\n2+2?", 0),
            ("<|eot_id|>", 0),
            ("<|start_header_id|>", 0),
            ("assistant", 0),
            ("<|end_header_id|>", 0),
            ("\n\n", 0),
            ("4", 1),
            ("<|eot_id|>", 1),
        ],
    ),
    "gemma": (
        say("one", "two", "three", "four", "five"),  # what follows the last answer predicts nothing
        GEMMA,
        GEMMA_TOKENS,
        [
            ("<bos>", 0),
            ("<start_of_turn>", 0),
            ("user\none", 0),
            ("<end_of_turn>", 0),
            ("\n", 0),
            ("<start_of_turn>", 0),
            ("model\n", 0),
            ("two", 1),
            ("<end_of_turn>", 1),
            ("\n", 0),
            ("<start_of_turn>", 0),
            ("user\nthree", 0),
            ("<end_of_turn>", 0),
            ("\n", 0),
            ("<start_of_turn>", 0),
            ("model\n", 0),
            ("four", 1),
            ("<end_of_turn>", 1),
            ("\n", 0),
        ],
    ),
    "plain": (
        say("be kind", "Hi", "Hello", first="system"),
        PLAIN_TEMPLATE,
        byte_tokenizer("<s>", "</s>", begin="<s>", end="</s>"),
        [
            ("<s>", 0),
            ("System:\nbe kind\n\nUser:\nHi\n\nAssistant:\n", 0),
            ("Hello", 1),
            ("</s>", 1),
            ("\n\n", 0),
        ],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_the_assistant_says_and_the_end_of_its_turn_are_predicted(name: str) -> None:
    turns, template, tokenizer, parts = CASES[name]
    found = example(turns, template, tokenizer)
    ids, predicted = written(tokenizer, *parts)
    assert found.ids.tolist() == ids
    assert found.predicted.astype(int).tolist() == predicted
    texts = [text for text, flag in parts if flag and not text.startswith("<")]
    assert found.text_bytes == sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("name", CASES)
def test_special_tokens_in_what_is_said_are_text(name: str) -> None:
    _, template, tokenizer, _ = CASES[name]
    names = PieceEncoder(tokenizer).special_names
    said = f"a{names[0]}{names[1]} b{names[-1]}"
    found = example(say(said, said), template, tokenizer)
    plain = example(say("a", "a"), template, tokenizer)
    ids = found.ids.tolist()
    assert [i for i in ids if i >= 256] == [i for i in plain.ids.tolist() if i >= 256]
    predicted = [i for i, flag in zip(ids, found.predicted, strict=True) if flag]
    assert bytes(predicted[:-1]).decode() == said and predicted[-1] >= 256
    assert found.text_bytes == len(said.encode())


def test_words_that_cross_from_the_prompt_into_the_answer_are_predicted() -> None:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "c": 3}, merges=[("a", "b")]))
    backend.add_special_tokens(["<e>"])
    tokenizer = Tokenizer(backend, 4, None, 4, ())
    template = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<e>{% endif %}{% endfor %}"
    found = example(say("ca", "bc"), template, tokenizer)
    assert found.ids.tolist() == [3, 2, 3, 4]
    assert found.predicted.tolist() == [False, True, True, True]


def test_ids_and_predictions_are_those_of_transformers() -> None:
    """With the answer marked in the template itself, and words of several letters."""
    transformers = pytest.importorskip("transformers")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["what the assistant says to the user of the system\n\n"] * 9, trainer)
    template = (
        "{%- for message in messages %}\n    {{- '<|im_start|>' + message.role + '\\n' }}\n"
        "    {%- if message.role == 'assistant' %}\n"
        "        {%- generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}\n"
        "    {%- else %}{{ message.content + '<|im_end|>' }}{% endif %}\n    {{- '\\n' }}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    end = backend.token_to_id("<|im_end|>")
    own = Tokenizer(backend, end, None, end, ())
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(backend.to_str()), eos_token="<|im_end|>"
    )
    theirs.chat_template = template
    for turns in (
        say("what the user says", "the system says: naïve 🐋 of  spaces ", "to", "\n\nsays"),
        say("be the system", "says?", "the user\n", first="system"),
    ):
        expected = theirs.apply_chat_template(turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        found = example(turns, template, own)
        assert found.ids.tolist() == expected["input_ids"]
        assert found.predicted.astype(int).tolist() == expected["assistant_masks"]
        assert len(found.ids) < found.text_bytes + 100  # that is, words were found


def test_both_shapes_of_conversations() -> None:
    role = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    sharegpt = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    turns = turns_of(Record(role, "here"), None)
    assert turns == turns_of(Record(sharegpt, "here"), None) == say("a", "b")
    assert turns == turns_of(Record({"talk": role["messages"]}, "here"), "talk")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text": "a"}, r"t\.jsonl, line 4: no field 'messages'. It has text"),
        ({"messages": []}, r"line 4: field 'messages' must be a list of turns, got \[\]"),
        ({"messages": "Hi"}, r"must be a list of turns, got 'Hi'"),
        ({"messages": ["Hi"]}, r"line 4, turn 1 must be \{role, content\} or \{from, value\}, got 'Hi'"),
        (
            {"messages": [*say("a"), {"role": "bot", "content": "b"}]},
            r"line 4, turn 2 has the role 'bot'. Roles are",
        ),
        ({"messages": [{"role": ["user"], "content": "b"}]}, r"line 4, turn 1 has the role \['user'\]. Roles are"),
        ({"messages": [{"role": "user", "content": None}]}, r"line 4, turn 1 has no 'content'"),
        ({"messages": [{"from": "human", "value": 3}]}, r"line 4, turn 1: 'value' holds a number, and must be a text"),
        ({"messages": say("a")}, r"line 4: no turn of the assistant, so nothing to predict"),
    ],
)
def test_rows_without_a_conversation(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        turns_of(Record(values, "t.jsonl, line 4"), None)


@pytest.mark.parametrize(
    ("turns", "template", "tokenizer", "message"),
    [
        (
            say("s", "a", "b", first="system"),
            GEMMA,
            GEMMA_TOKENS,
            r"line 1: .* cannot render it \(System role n",
        ),
        (say("a", "b"), "{{ messages[0].content + 1 }}", SMOLLM, "line 1: the chat template cannot render it"),
        (say("a", "b"), CHATML, LLAMA, r"ends an answer with 'b<\|im_end\|>\\n', in which there is no special token"),
        (
            say("a", "b", "c", "d"),
            "{% for m in messages %}{{ m.content if loop.last else '…' }}<|im_end|>{% endfor %}",
            SMOLLM,
            "line 1: the chat template writes the turns before turn 2 otherwise once it is there",
        ),
    ],
)
def test_templates_that_do_not_fit(turns: Any, template: str, tokenizer: Tokenizer, message: str) -> None:
    with pytest.raises(DataError, match=message):
        example(turns, template, tokenizer)


def test_templates_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no Jinja template \(line 1: .*\). Give another"):
        chat_template("{% for %}", PieceEncoder(SMOLLM))
    with pytest.raises(DataError, match=r"examples\.template is '.*none\.jinja', a file that cannot be read"):
        read_template(str(tmp_path / "none.jinja"), None)
    (tmp_path / "own.jinja").write_text(CHATML, encoding="utf-8")
    assert read_template(str(tmp_path / "own.jinja"), GEMMA) == CHATML
    assert [read_template("auto", GEMMA), read_template("auto", None)] == [GEMMA, PLAIN_TEMPLATE]
    assert read_template("plain", GEMMA) == PLAIN_TEMPLATE


def test_templates_cannot_reach_outside() -> None:
    with pytest.raises(DataError, match="cannot render it"):
        example(say("a", "b"), "{{ ''.__class__.__mro__ }}<|im_end|>{{ messages.append(1) }}", SMOLLM)


@pytest.mark.parametrize("name", CASES)
def test_ids_of_every_template_are_those_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    turns, template, tokenizer, _ = CASES[name]
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(tokenizer.plain_json()), **special_texts(tokenizer)
    )
    answered = turns if turns[-1]["role"] == "assistant" else turns[:-1]
    expected = theirs.apply_chat_template(answered, chat_template=template, tokenize=True, return_dict=True)
    np.testing.assert_array_equal(example(turns, template, tokenizer).ids, expected["input_ids"])


def test_the_date_is_that_of_llama_templates_without_one() -> None:
    """SmolLM3's template asks for the day outright; Llama 3's falls back to its own."""
    asking = "{% set day = strftime_now('%d %b %Y') %}"
    falling_back = f"{{% if strftime_now is defined %}}{asking}{{% else %}}{{% set day = '26 Jul 2024' %}}{{% endif %}}"
    for source in (asking, falling_back):
        assert chat_template(source + "{{ day }}", PieceEncoder(SMOLLM)).render(say("a")) == "26 Jul 2024"
