"""What a token is to the feed-forward layer of a block, or to its experts: numbers, for buffers and for passes."""

from dataclasses import dataclass

from cramjax.config import ModelConfig
from cramjax.kernels.grouped import most_blocks, rows_of_block
from cramjax.model.pattern import period_of
from cramjax.model.sizes import Sizes


@dataclass(frozen=True)
class FeedForward:
    """Numbers for each token, in the mean over the blocks of a period."""

    rows: float
    """Rows that products take in: a token's choices, and those of nobody that fill up blocks."""
    up: float
    """Results of the first product."""
    mlp: float
    """What the second reads."""
    sent: float
    """Copies of the stream that go to experts and come back."""
    down: float
    """Results of the second product that are not the stream's."""
    routed: float
    """Of the router, in float32."""
    largest: int
    """Of the largest array of matrices; not for each token."""
    layers: tuple[tuple[float, int], ...]
    """Feed-forward layers of a block in the mean: how many, and their hidden widths; not for each token."""


def feed_forward(model: ModelConfig, sizes: Sizes, tokens: int, platform: str) -> FeedForward:
    """The numbers of a model.

    Args:
        model: its configuration.
        sizes: of its parameters.
        tokens: of a microbatch on one device.
        platform: of the device.
    """
    experts, up, mlp = model.experts, float(sum(sizes.up)), float(model.mlp)
    largest = model.width * int(max(up, mlp))
    if experts is None:
        return FeedForward(1.0, up, mlp, 0.0, 0.0, 0.0, largest, ((1.0, model.mlp),))
    choices, number = tokens * experts.active, experts.number
    if experts.capacity is not None:
        taken = -int(-experts.capacity * choices // number) * number
    else:
        block = rows_of_block(platform, choices, number)
        taken = block * most_blocks(choices, number, block)
    rows, period = taken / tokens, period_of(model)
    share = sum(layer.experts for layer in period) / len(period)
    own = rows * sizes.expert + sizes.shared
    return FeedForward(
        rows=1 + share * (rows - 1 + (sizes.shared > 0)),
        up=share * sum(sizes.up_of(1)) * own + (1 - share) * up,
        mlp=share * own + (1 - share) * mlp,
        sent=share * (rows + experts.active) * model.width,
        down=share * rows * model.width,
        routed=share * (model.width + 3 * number),
        largest=max(largest, number * model.width * sum(sizes.up_of(sizes.expert))),
        layers=((1 - share, model.mlp), (share * number, sizes.expert), (share * (sizes.shared > 0), sizes.shared)),
    )
