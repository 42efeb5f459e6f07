"""How a model is compressed, as a configuration. Imports no jax."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from cramjax.errors import ConfigError
from cramjax.ranges import Count, InnerShare, Natural, NotNegative

Method = Literal["rtn", "gptq", "hqq", "magnitude", "wanda", "sparsegpt"]
METHODS: tuple[Method, ...] = ("rtn", "gptq", "hqq", "magnitude", "wanda", "sparsegpt")
PRUNING: tuple[Method, ...] = ("magnitude", "wanda", "sparsegpt")
"""Those that set weights to 0; with `bits` they quantise the others as well."""
CALIBRATED: tuple[Method, ...] = ("gptq", "wanda", "sparsegpt")
"""Those that need text."""
FLOATS = ("nf4", "fp8", "mxfp4")
"""Kinds of floating point numbers that weights may become."""
BITS = (8, 4, 3, 2, "ternary", *FLOATS)
COLUMNS = 128
"""Inputs that GPTQ and SparseGPT correct together; patterns of zeros divide it."""


@dataclass(frozen=True)
class CompressConfig:
    """What becomes of a model's matrices, and on what text that is judged.

    Matrices of the blocks are rewritten; embeddings, head, norms and biases stay as they are.
    """

    method: Method = "gptq"
    """rtn: round to nearest. gptq: round, and correct the weights not rounded yet (Frantar et al. 2022,
    arXiv:2210.17323). hqq: round in groups whose zeros, floats, are refined without text (Badri and Shaji 2023,
    "Half-Quadratic Quantization"). magnitude: set the smallest weights to 0; wanda: those whose size times that of
    their input is smallest (Sun et al. 2023, arXiv:2306.11695); sparsegpt: those that cost least, and correct the
    others (Frantar and Alistarh 2023, arXiv:2301.00774)."""
    data: str | list[str] | None = None
    """Text to calibrate on: files, as of `data.source` of a run. rtn, hqq and magnitude need none; with it, errors are
    those of outputs instead of weights."""
    text_field: str = "text"
    """Column that holds the text in JSONL and Parquet files."""
    sequences: Count = 128
    """Sequences to calibrate on. They are drawn by `seed` from the beginning of the text, four times as many."""
    sequence_length: Count | None = None
    """Tokens of each. Default: what the model can see, at most 2048."""
    seed: Natural = 0
    """Seed of the draw."""
    batch: Count | None = None
    """Sequences that are on the device at once. Default: 8192 tokens' worth."""
    sequential: bool = True
    """Matrices of a block one after the other, each calibrated on what those before it became (true-sequential). false:
    all on the block's own inputs at once; less host memory."""
    bits: Count | Literal["ternary", "nf4", "fp8", "mxfp4"] | None = None
    """Of a weight: 8, 4, 3 or 2; or ternary: each is 0 or one of two levels of its output, and written in words of less
    than a bit a weight (QMoE: Frantar and Alistarh 2023, arXiv:2310.16795). Or floating point numbers: nf4, as QLoRA
    has it with scales of 8 bits (Dettmers et al. 2023, arXiv:2305.14314); fp8, e4m3 (Micikevicius et al. 2022,
    arXiv:2209.05433); mxfp4, e2m1 with an exponent for 32 inputs (OCP Microscaling Formats 1.0). Default: 4 for rtn,
    gptq and hqq; none for the others, whose weights stay as precise as they are."""
    activation_bits: Count | None = None
    """8: what matrices of 8, 4, 3 or 2 bits are multiplied with is rounded as well, wherever the model is used: for
    each token in the groups that share a scale, its largest number in 127 steps. Errors of matrices are those of
    weights alone; bits per byte are with both. null: activations stay as they are."""
    levels: Literal["means", "extremes"] = "means"
    """Of ternary weights: the means of those beyond half of an output's smallest and largest weight, or these two
    themselves, as QMoE has it."""
    group: Count | None = 64
    """Inputs that share a scale; null: all. Narrower matrices are one group. Of mxfp4 it is 32."""
    symmetric: bool = True
    """Steps reach as far above 0 as below it. false, and always of hqq: from the smallest weight to the largest; groups
    have a zero of their own."""
    mse: bool = False
    """Shrink each group's range to where the error of its weights is least (power 2.4, 80 ranges). false: the whole
    range."""
    scale_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of scales and zeros; those of nf4 and mxfp4 have their own."""
    awq: bool = False
    """rtn, gptq: first make inputs that are large smaller, and their weights larger, so that these are rounded finer;
    norms and matrices before them are divided by as much. With rtn, the largest weights of groups are then clipped
    where that is better (AWQ: Lin et al. 2023, arXiv:2306.00978). Needs text."""
    rotate: bool = False
    """rtn, gptq, hqq: first rotate the residual stream, and values of attention, at random, so that no input is an
    outlier; the head becomes a matrix of its own (QuaRot without rotations that run with the model: Ashkboos et al.
    2024, arXiv:2404.00456). Models with RMSNorm before their layers alone."""
    act_order: bool | None = None
    """gptq: inputs in the order of their size, the largest first; groups stay those of neighbours. Default: true."""
    damp: NotNegative = 0.01
    """Share of the mean of the Hessian's diagonal that is added to it. It doubles while the Hessian cannot be
    factored."""
    sparsity: InnerShare | None = None
    """Share of weights that are set to 0. Default of the methods that prune, without `pattern`: 0.5."""
    shares: dict[str, float] | Literal["owl"] | None = None
    """Other shares of some matrices, by patterns of BLOCK/NAME such as {"0/*": 0.3, "*/mlp/down/kernel": 0.6}, of which
    the first that matches counts; 0: none. owl: blocks with more outliers keep more, and the mean is `sparsity`, for
    one more pass over the text (Yin et al. 2024, arXiv:2310.05175)."""
    pattern: str | None = None
    """N:M, such as 2:4: of every M inputs in turn, N weights stay."""
    only: str = "*"
    """Pattern of the names of matrices in a block that are rewritten, such as `experts/*`, or `0/mlp/*` where blocks
    differ; the others stay as they are."""
    text: str | list[str] | None = None
    """Held-out text whose bits per byte are measured before and after. Default: a run's own; of a model, none."""

    @property
    def kept(self) -> tuple[int, int] | None:
        """N and M of the pattern."""
        if self.pattern is None:
            return None
        n, m = self.pattern.split(":")
        return int(n), int(m)


def resolved(config: CompressConfig) -> CompressConfig:
    """A configuration with its method's defaults filled in.

    Raises:
        ConfigError: bits, patterns or options that the method does not have, or no text where it needs some.
    """
    method = config.method
    if config.bits is not None and config.bits not in BITS:
        raise ConfigError(f"bits must be one of {', '.join(map(str, BITS))}, got {config.bits}.")
    if config.bits == "ternary" and (method in PRUNING or config.act_order):
        which = "method" if method in PRUNING else "act_order"
        raise ConfigError(f"Ternary weights are made by rtn and gptq, without act_order: change {which}.")
    bits = config.bits or (None if method in PRUNING else 4)
    if config.activation_bits is not None and (config.activation_bits != 8 or not isinstance(bits, int)):
        raise ConfigError(
            f"activation_bits may be 8, beside bits of 8, 4, 3 or 2, got {config.activation_bits} with bits {bits}."
        )
    _check_rounding(config)
    if config.bits in FLOATS and not config.symmetric:
        raise ConfigError(f"{config.bits} has numbers on both sides of 0, and no zeros: leave symmetric out.")
    if config.bits == "mxfp4" and config.group not in (32, CompressConfig.group):
        raise ConfigError(f"Of mxfp4, 32 weights share an exponent, got group {config.group}: leave it out.")
    if method in CALIBRATED and not config.data:
        raise ConfigError(f"{method} needs text to calibrate on: give --data FILE.")
    if method not in PRUNING:
        for name in ("sparsity", "shares", "pattern"):
            if getattr(config, name) is not None:
                raise ConfigError(
                    f"{name} is of methods that set weights to 0 ({', '.join(PRUNING)}), got method {method}: with "
                    "bits these quantise too."
                )
    elif config.pattern is not None:
        _check_pattern(config.pattern)
        if config.sparsity is not None:
            raise ConfigError("sparsity and pattern both say how many weights are set to 0: give one of them.")
        if config.shares is not None:
            raise ConfigError("pattern is of all matrices, and shares of some: give one of them.")
    else:
        _check_shares(config)
    if config.act_order and method != "gptq":
        raise ConfigError(f"act_order is of gptq, got method {method}: leave it out.")
    share = 0.5 if method in PRUNING and config.pattern is None else None
    return replace(
        config,
        bits=bits,
        group=32 if config.bits == "mxfp4" else config.group,
        symmetric=config.symmetric and method != "hqq",
        act_order=method == "gptq" and config.bits != "ternary" if config.act_order is None else config.act_order,
        sparsity=config.sparsity or share,
    )


def _check_rounding(config: CompressConfig) -> None:
    """Refuse options of rounding that the method has no use for."""
    method, bits = config.method, config.bits
    if config.awq and method not in ("rtn", "gptq"):
        raise ConfigError(f"awq scales what rtn or gptq then round, got method {method}: leave it out.")
    if config.awq and bits == "ternary":
        raise ConfigError("awq scales inputs for groups with scales, which ternary weights have not: leave it out.")
    if config.awq and not config.data:
        raise ConfigError("awq needs text that shows how large inputs are: give --data FILE.")
    if config.rotate and method in PRUNING:
        raise ConfigError(f"rotate spreads weights before they are rounded, got method {method}: leave it out.")
    if method == "hqq" and isinstance(bits, str):
        raise ConfigError(f"hqq rounds to 8, 4, 3 or 2 bits, got {bits}: give one of these, or use rtn.")
    if method == "hqq" and config.mse:
        raise ConfigError("mse and hqq both search groups' ranges: leave mse out, or use rtn.")


def _check_shares(config: CompressConfig) -> None:
    if config.shares == "owl" and not config.data:
        raise ConfigError("shares=owl needs text that shows where outliers are: give --data FILE.")
    for pattern, share in config.shares.items() if isinstance(config.shares, Mapping) else ():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:  # pyright: ignore
            raise ConfigError(f"shares are from 0 to below 1, got {share!r} for {pattern!r}.")


def _check_pattern(pattern: str) -> None:
    match = re.fullmatch(r"(\d{1,3}):(\d{1,3})", pattern)
    n, m = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 0 < n < m or COLUMNS % m:
        raise ConfigError(
            f"pattern must be N:M with N below M, and M a power of 2 up to {COLUMNS}, such as 2:4 or 4:8; got "
            f"{pattern!r}."
        )
