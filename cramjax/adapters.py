"""What an adapter is: the group `adapter` of a recipe. Imports no jax."""

from dataclasses import dataclass
from typing import Literal

from cramjax.ranges import Count, Positive


@dataclass(frozen=True)
class AdapterConfig:
    """What is trained beside a model's own weights, which stay as they are. Needs `start_from`."""

    kind: Literal["lora", "ia3", "bitfit", "prompt", "prefix"] = "lora"
    """`lora`: to each matrix of `targets` a product of two narrow ones is added (Hu et al. 2021, arXiv:2106.09685).
    `ia3`: keys, values and the input of the feed-forward layer's second matrix are scaled (Liu et al. 2022,
    arXiv:2205.05638). `bitfit`: the model's biases are trained (Ben Zaken et al. 2021, arXiv:2106.10199). `prompt`:
    virtual tokens before every text (Lester et al. 2021, arXiv:2104.08691). `prefix`: keys and values of virtual tokens
    in every block, without a network that makes them (Li & Liang 2021, arXiv:2101.00190). Each example in a row sees
    all virtual tokens, and positions begin after them."""
    rank: Count = 16
    """lora: width between the two matrices."""
    alpha: Positive = 32.0
    """lora: the product is multiplied by alpha / rank."""
    rank_stabilised: bool = False
    """lora: multiply by alpha / √rank instead, which suits high ranks (rsLoRA: Kalajdzievski 2023,
    arXiv:2312.03732)."""
    dora: bool = False
    """lora: train the length of each column apart from its direction (DoRA: Liu et al. 2024, arXiv:2402.09353)."""
    b_ratio: Positive = 1.0
    """lora: learning rate of the second matrix over that of the first (LoRA+: Hayou et al. 2024, arXiv:2402.12354,
    advises 16)."""
    targets: tuple[str, ...] = ("blocks/*",)
    """lora: matrices that get one, by patterns of paths such as `blocks/attention/*`. Default: all linear layers."""
    virtual_tokens: Count = 20
    """prompt, prefix: how many. No loss is on them, and the model's context holds so many tokens less."""
    prompt_start: Literal["vocabulary", "random", "text"] = "vocabulary"
    """prompt: what it starts as: tokens drawn from the vocabulary, random rows, or a text."""
    prompt_text: str | None = None
    """prompt: that text, repeated or cut to `virtual_tokens`."""
    base: Literal["float32", "bfloat16", "int8", "int4", "nf4", "fp8", "mxfp4"] = "float32"
    """How the model's own weights are held. `int8`, `int4` and `fp8` (e4m3) round matrices in groups of 64, `nf4` as
    QLoRA does, with doubly quantised scales (Dettmers et al. 2023, arXiv:2305.14314), `mxfp4` in blocks of 32 with an
    exponent (OCP Microscaling Formats 1.0); embeddings and head are then bfloat16. Matrices that `cramjax compress`
    packed so stay as they are."""
