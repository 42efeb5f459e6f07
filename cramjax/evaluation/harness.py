"""Our models for lm-evaluation-harness (extra `eval`), whose tasks then run on run and model directories.

    import lm_eval
    from cramjax.evaluation.harness import CramjaxLM

    lm_eval.simple_evaluate(model=CramjaxLM("runs/mine"), tasks=["arc_easy"])

It gives what the harness's own `hf` model gives of the same weights. The harness knows it as `cramjax`, once this
module is imported.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

try:
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs  # pyright: ignore[reportMissingImports]
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as error:
    if error.name != "lm_eval":
        raise
    from cramjax.errors import RunError

    raise RunError("lm-evaluation-harness is not installed: pip install 'cramjax[eval]'.") from None

from cramjax.errors import ConfigError
from cramjax.evaluation.continuation import continuations
from cramjax.evaluation.encoding import opened
from cramjax.evaluation.likelihood import Tokens, loglikelihoods, require_causal
from cramjax.language_model import template_of
from cramjax.serve.sampling import Sampling
from cramjax.training.given import Given, language_model, load

_MAX_TOKENS = 256
"""Of a continuation, where a task does not say: the harness's own default."""
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p")


@register_model("cramjax")
class CramjaxLM(TemplateLM):
    """A causal model as the harness sees one.

    Args:
        pretrained: a run or a model, or the path of one.
        checkpoint: of a run's path: the newest weights, or those with the lowest held-out bits per byte.
        prefix_token_id: token that stands in the place of an empty context. Default: what stands before a text. Give
            the id of `bos_token` for models whose tokenizer names one and puts it before no text (SmolLM2-Instruct: 1).
        max_tokens: most tokens of a continuation, where a task does not say.
        seed: of continuations that are drawn.
        batch_size: ignored: batches are as large as their rows' lengths allow.
        max_batch_size: ignored too.
        device: ignored: JAX's own.

    Raises:
        UserError: the path is neither a run nor a model directory, or the model is not causal.
    """

    def __init__(
        self,
        pretrained: Given,
        *,
        checkpoint: Literal["best", "latest"] = "latest",
        prefix_token_id: int | None = None,
        max_tokens: int = _MAX_TOKENS,
        seed: int = 0,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
    ):
        super().__init__()
        del batch_size, max_batch_size, device
        self._model = language_model(load(pretrained, checkpoint) if isinstance(pretrained, str | Path) else pretrained)
        require_causal(self._model)
        self._prefix, self._max_tokens, self._seed = prefix_token_id, max_tokens, seed

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._model.tokenizer.separator_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is."""
        return self._model.tokenizer.opening()[-1] if self._prefix is None else self._prefix

    @property
    def max_length(self) -> int:
        """Tokens that the model sees."""
        return self._model.context

    @property
    def max_gen_toks(self) -> int:
        """Most tokens of a continuation, where a task does not say."""
        return self._max_tokens

    @property
    def tokenizer_name(self) -> str:
        """Names the model in the harness's caches of prompts."""
        return str(self._model.path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, with what stands before every text unless `add_special_tokens` is False.

        Special tokens that the text names are those tokens, as for the harness's other models.
        """
        del kwargs
        ids = self._model.tokenizer.backend.encode(string, add_special_tokens=False).ids
        return ids if add_special_tokens is False else opened(self._model.tokenizer, ids)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Tokens, Tokens]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        del disable_tqdm, kwargs
        answers = [
            (each.total, each.greedy) for each in loglikelihoods(self._model, [request[1:] for request in requests])
        ]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows as long as the context."""
        del disable_tqdm
        own = [
            list(map(make_disjoint_window, get_rolling_token_windows(self.tok_encode(text), *self._window, 1)))
            for text in (request.args[0] for request in requests)
        ]
        each = iter(loglikelihoods(self._model, [window for windows in own for window in windows]))
        totals = [sum(next(each).total for _ in windows) for windows in own]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    @property
    def _window(self) -> tuple[int, int]:
        return self.prefix_token_id, self.max_length

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context; requests that are continued alike go together."""
        del disable_tqdm
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(number)
        texts = [""] * len(requests)
        for numbers in alike.values():
            prompts = [self.tok_encode(requests[number].args[0]) for number in numbers]
            options = self._options(requests[numbers[0]].args[1])
            for number, text in zip(numbers, continuations(self._model, prompts, **options), strict=True):
                texts[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return texts

    def _options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What a task says of its continuations, for `continuations`."""
        kwargs: dict[str, Any] = {**normalize_gen_kwargs(dict(given), self.max_gen_toks)}
        stop = handle_stop_sequences(list(kwargs.pop("until")), eos=None)
        max_tokens = kwargs.pop("max_gen_toks")
        drawn = {name: kwargs.pop(name) for name in _SAMPLING if name in kwargs}
        if kwargs:
            raise ConfigError(
                f"a task asks for {', '.join(kwargs)} in its generation_kwargs: known are until, max_gen_toks and "
                f"{', '.join(_SAMPLING)}."
            )
        sampling = Sampling(temperature=0.0)
        if drawn.pop("do_sample"):
            sampling = Sampling(drawn["temperature"], drawn.get("top_k") or None, drawn.get("top_p"))
        stop = [text for text in stop if text]
        return {"max_tokens": max_tokens, "stop": stop, "sampling": sampling, "seed": self._seed}

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the text that the model's chat template makes of it.

        It goes on with the start of the assistant's reply; else the last message stays open, to be continued.
        """
        text = template_of(self._model).render(chat_history, prompt=add_generation_prompt)
        return text if add_generation_prompt else _open(text, chat_history[-1]["content"].strip())

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's chat template, for the harness's records."""
        return self._model.chat_template if chat_template else None


def _open(text: str, last: str) -> str:
    """A conversation without what the template puts after the last message."""
    return text[: text.rfind(last) + len(last)]
