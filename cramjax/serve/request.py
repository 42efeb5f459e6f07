"""What is asked of the engine, and what it answers: values, without a device in them."""

from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from cramjax.errors import ConfigError

Reason = Literal["stop", "length", "cancelled", "stuck"]
"""Why a request ended: a token that ends it or the end of its constraint, its limit of tokens or the context's, its
client, or a constraint that no token satisfies."""


class Constraint(Protocol):
    """What the tokens of one request may be (`cramjax.serve.constraints`). It is one request's, and changes with it."""

    @property
    def is_over(self) -> bool:
        """Whether nothing may come after what was taken."""
        ...

    @property
    def failure(self) -> str:
        """Why it allows nothing any more, where that is no fault of the tokens; else nothing."""
        ...

    def allow(self, words: NDArray[np.int32]) -> None:
        """Clear the bits of tokens that may not come next: bit t % 32 of word t // 32 is token t's."""
        ...

    def take(self, token: int) -> bool:
        """Learn what came next; False: it may not."""
        ...


@dataclass(frozen=True)
class SamplingParameters:
    """How the tokens of one request are drawn. The order: penalties and bias, temperature, top-k, top-p, min-p."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Keep only this many of the likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep only the likeliest tokens that together reach this probability (Holtzman et al. 2020)."""
    min_p: float = 0.0
    """Keep only tokens at least this share of the likeliest one's probability (arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Logits of tokens that prompt or text hold are divided by it if positive, else multiplied (Keskar et al. 2019)."""
    presence_penalty: float = 0.0
    """Taken from the logit of each token that was drawn before (OpenAI's)."""
    frequency_penalty: float = 0.0
    """Taken from the logit of a token for each time that it was drawn before (OpenAI's)."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Added to the logits of these tokens."""
    seed: int = 0
    """Of the draws: token n of a request depends on seed and n, not on what is computed beside it."""

    def __post_init__(self):
        checks = (
            ("temperature", self.temperature, 0.0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_k", self.top_k, self.top_k >= 0, "1 or more, or 0 for all tokens"),
            ("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("min_p", self.min_p, 0.0 <= self.min_p <= 1.0, "between 0 and 1"),
            ("repetition_penalty", self.repetition_penalty, 0.0 < self.repetition_penalty < float("inf"), "above 0"),
            ("presence_penalty", self.presence_penalty, abs(self.presence_penalty) <= 2.0, "between -2 and 2"),
            ("frequency_penalty", self.frequency_penalty, abs(self.frequency_penalty) <= 2.0, "between -2 and 2"),
        )
        for name, value, right, allowed in checks:
            if not right:
                raise ConfigError(f"{name} must be {allowed}, got {value}.")


@dataclass(frozen=True)
class Request:
    """A prompt to be continued."""

    prompt: tuple[int, ...]
    """Token ids, one or more."""
    max_tokens: int
    """Most tokens drawn; 0 computes the prompt's log-probabilities alone."""
    sampling: SamplingParameters = field(default_factory=SamplingParameters)
    stop_tokens: frozenset[int] = frozenset()
    """Tokens that end the text; they are part of what is answered."""
    top_logprobs: int | None = None
    """Give log-probabilities of drawn tokens, with those of so many likeliest ones (0: none of these)."""
    prompt_logprobs: bool = False
    """Give the log-probabilities of the prompt's tokens too (of the first: none)."""
    constraint: Constraint | None = None
    """What its tokens may be. None: anything."""
    salt: str = ""
    """Only requests with the same one share keys and values of their beginnings."""
    adapter: str | None = None
    """Which adapter it is for, of an engine that has some (`cramjax.serve.adapted`). None: the model itself."""
    drawn: int = 0
    """Tokens that were drawn for this text before: the next one is drawn as the one after them."""


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a token (before temperature and filters), and the likeliest ones in its place."""

    token: int
    logprob: float | None
    """None: of the first token of a prompt."""
    top: tuple[tuple[int, float], ...] = ()
    """Tokens and log-probabilities, likeliest first."""


@dataclass(frozen=True)
class Progress:
    """What a request has got since the last time."""

    tokens: tuple[int, ...] = ()
    """Drawn since then."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of each of them, where asked for."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Of the prompt's tokens, once, where asked for."""
    cached: int = 0
    """Tokens of the prompt whose keys and values were there already."""
    guessed: int = 0
    """Tokens that were guessed for it since then."""
    right: int = 0
    """Those of them that were drawn too."""
    reason: Reason | None = None
    """Why it ended; None: it goes on. Nothing comes after one with a reason."""
    why: str = ""
    """Of one that is stuck: what with."""
