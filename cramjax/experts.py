"""What experts of a model are: the group `model.experts` of a recipe. Imports no jax."""

from dataclasses import dataclass
from typing import Literal

from cramjax.ranges import Count, Natural, NotNegative, Positive


@dataclass(frozen=True)
class ExpertsConfig:
    """Several feed-forward layers in the place of one, of which a router chooses a few for each token."""

    number: Count = 8
    """Experts of a block that has them, beside shared ones."""
    active: Count = 1
    """How many of them each token goes to."""
    shared: Natural = 0
    """Experts that every token goes to, beside those: one feed-forward layer, so many times as wide."""
    shared_gate: bool = False
    """Multiply what the shared experts give by a sigmoid of the token's product with a vector (Qwen2-MoE)."""
    width: Count | None = None
    """Hidden width of each expert. Default: `mlp / (active + shared)`, so that as much is computed for a token as in
    a block without experts."""
    every: Count = 1
    """Block i of the stack, counted from 1, has experts if `every` divides i: 1 is every block, 2 every second one. The
    others have the feed-forward layer that `mlp` says."""
    scores: Literal["softmax", "sigmoid"] = "sigmoid"
    """What becomes of the router's logits: shares of all experts, or a number of its own for each. An expert's output
    is multiplied with its score."""
    normalised: bool = False
    """Divide the scores of a token's experts by their sum."""
    capacity: Positive | None = None
    """In training, an expert takes at most this times the mean number of tokens; for others that were sent to it, it
    gives 0. null: every expert takes all that it is sent."""
    balance: Literal["bias", "loss", "none"] = "bias"
    """What keeps experts equally busy: a bias of each in the choice, but not in the scores, that moves after every step
    by `balance_rate` (Wang et al. 2024, arXiv:2408.15664); or a loss."""
    balance_rate: NotNegative = 1e-3
    """bias: how far it moves in a step, times the schedule."""
    balance_loss: NotNegative = 1e-2
    """loss: weight of experts · Σ (share of tokens · mean share of scores), which is 1 at best (Fedus et al. 2021,
    arXiv:2101.03961, equation 4)."""
    z_loss: NotNegative = 1e-3
    """Weight of the mean squared log-sum-exp of the router's logits (Zoph et al. 2022, arXiv:2202.08906)."""
