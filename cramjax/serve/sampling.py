"""How the tokens of a text are drawn, as users of one say it; the engine has more ways (`cramjax.serve.request`)."""

from dataclasses import dataclass

from cramjax.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int | None = None
    """Keep only this many of the likeliest tokens."""
    top_p: float | None = None
    """Keep only the likeliest tokens that together reach this probability (after temperature and `top_k`)."""

    def __post_init__(self):
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature must be 0 (greedy) or more, got {self.temperature}: 0.8 is a usual value.")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k must be 1 or more, got {self.top_k}: leave it out to keep every token.")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ConfigError(
                f"top_p must be above 0 and at most 1, got {self.top_p}: leave it out to keep every token."
            )
