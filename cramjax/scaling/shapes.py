"""From a size to a run: width, depth, heads, batch and learning rates, by rules relative to a run that works.

A base configuration fixes the family (activation, positions, vocabulary, head width, aspect ratio); `shape_for` moves
it to another size. Sweeps derive their models here.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from cramjax.config import ModelConfig, RunConfig
from cramjax.errors import ConfigError
from cramjax.experts import ExpertsConfig
from cramjax.model.counts import ParameterCount, count_parameters
from cramjax.planning.steps import vocabulary_of
from cramjax.validation import validate

Count = Literal["params", "params_non_embedding"]
"""Which parameters a size counts: all, or those of the blocks alone (neither embeddings nor decoder)."""

TOLERANCE = 0.1
"""How far a realised size may be from the one asked for."""
_MOST_PARAMS = 1e12
_MLP_MULTIPLE = 8
_ASPECTS = 2.0
_BATCH_EXPONENT = 0.3271


@dataclass(frozen=True)
class Shape:
    """A realisable model of a family, and its sizes."""

    model: ModelConfig
    params: int
    params_non_embedding: int


def shape_for(
    params: float,
    base: RunConfig,
    *,
    count: Count = "params",
    flops: float | None = None,
    tuned_at: float | None = None,
    tolerance: float = TOLERANCE,
) -> RunConfig:
    """The base configuration moved to another size.

    - Width and depth: width is a multiple of the base's head width, width / layers (the aspect ratio) within a factor
      of 2 of the base's; of the shapes within 10% of the size, the one whose aspect ratio is nearest to the base's.
      Within such a factor the loss hardly depends on it: Kaplan et al. 2020 (arXiv:2001.08361), section 3.1.
    - Heads = width / head width, key/value heads in the base's proportion; the feed-forward layer in the base's
      proportion to the width, rounded to a multiple of 8.
    - Learning rates, where w is the width over the base's: the head's ∝ 1/w; the matrices' ∝ 1/w for Adam and its kin,
      and kept for Muon, whose update already has the right scale for every width; embeddings' and scalars' kept. Yang
      et al. 2022 (arXiv:2203.03466), table 8; for Muon, Bernstein and Newhouse 2024 (arXiv:2410.21265). With a tied
      head, the shared matrix keeps the embeddings' rate. With `mup_base_width`, the base's rates are kept.
    - Batch ∝ FLOPs^0.3271, from the base's at `tuned_at`: DeepSeek-AI 2024 (arXiv:2401.02954), equation 1; rounded to a
      multiple of the base's microbatch (without one, of 8). Without `flops` or `tuned_at` it is the base's.

    Args:
        params: the size asked for, in parameters.
        base: a configuration that works at its own size.
        count: which parameters `params` counts.
        flops: the budget the model is for, in FLOPs.
        tuned_at: the budget in FLOPs for which the base's batch is right.
        tolerance: where no shape is within 10%, how far the nearest may be from the size.

    Returns:
        The configuration, checked. Its budget is the base's.

    Raises:
        ConfigError: no shape of the family is so near the size; the message names the nearest.
    """
    shape = _nearest(params, base, count, tolerance)
    wider = shape.model.width / base.model.width
    config = replace(base, model=shape.model, optim=_rates(base, wider), batch=_batch(base, flops, tuned_at))
    validate(config)
    return config


def parameters_of(config: RunConfig) -> ParameterCount:
    """Parameters of a configuration's model, with the vocabulary that it asks for."""
    return count_parameters(config.model, _vocabulary(config), config.data.sequence_length)


def shapes(base: RunConfig, most: float, count: Count = "params") -> Iterator[Shape]:
    """Every shape of the base's family with up to about so many parameters, by width, then depth."""
    model, vocabulary = base.model, _vocabulary(base)
    head_dim = model.head_dim or model.width // model.heads
    groups = model.heads // (model.kv_heads or model.heads)  # query heads for each key/value head
    aspect, experts = model.width / model.layers, model.experts
    for heads in range(groups, 1 << 20, groups):
        width = heads * head_dim
        fewest = max(1, math.ceil(width / (aspect * _ASPECTS)))
        for layers in range(fewest, max(fewest, math.floor(width / aspect * _ASPECTS)) + 1):
            scaled = replace(
                model,
                width=width,
                layers=layers,
                heads=heads,
                kv_heads=None if model.kv_heads is None else heads // groups,
                mlp=_scaled(model.mlp, width / model.width, 1 if experts is None else experts.active + experts.shared),
                experts=_scaled_experts(experts, width / model.width),
            )
            counted = count_parameters(scaled, vocabulary, base.data.sequence_length)
            shape = Shape(scaled, counted.total, counted.blocks)
            if getattr(shape, count) > most:
                if layers == fewest:
                    return
                break
            yield shape


def _scaled(inner: int, wider: float, parts: int = 1) -> int:
    """A hidden width in proportion, which so many experts can divide among themselves."""
    multiple = _MLP_MULTIPLE * parts
    return max(1, round(inner * wider / multiple)) * multiple


def _scaled_experts(experts: ExpertsConfig | None, wider: float) -> ExpertsConfig | None:
    if experts is None or experts.width is None:
        return experts
    return replace(experts, width=_scaled(experts.width, wider))


def _nearest(params: float, base: RunConfig, count: Count, tolerance: float) -> Shape:
    if not 0 < params <= _MOST_PARAMS:  # beyond, there are too many shapes to look at
        raise ConfigError(f"a size must be above 0 and at most {_MOST_PARAMS:.0e} parameters, got {params:.3g}.")
    aspect = base.model.width / base.model.layers
    # One width more than the size needs, so that there is a neighbour above to name.
    found = list(shapes(base, params * 16 + 4 * getattr(_smallest(base), count), count))
    near = [shape for shape in found if abs(getattr(shape, count) / params - 1) <= TOLERANCE]
    if near:
        return min(
            near,
            key=lambda s: (
                round(abs(math.log(s.model.width / s.model.layers / aspect)), 6),
                abs(getattr(s, count) / params - 1),
            ),
        )
    nearest = min(found, key=lambda shape: abs(math.log(getattr(shape, count) / params)))
    if abs(getattr(nearest, count) / params - 1) <= tolerance:
        return nearest
    sizes = sorted(getattr(shape, count) for shape in found)
    below, above = [n for n in sizes if n < params][-1:], [n for n in sizes if n > params][:1]
    names = " and ".join(f"{n:,}" for n in (*below, *above))
    raise ConfigError(
        f"no model of this family has about {params:,.0f} parameters ({count}): the nearest have {names}. Heads are "
        f"{base.model.head_dim or base.model.width // base.model.heads} wide, and width / layers stays near "
        f"{aspect:g}; give one of those sizes, or a base with narrower heads (more of them)."
    )


def _smallest(base: RunConfig) -> Shape:
    return next(shapes(base, math.inf))


def _rates(base: RunConfig, wider: float):
    optim = base.optim
    if base.model.mup_base_width is not None:  # which holds rates at any width by itself
        return optim
    head = optim.lr if optim.head_lr is None else optim.head_lr
    embed = optim.lr if optim.embed_lr is None else optim.embed_lr
    scalar = optim.lr if optim.scalar_lr is None else optim.scalar_lr
    matrices = optim.lr if optim.traits.spectral else optim.lr / wider
    return replace(
        optim,
        lr=_tidy(matrices),
        embed_lr=_tidy(embed),
        head_lr=optim.head_lr if base.model.tied else _tidy(head / wider),
        scalar_lr=_tidy(scalar),
    )


def _batch(base: RunConfig, flops: float | None, tuned_at: float | None):
    batch = base.batch
    if flops is None or tuned_at is None:
        return batch
    multiple = batch.microbatch or min(8, batch.size)
    size = batch.size * (flops / tuned_at) ** _BATCH_EXPONENT
    return replace(batch, size=max(1, round(size / multiple)) * multiple)


def _tidy(rate: float) -> float:
    """Four digits: what a person would write, and the same on every machine."""
    return float(f"{rate:.4g}")


def _vocabulary(config: RunConfig) -> int:
    """Tokens that the configuration asks for, whether or not its data is prepared."""
    kind = config.tokenizer.kind
    return config.tokenizer.vocab_size if kind in ("bpe", "wordpiece") else vocabulary_of(config).vocab_size
