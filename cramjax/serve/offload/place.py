"""Which tensor lies where: the shares of a policy as whole leaves, spread evenly over the blocks, and as whole rows."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from cramjax.serve.offload.cost_model import Policy, Shares
from cramjax.serve.offload.layout import Layout, Leaf

Tier = Literal["device", "host", "disk"]
TIERS: tuple[Tier, ...] = ("device", "host", "disk")


@dataclass(frozen=True)
class Placement:
    """The tier of each leaf that walks read, by stage and path; and where the embedding's table is."""

    tiers: Mapping[tuple[str, str], Tier]
    table: Tier
    shares: Shares
    """Of the walked bytes."""
    on_disk: tuple[int, ...]
    """Bytes that each stage of a walk reads from the disk."""
    ring: int
    """Bytes of memory that these are read into."""


def place(layout: Layout, shares: Shares, table: Tier = "host", ahead: int = 2) -> Placement:
    """Give each leaf a tier, so that neither device nor host holds more than its share.

    Going through the stages in the order of a walk, each leaf goes where most is missing so far: every few blocks have
    the shares of the whole, and reading them ahead takes no longer at one point than at another.

    Args:
        layout: the model's stages.
        shares: of the walked bytes.
        table: where the embedding's own table lies.
        ahead: stages that are read before the walk is there.
    """
    total = sum(leaf.bytes for stage in layout.walked for leaf in stage.leaves)
    wanted: dict[Tier, float] = {"device": shares.device, "host": shares.host, "disk": shares.disk}
    tiers: dict[tuple[str, str], Tier] = {}
    given: dict[Tier, int] = {"device": 0, "host": 0, "disk": 0}
    seen = 0

    def put(stage: str, leaf: Leaf, tier: Tier) -> None:
        tiers[stage, leaf.path] = tier
        given[tier] += leaf.bytes

    # The head first: as the last it would find no room that is left in one piece.
    for stage in (layout.head, *layout.blocks):
        for leaf in stage.leaves:
            seen += leaf.bytes
            if leaf.small:
                put(stage.name, leaf, "device")
                continue
            fitting: list[Tier] = [
                t for t in TIERS if t == "disk" or given[t] + leaf.bytes <= wanted[t] * total * (1 + 1e-9)
            ]
            missing = {tier: wanted[tier] * seen - given[tier] for tier in fitting}
            put(stage.name, leaf, max(fitting, key=missing.__getitem__))
    on_disk = tuple(
        sum(leaf.bytes for leaf in stage.leaves if tiers[stage.name, leaf.path] == "disk") for stage in layout.walked
    )
    made = Shares(*(given[tier] / total for tier in TIERS))
    return Placement(tiers, table, made, on_disk, ring_bytes(on_disk, ahead))


def ring_bytes(on_disk: tuple[int, ...], ahead: int = 2) -> int:
    """Memory for what comes from the disk: the most that a stage and those after it need.

    Args:
        on_disk: bytes of each stage.
        ahead: stages that are read before the walk is there.
    """
    around = on_disk * (1 + ahead)
    return max(sum(around[at : at + 1 + ahead]) for at in range(len(on_disk)))


def whole_rows(policy: Policy) -> Policy:
    """A policy whose shares of cache and activations are rows of each batch; neither device nor host gets more."""

    def rounded(shares: Shares) -> Shares:
        device = int(policy.batch * shares.device + 1e-6)
        host = int(policy.batch * (shares.device + shares.host) + 1e-6) - device
        return Shares(device / policy.batch, host / policy.batch, (policy.batch - device - host) / policy.batch)

    return replace(policy, cache=rounded(policy.cache), hidden=rounded(policy.hidden))


def rows_of(policy: Policy, shares: Shares) -> tuple[slice, slice, slice]:
    """The rows of a batch on each tier."""
    device = round(policy.batch * shares.device)
    host = device + round(policy.batch * shares.host)
    return slice(0, device), slice(device, host), slice(host, policy.batch)
