"""What a configuration must satisfy beyond types and ranges: combinations of fields that cannot be.

Every message gives the value got, the values allowed, and what to do. Called on every loaded configuration.
"""

from cramjax.adapters import AdapterConfig
from cramjax.budget import Budget
from cramjax.config import (
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    TokenizerConfig,
)
from cramjax.errors import ConfigError
from cramjax.expert_checks import check_experts
from cramjax.loading import check_ranges
from cramjax.optimizers import names_of


def validate(config: RunConfig) -> None:
    """Check ranges and combinations of a configuration.

    Raises:
        ConfigError: the first value or combination that cannot be.
    """
    Budget.parse(config.budget)
    check_ranges(config)
    _check_data(config.data)
    _check_tokenizer(config.tokenizer)
    _check_model(config.model, config.data.sequence_length)
    _check_context(config.model, config.data)
    _check_positions(config.model)
    check_experts(config.model, config.optim)
    _check_objective(config)
    check_optimizer(config.optim)
    _check_optim(config.optim, config.model)
    _check_adaptive_head(config.model)
    _check_mup(config.model, config.optim)
    _check_fused(config)
    _check_batch(config)
    _check_offload(config)
    _check_freeze(config)
    _check_start(config)
    _check_adapter(config)
    _check_preference(config)


def _check_data(data: DataConfig) -> None:
    for key, given in (("data.source", data.source), ("data.validation", data.validation)):
        if given is None:
            continue
        sources = [given] if isinstance(given, str) else given
        if not sources or not all(source.strip() for source in sources):
            raise ConfigError(
                f"{key} must name at least one source of text, got {given!r}: give `stdlib`, a path, or `hub:NAME`."
            )
        if "hub:" in sources:
            raise ConfigError(f"{key} must name a data set after `hub:`, got {given!r}: for example `hub:allenai/c4`.")
    sources = [data.source] if isinstance(data.source, str) else data.source
    if data.hub_config is not None and not any(source.startswith("hub:") for source in sources):
        raise ConfigError(
            f"data.hub_config is {data.hub_config!r}, but data.source is {data.source!r}: give `hub:NAME` as the "
            "source, or leave data.hub_config out."
        )
    if data.document_separator == "":
        raise ConfigError("data.document_separator must not be empty: leave it out to keep each file whole.")


def _check_tokenizer(tokenizer: TokenizerConfig) -> None:
    # Byte-level BPE starts from 256 bytes and two special tokens; WordPiece from its alphabet, twice, and its specials.
    least = {"bpe": 258, "wordpiece": 128}.get(tokenizer.kind, 0)
    if tokenizer.vocab_size < least:
        raise ConfigError(
            f"tokenizer.vocab_size must be at least {least} for kind {tokenizer.kind}, got {tokenizer.vocab_size}: "
            "give more, or use tokenizer.kind=bytes."
        )
    if tokenizer.kind == "file" and not tokenizer.path:
        raise ConfigError("tokenizer.kind is file, so tokenizer.path must name a tokenizer.json; it is not given.")
    if tokenizer.kind != "file" and tokenizer.path is not None:
        raise ConfigError(
            f"tokenizer.path is {tokenizer.path!r}, but tokenizer.kind is {tokenizer.kind}, which trains its own: set "
            "tokenizer.kind=file, or leave the path out."
        )


def _check_model(model: ModelConfig, sequence_length: int) -> None:
    if model.head_dim is None and model.width % model.heads:
        raise ConfigError(
            f"model.width must be a multiple of model.heads, got width {model.width} and {model.heads} heads: allowed "
            f"heads are {_divisors(model.width)}; or set model.head_dim."
        )
    head_dim = model.head_dim or model.width // model.heads
    if model.kv_heads is not None and model.heads % model.kv_heads:
        raise ConfigError(
            f"model.kv_heads must divide model.heads, got {model.kv_heads} for {model.heads} heads: allowed are "
            f"{_divisors(model.heads)}."
        )
    if model.positions == "rotary" and head_dim % 2:
        raise ConfigError(
            f"rotary positions need an even head width, got {head_dim}: change model.heads or model.head_dim."
        )
    if model.positions == "sinusoidal" and model.width % 2:
        raise ConfigError(f"sinusoidal positions need an even model.width, got {model.width}.")
    if model.max_positions is not None and model.max_positions < sequence_length:
        raise ConfigError(
            f"model.max_positions must be at least data.sequence_length ({sequence_length}), got "
            f"{model.max_positions}: give more, or leave it out."
        )


def _check_context(model: ModelConfig, data: DataConfig) -> None:
    if data.context is None:
        return
    if data.context < data.sequence_length:
        raise ConfigError(
            f"data.context must be at least data.sequence_length ({data.sequence_length}), got {data.context}: give "
            "more, or leave it out."
        )
    rows = model.max_positions or data.sequence_length
    if model.positions in ("learned", "sinusoidal") and data.context > rows:
        raise ConfigError(
            f"data.context must be at most {rows} with model.positions={model.positions}, whose table has so many "
            f"rows, got {data.context}: lower it, or give model.max_positions."
        )


def _check_positions(model: ModelConfig) -> None:
    """What must be there for a part of the block to be a part of something."""
    if model.qk_norm_weight and not model.qk_norm:
        raise ConfigError(
            "model.qk_norm_weight is true, but model.qk_norm is false, and these are weights of that norm: set "
            "model.qk_norm=true, or leave it out."
        )
    if model.attention_scale is not None and model.mup_base_width is not None:
        raise ConfigError(
            f"model.attention_scale is {model.attention_scale:g}, but model.mup_base_width is given, and µP scales the "
            "scores itself: leave one out."
        )
    _check_pattern(model)
    scaling = model.rope_scaling
    if scaling is None:
        return
    if model.positions != "rotary":
        raise ConfigError(
            f"model.rope_scaling scales rotary positions, and model.positions is {model.positions}: set "
            "model.positions=rotary, or leave it out."
        )
    for low, high in (("low_factor", "high_factor"), ("beta_slow", "beta_fast")):
        if getattr(scaling, low) >= getattr(scaling, high):
            raise ConfigError(
                f"model.rope_scaling.{low} must be below {high}, got {getattr(scaling, low):g} and "
                f"{getattr(scaling, high):g}."
            )
    if scaling.attention_factor is not None and scaling.kind != "yarn":
        raise ConfigError(
            f"model.rope_scaling.attention_factor is {scaling.attention_factor:g}, but its kind is {scaling.kind}, and "
            "only yarn has one: leave it out."
        )


def _check_pattern(model: ModelConfig) -> None:
    if not model.pattern:
        return
    if model.window is not None:
        raise ConfigError(
            f"model.window is {model.window} for all blocks, and model.pattern gives each its own: leave model.window "
            "out, and set window in the pattern."
        )
    if model.norm_position == "post" and not all(layer.attention_norm for layer in model.pattern):
        raise ConfigError(
            "model.pattern leaves out a block's attention_norm, and with model.norm_position=post that norm is the "
            "stream's: set attention_norm=true, or norm_position to pre or sandwich."
        )
    if model.positions != "rotary" and any(layer.rope_base is not None for layer in model.pattern):
        raise ConfigError(
            f"model.pattern gives a rope_base, and model.positions is {model.positions}: set model.positions=rotary, "
            "or leave it out."
        )


def _check_objective(config: RunConfig) -> None:
    objective = config.objective
    if objective.causal:
        if objective.mask_rate_end is not None:
            raise ConfigError(
                f"objective.mask_rate_end is {objective.mask_rate_end:g}, but objective.kind is {objective.kind}, "
                "which masks nothing: set objective.kind=masked, or leave it out."
            )
        return
    length = config.data.sequence_length
    for key, rate in (("mask_rate", objective.mask_rate), ("mask_rate_end", objective.mask_rate_end)):
        if rate is not None and round(rate * length) < 1:
            raise ConfigError(
                f"objective.{key} must mask at least one position of data.sequence_length={length}, got {rate:g}: "
                f"give at least {1 / length:.3g}."
            )
    if config.model.bigram_buckets:
        raise ConfigError(
            f"model.bigram_buckets must be 0 for objective.kind=masked, got {config.model.bigram_buckets}: the bigram "
            "embedding looks at the previous token, which masking is meant to hide."
        )
    for sample in config.evaluate.samples:
        if sample and "[MASK]" not in sample:
            raise ConfigError(
                f"evaluate.samples must contain [MASK] for objective.kind=masked, got {sample!r}: mark the place to "
                "fill, or leave the sample out."
            )


def _check_adaptive_head(model: ModelConfig) -> None:
    cuts = model.adaptive_head
    if not cuts:
        return
    if list(cuts) != sorted(set(cuts)) or cuts[0] < 1:
        raise ConfigError(f"model.adaptive_head must be growing token ids such as [1024, 4096], got {list(cuts)}.")
    if model.tied or model.head_bias:
        raise ConfigError(
            f"model.adaptive_head={list(cuts)} needs model.tied=false and model.head_bias=false: its heads are "
            "matrices of their own."
        )
    if model.width >> len(cuts) < 1:
        raise ConfigError(
            f"model.adaptive_head has {len(cuts)} cuts, each halving model.width={model.width}: give fewer."
        )


def _check_mup(model: ModelConfig, optim: OptimConfig) -> None:
    if model.mup_base_width is None:
        if model.mup_base_head_dim is not None:
            raise ConfigError(
                f"model.mup_base_head_dim is {model.mup_base_head_dim}, but model.mup_base_width is not given, without "
                "which there is no µP: give both, or neither."
            )
        return
    if not optim.traits.mup:
        raise ConfigError(
            f"model.mup_base_width works with optim.name={', '.join(names_of('mup'))}, got {optim.name}, for whose "
            "rates µP has no rule here: choose one of those, or leave model.mup_base_width out."
        )
    if model.adaptive_head:
        raise ConfigError(
            f"model.mup_base_width excludes model.adaptive_head, got {list(model.adaptive_head)}: its tails are "
            "matrices that are neither hidden nor the output alone. Leave one out."
        )


def check_optimizer(optim: OptimConfig) -> None:
    """Check an optimizer and its schedule, which are also made without a run.

    Raises:
        ConfigError: the first value or combination that cannot be.
    """
    check_ranges(optim, "optim.")
    if optim.schedule == "wsd" and optim.warmup + optim.decay > 1 + 1e-9:  # decimal fractions may miss 1 by a rounding
        raise ConfigError(
            f"optim.warmup + optim.decay must be at most 1 for the wsd schedule, got {optim.warmup:g} + "
            f"{optim.decay:g}: shorten one."
        )
    if optim.schedule == "wsd" and optim.decay == 0:
        raise ConfigError(
            "optim.decay must be above 0 for the wsd schedule, got 0: 0.5 is usual, and optim.schedule=constant "
            "never decays."
        )
    if optim.traits.averages and optim.ema:
        raise ConfigError(f"optim.ema must be 0 for {optim.name}, got {optim.ema:g}: it already evaluates an average.")
    if optim.traits.averages and optim.beta1 == 0:
        raise ConfigError(
            f"optim.beta1 must be above 0 for {optim.name}, got 0: it is the weight of the average. 0.9 is usual."
        )
    if optim.traits.layerwise and optim.ema:
        raise ConfigError(
            f"optim.ema must be 0 for {optim.name}, got {optim.ema:g}: an average is another copy of the weights, "
            f"which {optim.name} is there to do without."
        )


def _check_optim(optim: OptimConfig, model: ModelConfig) -> None:
    if optim.schedule == "one_cycle" and optim.warmup == 0:
        raise ConfigError(
            "optim.warmup is where the one_cycle schedule peaks, and must be above 0, got 0: 0.5 is symmetric."
        )
    if model.tied and optim.head_lr is not None:
        raise ConfigError(
            f"optim.head_lr is {optim.head_lr:g}, but model.tied is true, so the head is the embedding: set "
            "optim.embed_lr, or model.tied=false."
        )


def _check_fused(config: RunConfig) -> None:
    """What updating layer by layer, with no gradient held, leaves no room for."""
    optim, batch, train = config.optim, config.batch, config.train
    if train.param_dtype == "bfloat16" and not (optim.traits.layerwise or train.offload_optimizer):
        raise ConfigError(
            f"train.param_dtype is bfloat16, in which small updates of {optim.name} would be lost: set optim.name to "
            f"{' or '.join(names_of('layerwise'))}, which round stochastically, or train.offload_optimizer=true, which "
            "keeps float32 weights in host memory, or train.param_dtype=float32."
        )
    if not optim.traits.layerwise:
        return
    if batch.microbatch is not None and batch.microbatch < batch.size:
        raise ConfigError(
            f"batch.microbatch is {batch.microbatch} for batch.size={batch.size}, but {optim.name} cannot accumulate: "
            "it updates each layer as soon as its gradient exists, and keeps no gradient to add to. Set batch.size="
            f"{batch.microbatch}, or leave batch.microbatch out (train.remat=full fits the largest batch)."
        )
    if batch.ramp:
        raise ConfigError(
            f"batch.ramp is {batch.ramp:g}, but {optim.name} keeps no gradient to accumulate microbatches in: set "
            "batch.ramp=0."
        )
    if train.layer_loop == "unroll":
        raise ConfigError(
            f"train.layer_loop is unroll, but {optim.name} walks back over the stacked layers in a loop, to update "
            "them in place: set auto or scan."
        )


def _check_batch(config: RunConfig) -> None:
    batch, train = config.batch, config.train
    microbatch = batch.microbatch or batch.size
    chosen = train.memory == "auto"  # by the planner, whatever it is here
    if batch.size % microbatch and not chosen:
        near = max(1, round(batch.size / microbatch)) * microbatch
        raise ConfigError(
            f"batch.microbatch must divide batch.size, got {microbatch} for a batch of {batch.size}: a batch of {near} "
            "would do."
        )
    if batch.ramp and (batch.size == 1 if chosen else microbatch == batch.size):
        raise ConfigError(
            f"batch.ramp is {batch.ramp:g}, but the ramp starts at one microbatch, which is the whole batch of "
            f"{batch.size}: give a smaller batch.microbatch, or batch.ramp=0."
        )
    devices = (train.data_parallel or 1) * train.fsdp
    for key, size in (("batch.microbatch", microbatch), ("evaluate.batch", config.evaluate.batch)):
        if size % devices:
            raise ConfigError(
                f"{key} must be a multiple of the devices that share it (train.data_parallel × train.fsdp = "
                f"{devices}), got {size}."
            )


def _check_offload(config: RunConfig) -> None:
    optim, train = config.optim, config.train
    if not train.offload_optimizer:
        if train.delay_update is not None:
            raise ConfigError(
                f"train.delay_update is {train.delay_update:g}, but train.offload_optimizer is false, and only updates "
                "on the host are worth a delay: set train.offload_optimizer=true, or leave it out."
            )
        return
    if not optim.traits.offloadable:
        able = " or ".join(names_of("offloadable"))
        raise ConfigError(
            f"train.offload_optimizer works with optim.name={able} only, got {optim.name}: the host updates weights "
            f"block by block and entry by entry. Set optim.name={able}, or train.offload_optimizer=false."
        )
    if optim.ema:
        raise ConfigError(
            f"optim.ema must be 0 with train.offload_optimizer, got {optim.ema:g}: the device that evaluates holds no "
            "average. Set optim.ema=0, or train.offload_optimizer=false."
        )
    if train.layer_loop == "unroll":
        raise ConfigError(
            "train.layer_loop is unroll, but train.offload_optimizer walks the stack in a loop: set it to auto or scan."
        )
    if train.zero != 3:
        raise ConfigError(
            f"train.zero must be 3 with train.offload_optimizer, got {train.zero}: the fsdp axis divides weights, "
            "gradients and optimizer state alike. Leave it out."
        )


def _check_start(config: RunConfig) -> None:
    if config.start_from is not None and config.train.offload_optimizer:
        raise ConfigError(
            f"start_from is {config.start_from!r}, but with train.offload_optimizer the first weights are drawn: leave "
            "one out."
        )


def _check_adapter(config: RunConfig) -> None:
    adapter, train = config.adapter, config.train
    if adapter is None:
        return
    if config.optim.traits.layerwise or train.offload_optimizer:
        method = f"optim.name={config.optim.name}" if config.optim.traits.layerwise else "train.offload_optimizer"
        raise ConfigError(
            f"adapter.kind is {adapter.kind}, but {method} updates every weight of a block on the way back through the "
            "stack, and an adapter's block changes in a few alone: leave one out (an adapter needs little optimizer "
            "state)."
        )
    if train.param_dtype == "bfloat16":
        raise ConfigError(
            "train.param_dtype is bfloat16, but an adapter is trained in float32: set adapter.base=bfloat16 for the "
            "model's own weights, and leave train.param_dtype out."
        )
    plain = AdapterConfig()
    for kinds, names in _OF_ADAPTERS.items():
        for name in names:
            if adapter.kind not in kinds and getattr(adapter, name) != getattr(plain, name):
                raise ConfigError(
                    f"adapter.{name} is {getattr(adapter, name)}, but adapter.kind is {adapter.kind}, and only "
                    f"{' and '.join(kinds)} has it: leave it out."
                )
    if (adapter.prompt_start == "text") != bool(adapter.prompt_text):
        raise ConfigError(
            f"adapter.prompt_text is {adapter.prompt_text!r} and adapter.prompt_start is {adapter.prompt_start}: give "
            "a text, and prompt_start=text, or neither."
        )
    _check_virtual(config)


_OF_ADAPTERS = {
    ("lora",): ("rank", "alpha", "rank_stabilised", "dora", "b_ratio", "targets"),
    ("prompt", "prefix"): ("virtual_tokens",),
    ("prompt",): ("prompt_start", "prompt_text"),
}
"""Fields of `AdapterConfig` that only some kinds have."""


def _check_virtual(config: RunConfig) -> None:
    """What virtual tokens exclude."""
    model, adapter = config.model, config.adapter
    if adapter is None or adapter.kind not in ("prompt", "prefix"):
        return
    if model.window is not None or any(layer.window is not None for layer in model.pattern):
        raise ConfigError(
            f"adapter.kind is {adapter.kind}, but the model has blocks with a sliding window, which would lose sight "
            "of virtual tokens: choose lora or ia3."
        )
    if not config.objective.causal and model.mask_documents and adapter.kind == "prompt":
        raise ConfigError(
            "adapter.kind is prompt, but model.mask_documents keeps the documents in a row of a masked model apart, "
            "and a prompt that all of them share would see all: choose prefix, or model.mask_documents=false."
        )
    most = model.max_positions
    if most is not None and config.data.sequence_length + adapter.virtual_tokens > most:
        raise ConfigError(
            f"adapter.virtual_tokens is {adapter.virtual_tokens}, and with data.sequence_length="
            f"{config.data.sequence_length} that is more than the model's {most} positions: lower one."
        )


def _check_preference(config: RunConfig) -> None:
    objective = config.objective
    if config.examples is None or config.examples.format != "preference":
        if objective.beta != ObjectiveConfig().beta:
            raise ConfigError(
                f"objective.beta is {objective.beta:g}, and only examples.format=preference has it: leave it out."
            )
        return
    if objective.z_loss:
        raise ConfigError(
            f"objective.z_loss is {objective.z_loss:g}, and examples.format is preference, whose loss is of answers "
            "and not of tokens: leave it out."
        )
    kind = None if config.adapter is None else config.adapter.kind
    if kind in (None, "bitfit"):
        raise ConfigError(
            f"examples.format is preference, and adapter{' is not given' if kind is None else f'.kind is {kind}'}: "
            "answers are compared with what the model gave before, which only an adapter's base still gives: set "
            "adapter.kind=lora, say."
        )


def _check_freeze(config: RunConfig) -> None:
    if config.train.freeze and config.adapter is not None:
        raise ConfigError(
            f"train.freeze is {list(config.train.freeze)}, but with an adapter all of the model's own weights stay as "
            "they are: leave it out, and choose what is trained by adapter.targets (lora) or adapter.kind."
        )
    fused = config.optim.traits.layerwise
    if config.train.freeze and (fused or config.train.offload_optimizer):
        method = f"optim.name={config.optim.name}" if fused else "train.offload_optimizer"
        raise ConfigError(
            f"train.freeze is {list(config.train.freeze)}, but {method} updates every block on the way back through "
            "the stack: leave one out (what is frozen has no optimizer state either)."
        )


def _divisors(number: int) -> str:
    found = [d for d in range(1, number + 1) if number % d == 0]
    return ", ".join(map(str, found if len(found) <= 12 else found[:12])) + (", …" if len(found) > 12 else "")
