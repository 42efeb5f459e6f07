"""How long offloaded generation takes, and what it fills: FlexGen's cost model. Pure numbers; no jax.

Each stream's seconds, and each tier's bytes, are affine in the shares in which weights, cache and activations are
divided over the tiers, so that the linear program (`policy`) reads its coefficients off the functions that predict.

Source: Sheng et al. 2023, arXiv:2303.06865, section 4.3 and appendix A.3.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

Form = Literal["code", "paper"]
"""How the streams of a layer overlap: as the authors' code has it, where the copy to the device hides behind nothing
while tokens are drawn, or perfectly, as in the paper."""


@dataclass(frozen=True)
class Shares:
    """How something is divided over the tiers; together 1."""

    device: float
    host: float
    disk: float

    @property
    def away(self) -> float:
        """Not on the device."""
        return self.host + self.disk


@dataclass(frozen=True)
class Policy:
    """Rows of a batch, batches of a block, and where everything lies."""

    batch: int
    batches: int
    weights: Shares
    cache: Shares
    hidden: Shares

    @property
    def rows(self) -> int:
        """Of a block: those that share one pass over the weights."""
        return self.batch * self.batches


@dataclass(frozen=True)
class Work:
    """A model's layers and what is asked of them. Bytes are those of the precision in which each is held."""

    layers: int
    weight_bytes: float
    """Of a layer."""
    cache_bytes: float
    """Keys and values of a token in a layer."""
    hidden_bytes: float
    """The residual stream of a token."""
    product_flops: float
    """Of a token in a layer, by weights."""
    attention_flops: float
    """Of a query and a key in a layer."""
    interior_bytes: float
    """Temporaries of a token of a prompt, of one batch."""
    prompt: int
    """Tokens of a row before the first that is drawn."""
    output: int
    """Tokens drawn for a row."""
    context_bytes: float = 0.0
    """What else is kept on the device of each token of a prompt."""
    row_bytes: float = 0.0
    """Temporaries of a row of one batch."""
    weight_pieces: float = 0.0
    """Arrays of a layer's weights."""
    cache_pieces: float = 0.0
    """Arrays of the keys and values of a row in a layer."""
    ahead: float = 2.0
    """Layers for which the device, or the host that reads in its place, has room beside the weights that stay."""
    filling: float = 0.0
    """Batches whose prompts' keys and values are on their way from the device at once; the paper counts none."""
    one_memory: bool = False
    """Whether the device is the host's processor: what lies on the host is read where it is."""

    @property
    def length(self) -> int:
        """Most tokens of a row."""
        return self.prompt + self.output


def opt(layers: int, width: int, prompt: int, output: int) -> Work:
    """The work of a model of OPT's shape in 16 bits, as the paper counts it.

    Args:
        layers: of the model.
        width: of the residual stream; the feed-forward layer is four times as wide.
        prompt: tokens.
        output: tokens.
    """
    mlp = 4 * width
    weights = 8 * width**2 + 4 * width * mlp
    return Work(
        layers=layers,
        weight_bytes=weights,
        cache_bytes=4 * width,
        hidden_bytes=2 * width,
        product_flops=weights,
        attention_flops=4 * width,
        interior_bytes=max(8 * width, 2 * (width + mlp)),
        prompt=prompt,
        output=output,
    )


@dataclass(frozen=True)
class Machine:
    """What a machine does in a second, for batches of one size: bytes moved, floating point operations."""

    to_device: float
    """Bytes, from host to device; infinite where they are one memory."""
    cache_to_host: float
    hidden_to_host: float
    disk_read: float
    disk_write: float
    """Bytes of cache and activations of a token's step."""
    disk_write_cache: float
    """Bytes of a prompt's cache."""
    products_prompt: float
    """Floating point operations of products with weights, for prompts."""
    products_step: float
    """The same for a token's step."""
    attention_prompt: float
    attention_step: float
    attention_host: float | None
    """Of attention where the cache lies in the host's memory; None: such a cache is brought to the device."""
    batch_seconds: float = 0.0
    """Of a batch in a layer, beside all this: what it is handed over with, and its share of both ends."""
    reading_seconds: float = 0.0
    """That computing loses to a byte read from the disk at the same time."""
    writing_seconds: float = 0.0
    """The same of a byte written."""
    piece_read: float = 0.0
    """Seconds of a piece read from the disk, beside those of its bytes."""
    piece_written: float = 0.0
    """The same of one written."""
    piece_seconds: float = 0.0
    """That computing loses to each of them."""
    weights_read: float = 0.95
    """Of `disk_read`, what reading weights reaches while tokens are drawn."""


def t4(batch: int, width: int, disk_read: float = 2.65e9) -> Machine:
    """The paper's machine: an NVIDIA T4 in Google's cloud, constants as the authors fitted them to their runs.

    Attention on the host is slower for batches below 64 rows, by a piecewise correction that they fitted too. The disk
    is not theirs: 0.473 GiB/s, the constant of their code, explains none of the paper's own runs that read from it.

    Args:
        batch: rows.
        width: of the model.
        disk_read: bytes per second. Default: what Google states for the paper's 1.5 TB of local NVMe disks
            (cloud.google.com/compute/docs/disks/performance, 2019).
    """
    gib, tera = 2**30, 1e12
    few, narrow = max(0.0, math.log2(64 / batch)), max(0.0, math.log2(4096 / width))
    share = max(0.5, 1 + 0.0168 * few * narrow - 0.0328 * few - 0.0621 * narrow)
    return Machine(
        to_device=12.89 * gib,
        cache_to_host=0.97 * gib,
        hidden_to_host=4.82 * gib,
        disk_read=disk_read,
        disk_write=2.015 * gib,
        disk_write_cache=0.746 * gib,
        products_prompt=21.24 * tera,
        products_step=4.3 * tera,
        attention_prompt=9.97 * tera,
        attention_step=0.079 * tera,
        attention_host=0.0123 * share * tera,
    )


@dataclass(frozen=True)
class Streams:
    """Seconds of each stream in a layer of a whole block, each by itself."""

    to_device: float
    to_host: float
    from_disk: float
    to_disk: float
    compute: float

    def together(self, groups: tuple[tuple[str, ...], ...]) -> float:
        """Seconds of the slowest group, whose streams run one after the other."""
        return max(sum(getattr(self, name) for name in group) for group in groups)


_APART = (("to_device",), ("to_host",), ("from_disk",), ("to_disk",), ("compute",))
GROUPS: dict[Form, tuple[tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...]]] = {
    "paper": (_APART, _APART),
    "code": (
        (("to_device", "from_disk"), ("to_host", "to_disk"), ("compute",)),
        tuple(("to_device", name) for name in ("to_host", "from_disk", "to_disk", "compute")),
    ),
}
"""Of each form, streams that wait for each other: with prompts, and in a token's step."""


def prompt_streams(work: Work, machine: Machine, policy: Policy) -> Streams:
    """The streams of a layer while prompts are read.

    Args:
        work: the model and what is asked of it.
        machine: for batches of the policy's size.
        policy: the shares may be any numbers.
    """
    tokens, weights = policy.rows * work.prompt, work.weight_bytes
    cache, hidden = work.cache_bytes * (tokens + policy.rows), work.hidden_bytes * tokens
    stored, kept = policy.cache, policy.hidden
    read, written = weights * policy.weights.disk + hidden * kept.disk, cache * stored.disk + hidden * kept.disk
    pieces = work.weight_pieces * policy.weights.disk, policy.rows * work.cache_pieces * stored.disk
    return Streams(
        to_device=(weights * policy.weights.away + hidden * kept.away) / machine.to_device,
        to_host=cache * stored.away / machine.cache_to_host + hidden * kept.away / machine.hidden_to_host,
        from_disk=read / machine.disk_read + pieces[0] * machine.piece_read,
        to_disk=cache * stored.disk / machine.disk_write_cache
        + hidden * kept.disk / machine.disk_write
        + pieces[1] * machine.piece_written,
        compute=tokens * work.product_flops / machine.products_prompt
        + policy.rows * work.attention_flops * work.prompt**2 / machine.attention_prompt
        + policy.batches * machine.batch_seconds
        + _lost(machine, read, written, pieces),
    )


def step_streams(work: Work, machine: Machine, policy: Policy) -> Streams:
    """The same while each row draws a token, with half of the output in the cache."""
    rows, weights, held = policy.rows, work.weight_bytes, work.prompt + work.output / 2
    hidden, cache = work.hidden_bytes * rows, work.cache_bytes * rows
    kept, stored = policy.hidden, policy.cache
    scores = rows * work.attention_flops * held
    if machine.attention_host is None:
        up, attention = cache * held * stored.away, scores * (stored.device + stored.away) / machine.attention_step
    else:
        up = 0.0
        attention = scores * (stored.device / machine.attention_step + stored.away / machine.attention_host)
    read, other = weights * policy.weights.disk, cache * held * stored.disk + hidden * kept.disk
    written, rows_stored = cache * stored.disk + hidden * kept.disk, rows * work.cache_pieces * stored.disk
    pieces = work.weight_pieces * policy.weights.disk + rows_stored, rows_stored
    return Streams(
        to_device=(weights * policy.weights.away + hidden * kept.away + up) / machine.to_device,
        to_host=hidden * kept.away / machine.hidden_to_host,
        from_disk=(read / machine.weights_read + other) / machine.disk_read + pieces[0] * machine.piece_read,
        to_disk=written / machine.disk_write + pieces[1] * machine.piece_written,
        compute=rows * work.product_flops / machine.products_step
        + attention
        + policy.batches * machine.batch_seconds
        + _lost(machine, read + other, written, pieces),
    )


def _lost(machine: Machine, read: float, written: float, pieces: tuple[float, float]) -> float:
    """Seconds that computing loses to what is read and written at the same time: bytes, and pieces of both."""
    of_bytes = read * machine.reading_seconds + written * machine.writing_seconds
    return of_bytes + sum(pieces) * machine.piece_seconds


@dataclass(frozen=True)
class Prediction:
    """What a block of rows takes."""

    rows: int
    tokens: int
    """Drawn, of all rows."""
    prompt_seconds: float
    step_seconds: float
    """Of all steps."""

    @property
    def seconds(self) -> float:
        """Of the block."""
        return self.prompt_seconds + self.step_seconds

    @property
    def tokens_per_second(self) -> float:
        """Drawn tokens over all of the time, that of the prompts included."""
        return self.tokens / self.seconds


def predict(work: Work, machine: Machine, policy: Policy, form: Form = "code") -> Prediction:
    """Seconds of a block.

    Args:
        work: the model and what is asked of it.
        machine: for batches of the policy's size.
        policy: batches and shares.
        form: how streams overlap.
    """
    prompt, step = GROUPS[form]
    return Prediction(
        rows=policy.rows,
        tokens=policy.rows * work.output,
        prompt_seconds=work.layers * prompt_streams(work, machine, policy).together(prompt),
        step_seconds=work.layers * (work.output - 1) * step_streams(work, machine, policy).together(step),
    )


@dataclass(frozen=True)
class Memory:
    """Bytes of each tier."""

    device: float
    host: float
    disk: float

    def within(self, limits: "Memory") -> bool:
        """Whether no tier holds more than it may."""
        return self.device <= limits.device and self.host <= limits.host and self.disk <= limits.disk

    def scaled(self, share: float) -> "Memory":
        """So much of each."""
        return Memory(self.device * share, self.host * share, self.disk * share)


def peak_memory(work: Work, policy: Policy) -> Memory:
    """What each tier holds at most, in a prompt's pass, with the cache grown to its end.

    Where device and host are one memory, only what comes from the disk needs room beside what stays.
    """
    tokens, in_batch = policy.rows * work.prompt, policy.batch * work.prompt
    weights = work.layers * work.weight_bytes
    cache = work.layers * work.cache_bytes * policy.rows * work.length
    hidden = work.hidden_bytes * tokens
    coming = policy.weights.disk if work.one_memory else policy.weights.away
    staged = 2 * work.cache_bytes * policy.batch * work.length * policy.cache.disk
    device = (
        work.ahead * work.weight_bytes * coming
        + work.filling * work.cache_bytes * in_batch * policy.cache.away
        + work.hidden_bytes * in_batch * policy.hidden.away
        + max(work.interior_bytes * in_batch, work.row_bytes * policy.batch)
        + work.context_bytes * tokens
    )
    host = staged + 2 * work.hidden_bytes * in_batch * policy.hidden.disk
    if not work.one_memory:
        host += work.ahead * work.weight_bytes * policy.weights.disk

    def home(tier: str) -> float:
        return (
            weights * getattr(policy.weights, tier)
            + cache * getattr(policy.cache, tier)
            + hidden * getattr(policy.hidden, tier)
        )

    return Memory(home("device") + device, home("host") + host, home("disk"))


def divided(policy: Policy, shares: tuple[float, ...]) -> Policy:
    """A policy with other shares: of weights, cache and activations, each on device, host and disk."""
    weights, cache, hidden = (Shares(*shares[at : at + 3]) for at in (0, 3, 6))
    return replace(policy, weights=weights, cache=cache, hidden=hidden)
