"""What happens before an engine's first request: its programs' arguments are made up, and its results are checked; and
before each request: it is checked.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cramjax.errors import ConfigError, RunError
from cramjax.language_model import LanguageModel
from cramjax.serve.constraints import words_of
from cramjax.serve.engine.batch import Shapes
from cramjax.serve.engine.compiled import Name
from cramjax.serve.engine.draw import ways
from cramjax.serve.engine.programs import STOPS, Pool, Rows
from cramjax.serve.request import Progress, Request, SamplingParameters

BIASES = 300
"""Tokens whose logits a request can change (OpenAI's limit)."""


def arguments(params: Any, drafts: Any, pool: Pool, shapes: Shapes, context: int) -> dict[Name, tuple[Any, ...]]:
    """What each of an engine's programs is compiled for, by its name.

    Args:
        params: of the model.
        drafts: of a draft model; None: there is none.
        pool: of the engine.
        shapes: of calls.
        context: tokens of a request.
    """
    vocab = pool.history.bias.shape[1]

    def rows(batch: int, long: int, width: int) -> Rows:
        row, integer = np.zeros(batch, np.int32), np.int32
        return Rows(
            tokens=np.zeros((batch, long), integer),
            counts=row,
            held=row,
            last=row,
            segment=row,
            segments=np.zeros((batch, 0 if shapes.separator is None else width * shapes.page), integer),
            table=np.zeros((batch, width), integer),
            slots=row,
            drawn=row,
            room=row,
            stops=np.zeros((batch, STOPS), integer),
            logprobs=row.astype(bool),
            ways=ways([SamplingParameters(temperature=0.0)], batch),
            allowed=np.zeros((batch, words_of(vocab)), integer),
            constrained=row.astype(bool),
            virtual=shapes.virtual,
        )

    made: dict[Name, tuple[Any, ...]] = {}
    for batch, long in shapes.prefill:
        for width in shapes.widths(long):
            made["prefill", batch, long, width] = params, pool, rows(batch, long, width), None
    for batch in shapes.step:
        for width in shapes.pages:
            made["step", batch, width] = params, pool, rows(batch, 1, width), np.int32(0)
    for batch in shapes.verify:
        for width in shapes.widths(1 + shapes.guesses):
            own = rows(batch, 1 + shapes.guesses, width)
            if drafts is None:
                made["verify", batch, width] = params, pool, own
            else:
                made["speculate", batch, width] = (params, drafts), pool, own
    for batch, long in shapes.prefill if drafts is not None else ():
        for width in shapes.widths(long):
            made["follow", batch, long, width] = drafts, pool, rows(batch, long, width)
    for width in shapes.widths(shapes.scored):
        targets = np.zeros((1, shapes.scored), np.int32)
        made["score", 1, shapes.scored, width] = params, pool, rows(1, shapes.scored, width), targets
    tokens, biases = np.zeros(context, np.int32), np.zeros(BIASES, np.int32)
    made["begin",] = None, pool, np.int32(0), tokens, tokens, biases, biases.astype(np.float32)
    return made


def check_request(request: Request, context: int, vocab_size: int) -> None:
    """Refuse a request that cannot be answered.

    Args:
        request: what is asked for.
        context: tokens that it can have, prompt and text together.
        vocab_size: of the model.

    Raises:
        ConfigError: no tokens, tokens that are none, or more than the context.
    """
    if not request.prompt:
        raise ConfigError("prompt must have one token or more, got none.")
    if request.max_tokens < 0 or (request.max_tokens == 0 and not request.prompt_logprobs):
        raise ConfigError(f"max_tokens must be 1 or more, got {request.max_tokens}.")
    if len(request.prompt) + request.max_tokens > context:
        raise ConfigError(
            f"prompt and max_tokens must be at most {context} tokens together (the context), got "
            f"{len(request.prompt)} and {request.max_tokens}."
        )
    wrong = [token for token in request.prompt if not 0 <= token < vocab_size]
    if wrong:
        raise ConfigError(f"prompt must be tokens from 0 to {vocab_size - 1}, got {wrong[0]}.")
    bias = request.sampling.logit_bias
    wrong = [token for token, _ in bias if not 0 <= token < vocab_size]
    if wrong:
        raise ConfigError(f"logit_bias must be of tokens from 0 to {vocab_size - 1}, got {wrong[0]}.")
    if len(bias) > BIASES:
        raise ConfigError(f"logit_bias must have at most {BIASES} tokens, got {len(bias)}.")


def checked_tokens(context: int, shapes: Shapes, *, coded: bool) -> int:
    """Tokens of a text that an engine is checked with: where keys and values are in codes, those in full yet, and
    none where a prompt of virtual tokens is not.

    Args:
        context: tokens of a request.
        shapes: of calls.
        coded: whether pages hold codes.
    """
    if not coded:
        return min(8, context)
    return 0 if shapes.virtual else min(8, context, shapes.page)


def check(model: LanguageModel, prompt: tuple[int, ...], got: list[Progress]) -> None:
    """Compare what an engine gave with the whole forward pass.

    Some releases of jax compute wrong results on CPUs (0.10.2: https://github.com/jax-ml/jax/issues/39103).

    Args:
        model: of the engine.
        prompt: what was continued.
        got: what came, log-probabilities among it.

    Raises:
        RunError: log-probabilities differ by more than roundings do.
    """
    stack = model.model
    logprobs = [each for progress in got for each in progress.logprobs]
    whole = jnp.asarray([[*prompt, *(each.token for each in logprobs)]], jnp.int32)

    @jax.jit
    def expected(params: Any, tokens: Any) -> Any:
        logits = stack.logits(params, stack.hidden(params, tokens)).astype(jnp.float32)
        return jax.nn.log_softmax(logits, axis=-1)[0, len(prompt) - 1 : -1]

    right = np.asarray(expected(model.params, whole))
    errors = [abs(each.logprob - row[each.token]) for each, row in zip(logprobs, right, strict=True)]
    allowed = 1e-3 if stack.compute_dtype == "float32" else 0.2
    if not max(errors) <= allowed:
        raise RunError(
            f"this model is computed wrong here: log-probabilities of tokens drawn one after the other are off by "
            f"{max(errors):.3g} (jax {jax.__version__}, {jax.default_backend()}): use another release of jax."
        )
