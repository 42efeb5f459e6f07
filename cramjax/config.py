"""What a run is: frozen dataclasses, one per subsystem. A recipe is a YAML file of their fields.

Every default below is a choice; recipes in `configs/` state only what they change. This module imports no jax, so that
`--help` and configuration errors are instant. Loading and overriding live in `cramjax.recipes`.
"""

import html
from dataclasses import asdict, dataclass, field
from typing import Literal

import yaml

from cramjax.adapters import AdapterConfig
from cramjax.classifier import ClassifierConfig
from cramjax.examples import ExamplesConfig, LabelsConfig
from cramjax.experts import ExpertsConfig
from cramjax.optimizers import OPTIMIZERS, Optimizer, Traits
from cramjax.ranges import Count, Factor, InnerShare, Natural, NotNegative, Positive, Share, ShareBelowOne

Activation = Literal["gelu", "gelu_tanh", "geglu", "geglu_tanh", "swiglu", "relu2"]
GATED: tuple[Activation, ...] = ("geglu", "geglu_tanh", "swiglu")
"""Those that read a gate beside what it lets through."""
ComputeDtype = Literal["auto", "float32", "bfloat16"]
Remat = Literal["none", "selective", "full", "offload"]
Positions = Literal["none", "learned", "sinusoidal", "rotary"]
ScheduleName = Literal["triangle", "one_cycle", "cosine", "wsd", "constant"]


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes sequences."""

    source: str | list[str] = "stdlib"
    """`stdlib` (the Python standard library's own source), paths or globs of text, JSONL or Parquet files (also .gz,
    .bz2, .xz, .zst), a directory saved by Hugging Face `datasets`, or `hub:NAME` for a data set on the Hugging Face
    hub."""
    validation: str | list[str] | None = None
    """Held-out text, given like `source`. Without it, documents are held out of `source`."""
    validation_fraction: InnerShare = 0.02
    """Share of documents held out when `validation` is not given."""
    text_field: str = "text"
    """Column that holds the text in JSONL, Parquet and Hugging Face data."""
    document_separator: str | None = None
    """String that divides a text file into documents. Without it, a file is one document (a very long one is cut
    at line ends)."""
    hub_config: str | None = None
    """Configuration name of a hub data set."""
    hub_split: str = "train"
    """Split of a hub data set."""
    streaming: bool = True
    """Read hub data as a stream instead of downloading it whole."""
    limit_bytes: Count | None = None
    """Stop reading training text after this many bytes (UTF-8)."""
    normalize: Literal["none", "nfc", "nfkc", "ascii_lower"] = "nfc"
    """Unicode normalisation of every document; `ascii_lower` is Cramming's: decomposed, lower-cased, non-ASCII
    dropped."""
    max_tokens_per_char: Positive | None = None
    """Cramming's filter: drop a document that the tokenizer compresses worse than this (Cramming: 0.25)."""
    min_chars: Natural = 1
    """Drop documents shorter than this many characters."""
    deduplicate: bool = True
    """Drop documents that are exact duplicates of an earlier one."""
    sequence_length: Count = 128
    """Tokens per training sequence."""
    context: Count | None = None
    """Tokens that the model sees when it is used. Default: `sequence_length`; of a model tuned on text or examples
    those that the model of `start_from` sees, less virtual ones."""
    order: Literal["shuffled", "sentence_length"] = "shuffled"
    """Order of sequences: shuffled anew every epoch, or Cramming's curriculum (sorted by mean sentence length)."""
    cache_dir: str | None = None
    """Where prepared data is kept. Default: `$CRAMJAX_CACHE`, else `~/.cache/cramjax`."""


@dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes tokens."""

    kind: Literal["bpe", "wordpiece", "bytes", "file"] = "bpe"
    """Train byte-level BPE or WordPiece on the data, use raw bytes, or load a `tokenizer.json` given by `path`."""
    vocab_size: Count = 4096
    """Vocabulary to train, special tokens included. Ignored for `bytes` and `file`."""
    path: str | None = None
    """The `tokenizer.json` for kind `file`."""
    train_bytes: Count = 32_000_000
    """Most bytes of text that tokenizer training reads, spread over the source files; it reads about 3 MB/s a core."""


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are changed for contexts longer than those that a model was first trained with."""

    kind: Literal["linear", "llama3", "yarn"]
    """`linear` slows every frequency down by `factor` (Chen et al. 2023, arXiv:2306.15595), `llama3` those whose
    wavelength is long, `yarn` those that turn seldom (Peng et al. 2023, arXiv:2309.00071)."""
    factor: Factor
    """What slow frequencies are divided by."""
    original_positions: Count = 8192
    """Tokens that the model was first trained with (llama3, yarn)."""
    low_factor: Positive = 1.0
    """llama3: wavelengths above `original_positions / low_factor` are slowed down whole."""
    high_factor: Positive = 4.0
    """llama3: wavelengths below `original_positions / high_factor` stay."""
    beta_fast: Positive = 32.0
    """yarn: frequencies that turn more often than this within `original_positions` stay."""
    beta_slow: Positive = 1.0
    """yarn: frequencies that turn less often than this are slowed down whole."""
    attention_factor: Positive | None = None
    """yarn: multiplies cosines and sines. Default: 0.1 ln(factor) + 1."""
    truncate: bool = True
    """yarn: round the ends of the ramp between the two outwards to whole frequencies."""


@dataclass(frozen=True)
class LayerConfig:
    """What one block of a pattern has that others may have otherwise."""

    window: Count | None = None
    """Sliding-window attention, as `model.window` has it for all blocks. null: the whole context."""
    rope_base: Positive | None = None
    """Base of the rotary frequencies. Default: the model's."""
    rope_scaled: bool = True
    """Whether `model.rope_scaling` counts for this block."""
    rotary: bool = True
    """Whether rotary positions enter this block (SmolLM3: not every fourth)."""
    attention_norm: bool = True
    """Normalise the input of attention (ModernBERT: not in the first block)."""
    experts: bool = True
    """Whether this block has the model's experts, where `model.experts` gives it any."""


@dataclass(frozen=True)
class ModelConfig:
    """One configurable block, stacked. The defaults are GPT-2's shape of things; recipes choose the rest."""

    layers: Count = 4
    """Blocks in the stack."""
    width: Count = 128
    """Width of the residual stream (`embed`)."""
    heads: Count = 4
    """Attention heads."""
    kv_heads: Count | None = None
    """Key/value heads (grouped-query attention). Default: `heads`."""
    head_dim: Count | None = None
    """Width of one head. Default: `width / heads`."""
    mlp: Count = 512
    """Hidden width of the feed-forward layer, after the gate for gated activations."""
    activation: Activation = "gelu_tanh"
    """Feed-forward non-linearity; `geglu`, `geglu_tanh` (its gate as `gelu_tanh` has it) and `swiglu` are gated and
    read a projection twice as wide."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation layer."""
    norm_position: Literal["pre", "post", "sandwich"] = "pre"
    """Normalise the input of each sublayer (pre), the sum after it (post), or its input and its output before the sum
    (sandwich, as Gemma 2 has it)."""
    norm_eps: Positive = 1e-5
    """Epsilon inside every normalisation."""
    norm_affine: bool = True
    """Learned weight (and, for LayerNorm, bias) in every normalisation."""
    norm_bias: bool = True
    """Learned bias of LayerNorms, where `norm_affine` is true."""
    bias: bool = False
    """Biases in the linear layers of the block."""
    qkv_bias: bool = False
    """Biases of queries, keys and values, whatever `bias` is (Qwen2)."""
    positions: Positions = "rotary"
    """How positions enter: `sinusoidal` is a fixed table times one learned scalar (Cramming)."""
    max_positions: Count | None = None
    """Rows of a learned or sinusoidal table. Default: the sequence length of the data."""
    rope_base: Positive = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Change of the rotary frequencies for longer contexts."""
    qk_norm: bool = False
    """RMS-normalise queries and keys per head."""
    qk_norm_weight: bool = False
    """A learned weight of the norm of queries, and one of keys, each as wide as a head."""
    attention_scale: Positive | None = None
    """Multiplies the attention scores. Default: 1/sqrt(head width); with µP 1/(head width) beyond the base's."""
    attention_softcap: Positive | None = None
    """Squash attention scores smoothly into ±this value: c·tanh(scores / c) (Gemma 2)."""
    window: Count | None = None
    """Sliding-window attention: each token sees this many tokens back, itself included (masked models: both ways)."""
    pattern: tuple[LayerConfig, ...] = ()
    """Configurations of blocks that take turns: block i has number i modulo their count, for example
    [{window: 512}, {window: null}]. Empty: all blocks are alike. `window` above must then be null."""
    mask_documents: bool = False
    """Keep attention inside each packed document."""
    token_types: Natural = 0
    """Rows of a token-type embedding (BERT has 2); without other input, type 0 is used everywhere."""
    embedding_scale: Positive = 1.0
    """Multiplies the rows of the token embedding (Gemma: sqrt(width))."""
    embedding_norm: bool = False
    """Normalise after the embedding."""
    final_norm: bool = True
    """Normalise before the head."""
    head_transform: bool = False
    """BERT's dense + GELU + LayerNorm before the decoder."""
    head_transform_bias: bool = True
    """Bias of that dense layer."""
    head_bias: bool = False
    """Bias per vocabulary entry in the decoder."""
    tied: bool = True
    """Decode with the embedding matrix."""
    adaptive_head: tuple[int, ...] = ()
    """Adaptive softmax: cut the vocabulary at these ids, for example [1024,4096]. Tokens below the first cut keep the
    full head; each later group, of rarer tokens, has one half as wide as the group before it. Cuts past
    the vocabulary cut nothing. Needs an untied head."""
    logit_softcap: Positive | None = None
    """Squash logits smoothly into ±this value: c·tanh(logits / c)."""
    embedding_skip: bool = False
    """Learned weights, per block, on the residual stream and on the embedding (x₀) mixed back into it."""
    value_embeddings: bool = False
    """Per-token embeddings added to the attention values of every other block, counted from the last."""
    bigram_buckets: Natural = 0
    """Rows of a hashed bigram embedding added to the token embedding (0: none). Causal models only."""
    zero_init_outputs: bool = False
    """Start the output projection of each sublayer at zero."""
    init_std: Positive | None = 0.02
    """Standard deviation of the normal initialisation; null: 1/sqrt(fan_in) for matrices and 1/sqrt(width) for
    embeddings."""
    depth_scaled_init: bool = False
    """Divide the output projections' initial scale by sqrt(2 · layers), as GPT-2 does."""
    mup_base_width: Count | None = None
    """µP: the width at which the learning rates, the decay and `init_std` were tuned; they then hold at any width, if
    `mlp` and `heads · head_dim` grow with it (Yang et al. 2022, arXiv:2203.03466). null: standard parametrisation."""
    mup_base_head_dim: Count | None = None
    """µP: width of one head where the rates were tuned. Default: as wide as now, so that wider models have more
    heads."""
    vocab_multiple: Count = 64
    """Pad the vocabulary's rows to a multiple of this; padding never receives probability."""
    dropout: ShareBelowOne = 0.0
    """Dropout on embeddings and on each sublayer's output, in training."""
    classifier: ClassifierConfig | None = None
    """A head for labels in the place of the one for tokens; tuning on `labels` makes it."""
    experts: ExpertsConfig | None = None
    """Experts in the place of the feed-forward layer. null: none."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the model is trained to predict."""

    kind: Literal["causal", "masked", "examples", "preference", "labels", "causal_labels"] = "causal"
    """Next token, masked tokens; tuning only: what is to be predicted of examples, which of two answers is preferred,
    or labels, by the first token, or by the last one of a causal model (`causal_labels`)."""
    beta: Positive = 0.1
    """preference: how much moving away from the model as it was costs (DPO's β)."""
    mask_rate: InnerShare = 0.25
    """Share of positions predicted by the masked objective: exactly round(rate · sequence length) per sequence."""
    mask_rate_end: InnerShare | None = None
    """Mask rate at the end of the budget; it moves linearly with the spent fraction."""
    z_loss: NotNegative = 0.0
    """Weight of the squared log-partition penalty."""

    @property
    def causal(self) -> bool:
        """Whether tokens are predicted from those before them alone."""
        return self.kind not in ("masked", "labels")

    @property
    def labelled(self) -> bool:
        """Whether labels of whole texts are predicted."""
        return self.kind in ("labels", "causal_labels")

    def row_shape(self, sequence_length: int) -> tuple[int, ...]:
        """The shape of one row of a batch, of which the model sees `sequence_length` tokens."""
        if self.kind in ("causal", "masked"):
            return (sequence_length + int(self.causal),)
        return (3, sequence_length + 1)

    def predicted(self, sequence_length: int) -> int:
        """Tokens that the head predicts of a row, at most; of labelled texts none."""
        if self.labelled:
            return 0
        if self.causal:
            return sequence_length
        return round(max(self.mask_rate, self.mask_rate_end or 0.0) * sequence_length)


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer, parameter groups and schedule. Rates are peaks; the schedule is a function of the spent fraction."""

    name: Optimizer = "adamw"
    """Optimizer of the matrices; `muon` trains embeddings, head, norms and biases with AdamW. `lomo` and `adalomo`
    update each block as soon as its gradient exists, and never hold all gradients."""
    lr: Positive = 1e-3
    """Peak learning rate of the matrices."""
    embed_lr: NotNegative | None = None
    """Peak rate of the embeddings. Default: `lr`."""
    head_lr: NotNegative | None = None
    """Peak rate of an untied head. Default: `lr`."""
    scalar_lr: NotNegative | None = None
    """Peak rate of norms, biases and scalars. Default: `lr`."""
    beta1: ShareBelowOne = 0.9
    """First-moment decay (Muon: of its AdamW groups)."""
    beta2: ShareBelowOne = 0.95
    """Second-moment decay."""
    eps: Positive = 1e-8
    """Added to the denominator."""
    momentum: ShareBelowOne = 0.95
    """Muon's momentum."""
    newton_schulz_steps: Count = 5
    """Muon's orthogonalisation steps."""
    weight_decay: NotNegative = 0.0
    """Decoupled decay of matrices and embeddings, times the current rate; never of norms, biases and scalars."""
    embed_weight_decay: NotNegative | None = None
    """Decay of the embeddings (and tied head). Default: `weight_decay`."""
    cautious_decay: bool = False
    """Decay an entry only where the update and the weight have the same sign."""
    clip: Positive | None = 1.0
    """Global gradient norm limit. With `lomo` it costs a second backward pass (null: none); with `adalomo` it is the
    limit of the root mean square of each tensor's update."""
    schedule: ScheduleName = "wsd"
    """Shape of the learning rate over the spent fraction."""
    warmup: ShareBelowOne = 0.0
    """Spent fraction at which warm-up ends (cosine, wsd, constant; one_cycle: where its peak is)."""
    decay: Share = 0.5
    """Share of the budget over which wsd decays."""
    final_lr: Share = 0.0
    """Rate at the end, as a share of the peak."""
    ema: ShareBelowOne = 0.0
    """Decay per step of an exponential moving average of the weights, used for evaluation (0: none)."""
    ema_start: Share = 0.5
    """Spent fraction at which the average starts."""

    @property
    def traits(self) -> Traits:
        """What the optimizer is capable of."""
        return OPTIMIZERS[self.name]


@dataclass(frozen=True)
class BatchConfig:
    """How many sequences a step sees."""

    size: Count = 32
    """Sequences per optimizer step (at the end of the ramp)."""
    microbatch: Count | None = None
    """Sequences per forward-backward pass over all devices; gradients accumulate up to `size`. Default: `size`."""
    ramp: Share = 0.0
    """Spent fraction at which the batch reaches `size`, growing linearly from one microbatch (0: no ramp)."""


@dataclass(frozen=True)
class TrainConfig:
    """How the loop runs."""

    compute_dtype: ComputeDtype = "auto"
    """Precision of activations and matrix products; sums, norms, softmax, gradients of weights, the weights themselves
    and the optimizer stay float32. `auto`: bfloat16 on GPUs, TPUs and CPUs with instructions for it (measured once),
    else float32."""
    layer_loop: Literal["auto", "scan", "unroll"] = "auto"
    """Walk the stack with `scan` (compiles fast) or unrolled (runs faster). `auto`: unrolled up to 8 layers, on GPUs up
    to 32, unless `remat` recomputes something: on CPUs that saves memory under `scan` only."""
    remat: Remat = "none"
    """What the backward pass recomputes instead of keeping it: nothing; attention, norms and non-linearities, keeping
    products of matrices (`selective`); each whole block (`full`). `offload` is as `selective`, and holds what it keeps
    of all blocks, their inputs included, in host memory."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which the device holds parameters. bfloat16 halves their memory; it needs `lomo` or `adalomo`,
    which then round each update stochastically, or `offload_optimizer`, which keeps a float32 copy in host memory."""
    freeze: tuple[str, ...] = ()
    """Parameters that are not trained, by patterns of their paths such as `embed/*` or `blocks/mlp/*`, where `*` stands
    for anything: they have no gradient and no optimizer state. FLOPs are counted as if they were trained. Not with
    `lomo`, `adalomo` or `offload_optimizer`."""
    zero: Literal[1, 2, 3] = 3
    """What the `fsdp` axis shards: optimizer state (1), gradients as well (2), parameters as well (3). A run may be
    resumed with another `zero`, `fsdp`, `data_parallel` or `remat` in its config.yaml."""
    offload_optimizer: bool = False
    """Keep optimizer state and float32 weights in host memory and update them there (ZeRO-Offload); AdamW only."""
    delay_update: Share | None = None
    """With `offload_optimizer`: spent fraction from which each update is applied one step late, so that it overlaps
    the next step. Default: never."""
    memory: Literal["as_given", "auto"] = "as_given"
    """`auto` lets the planner choose `batch.microbatch` and `remat` for the memory there is."""
    data_parallel: Count | None = None
    """Devices on the `data` mesh axis. Default: all that `fsdp` leaves."""
    fsdp: Count = 1
    """Devices on the `fsdp` mesh axis, over which parameters and optimizer state are sharded."""
    nonfinite: Literal["stop", "rollback"] = "stop"
    """On a non-finite loss: stop with an error, or go back to the last checkpoint and skip the batches since."""
    log_points: Count = 200
    """Metric lines written over a run, about."""
    prefetch: Count = 2
    """Batches prepared ahead of the device."""
    profile: bool = False
    """Trace a few of the first steps into the run directory, for TensorBoard's profile plugin; with
    `offload_optimizer`, say what they waited for. Also as `--profile`."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation during a run, on held-out text. The last evaluation always reads all of it."""

    points: Count = 10
    """Evaluations over the budget, evenly spaced, the last at its end."""
    tokens: Count = 65_536
    """Most held-out tokens read by each evaluation but the last."""
    batch: Count = 64
    """Sequences per evaluation batch."""
    samples: tuple[str, ...] = ("",)
    """Prompts continued at the end of the run (masked models: sentences with [MASK])."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept of a run, and how often."""

    points: Count = 10
    """Checkpoints over the budget, evenly spaced, the last at its end."""
    seconds: Positive | None = 900.0
    """Also save when this many seconds have passed since the last checkpoint."""
    keep: Count = 2
    """Newest checkpoints kept, beside the best."""


@dataclass(frozen=True)
class RunConfig:
    """A whole run."""

    budget: str = "3min"
    """What may be spent: a time (`24h`, `10min`, `90s`), tokens (`300Mtok`), FLOPs (`1.5e18flop`) or steps
    (`500steps`)."""
    seed: Natural = 0
    """Seed of initialisation, data order, masking and dropout."""
    start_from: str | None = None
    """Continue from the weights of a model or run directory, with a new budget; also as `--model.from`. Architecture
    (but for `dropout` and `mask_documents`), vocabulary, `data.normalize` and objective are then that model's."""
    data: DataConfig = field(default_factory=DataConfig)
    examples: ExamplesConfig | None = None
    """Train on examples (conversations, prompts and completions), of which only some tokens are predicted, in rows of
    `data.sequence_length`; needs `start_from`. null: on the text of `data`."""
    labels: LabelsConfig | None = None
    """Train on labelled texts or pairs (classification, regression), of at most `data.sequence_length` tokens; needs
    `start_from`, whose head for tokens gives way to one for labels. null: on text or examples."""

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    adapter: AdapterConfig | None = None
    """Train an adapter beside the weights of `start_from`. null: train these themselves."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    @property
    def source(self) -> str | list[str]:
        """What is trained on."""
        return (self.labels or self.examples or self.data).source

    @property
    def context(self) -> int:
        """Tokens that the model sees."""
        return self.data.context or self.data.sequence_length

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(yaml.safe_dump(asdict(self), sort_keys=False, width=100))}</pre>"
