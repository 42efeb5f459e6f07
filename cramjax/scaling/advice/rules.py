"""Rules that carry a setting from the run it was tuned on to another size: each with its source and its domain.

Width, batch and learning rates are in `cramjax.scaling.shapes`; here is weight decay, which needs the run's length.
"""

import dataclasses

from cramjax.config import OptimConfig

RULES = (
    "learning rates: matrices' ∝ 1/width for Adam and its kin, kept for Muon; embeddings' kept (arXiv:2203.03466, "
    "table 8; arXiv:2410.21265). With µP on, all rates stay as they are written.",
    "batch ∝ FLOPs^0.327 (arXiv:2401.02954, equation 1: fitted from 1e17 to 2e19 FLOPs on one corpus).",
    "weight decay ∝ 1 / (rate · steps) (arXiv:2405.13698: AdamW, models up to 220M parameters; for others by analogy).",
)
"""What advice follows, a line for each."""


def with_decay_for(tuned: OptimConfig, optim: OptimConfig, steps_ratio: float | None) -> OptimConfig:
    """Weight decay for another rate and another number of steps.

    Decoupled decay makes weights an average over their last 1 / (rate · decay) updates; what transfers between sizes
    and data sets is that time as a share of the run: decay ∝ 1 / (rate · steps) (Wang & Aitchison 2024,
    arXiv:2405.13698, sections 3 and 4; measured with AdamW).

    Args:
        tuned: optimizer whose decay is right for its own run.
        optim: the same at the new size, its rates already those of that size.
        steps_ratio: optimizer steps of the new run over those of the tuned one; None: unknown, taken for 1.

    Returns:
        `optim` with its decays replaced: that of the matrices by their rate, that of the embeddings by theirs.
    """
    longer = 1.0 if steps_ratio is None else steps_ratio
    matrices = tuned.weight_decay * tuned.lr / optim.lr / longer
    before, after = (o.lr if o.embed_lr is None else o.embed_lr for o in (tuned, optim))
    embeddings = tuned.weight_decay if tuned.embed_weight_decay is None else tuned.embed_weight_decay
    embeddings = embeddings * (before / after if after else 1.0) / longer
    return dataclasses.replace(optim, weight_decay=_tidy(matrices), embed_weight_decay=_tidy(embeddings))


def _tidy(value: float) -> float:
    return float(f"{value:.4g}")
