"""What each optimizer is capable of: one table, which everyone asks instead of the optimizer's name. Imports no jax.

A new optimizer is an entry here, and a function of its name in `cramjax.optim.directions`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal


@dataclass(frozen=True)
class Traits:
    """Of one optimizer.

    Attributes:
        moments: float32 arrays that it keeps for each matrix in a block, of the matrix's shape.
        moments_of_rest: the same for every other parameter.
        factored: whether it keeps a number for each row and each column of a matrix instead, and reads a gradient twice
            more to make them.
        layerwise: whether it updates each layer as soon as its gradient exists. Then no gradients are held, none can
            accumulate, and weights below float32 are rounded stochastically.
        clips_by_a_walk: layerwise: whether the norm of all gradients, to be bounded, costs a backward pass of its own.
        averages: whether it evaluates an average of the weights by itself.
        offloadable: whether the host can do its step, block by block and entry by entry.
        spectral: whether the step of a matrix is orthogonalised: its size then does not depend on the matrix's width,
            and nor does its rate; an entry's step of a fixed size does.
        mup: whether µP has a rule for its rates.
        curvature: whether it differentiates the loss twice.
    """

    moments: int
    moments_of_rest: int
    factored: bool = False
    layerwise: bool = False
    clips_by_a_walk: bool = False
    averages: bool = False
    offloadable: bool = False
    spectral: bool = False
    mup: bool = False
    curvature: bool = False


OPTIMIZERS: dict[str, Traits] = {
    "adamw": Traits(2, 2, offloadable=True, mup=True),
    "muon": Traits(1, 2, spectral=True, mup=True),
    "lion": Traits(1, 1, mup=True),
    "adan": Traits(4, 4, mup=True),
    "sophia": Traits(2, 2, curvature=True),
    "adafactor": Traits(0, 0, factored=True),
    "schedule_free_adamw": Traits(2, 2, averages=True, mup=True),
    "lomo": Traits(0, 0, layerwise=True, clips_by_a_walk=True),
    "adalomo": Traits(0, 0, factored=True, layerwise=True),
}

if TYPE_CHECKING:
    Optimizer = str
else:  # so that the loader knows the names
    Optimizer = Literal[tuple(OPTIMIZERS)]


def names_of(trait: str) -> list[str]:
    """Names of the optimizers that have a trait, as in the table."""
    return [name for name, traits in OPTIMIZERS.items() if getattr(traits, trait)]
