"""A conversation as the text that a model was trained on, by its chat template."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from cramjax.errors import RunError
from cramjax.language_model import LanguageModel

Message = Mapping[str, str]
"""`role` (system, user, assistant) and `content`."""


def render(model: LanguageModel, messages: Sequence[Message], *, reply: bool = True) -> str:
    """The text of a conversation; special tokens stand in it by name.

    Args:
        model: one with a chat template.
        messages: in order.
        reply: whether the text goes on with the start of the assistant's reply. Else the last message stays open, to be
            continued.

    Raises:
        RunError: the model has no template, or it does not take these messages.

    Source: `transformers`, whose templates these are: `apply_chat_template`.
    """
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if model.chat_template is None:
        raise RunError(f"{model.path} has no chat template: leave chat out, or use a model that was tuned to chat.")

    def refuse(message: str) -> NoReturn:
        raise jinja2.exceptions.TemplateError(message)

    def now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals |= {"raise_exception": refuse, "strftime_now": now}
    tokenizer = model.tokenizer
    named: dict[str, Any] = {
        "bos_token": tokenizer.backend.id_to_token(tokenizer.opening()[0]) or "",
        "eos_token": tokenizer.backend.id_to_token(tokenizer.separator_id) or "",
    }
    try:
        template = environment.from_string(model.chat_template)
        text = template.render(messages=[dict(m) for m in messages], add_generation_prompt=reply, **named)
    except jinja2.exceptions.TemplateError as error:
        raise RunError(f"the chat template of {model.path} does not take this conversation: {error}.") from None
    return text if reply else _open(text, messages[-1]["content"])


def _open(text: str, last: str) -> str:
    """The text without what the template puts after the last message."""
    end = text.rfind(last.strip())
    return text[: end + len(last.strip())]
