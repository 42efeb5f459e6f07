"""The pattern of the stack: how each block is configured, and the period that walks repeat.

Parameters of blocks are stacked over the repeats of the smallest period: with one, `blocks/attention/…`; with several
blocks in a period, `blocks/0/attention/…`, `blocks/1/attention/…`.
"""

from dataclasses import replace

from cramjax.config import LayerConfig, ModelConfig


def layer_configs(config: ModelConfig) -> tuple[LayerConfig, ...]:
    """How each block of the stack is configured, with what the model says filled in."""
    if not config.pattern:
        return tuple(_filled(config, LayerConfig(window=config.window), layer) for layer in range(config.layers))
    pattern = config.pattern
    return tuple(_filled(config, pattern[layer % len(pattern)], layer) for layer in range(config.layers))


def period_of(config: ModelConfig) -> tuple[LayerConfig, ...]:
    """The blocks that the stack repeats: the fewest that it is a whole number of."""
    layers = layer_configs(config)
    lengths = (length for length in range(1, len(layers) + 1) if len(layers) % length == 0)
    return layers[: next(n for n in lengths if layers == layers[:n] * (len(layers) // n))]


def repeats_of(config: ModelConfig) -> int:
    """How often the stack repeats its period: the steps of a walk."""
    return config.layers // len(period_of(config))


def rotaries_of(config: ModelConfig) -> tuple[tuple[float, bool], ...]:
    """Base of the frequencies, and whether they are scaled, of each set of rotary angles that some block reads."""
    return tuple(dict.fromkeys(rotary for layer in period_of(config) if (rotary := rotary_of(layer)) is not None))


def rotary_of(layer: LayerConfig) -> tuple[float, bool] | None:
    """Base and scaling of the angles that a block reads; None: it has no positions."""
    return None if layer.rope_base is None else (layer.rope_base, layer.rope_scaled)


def widest_window(config: ModelConfig) -> int | None:
    """The widest window of any block; None: some block sees the whole context."""
    windows = [layer.window for layer in period_of(config)]
    return None if None in windows else max(window for window in windows if window is not None)


def _filled(config: ModelConfig, layer: LayerConfig, number: int) -> LayerConfig:
    """A block's configuration, of which blocks that compute the same have the same."""
    rotary = layer.rotary and config.positions == "rotary"
    return replace(
        layer,
        rotary=rotary,
        rope_base=(layer.rope_base or config.rope_base) if rotary else None,
        rope_scaled=rotary and layer.rope_scaled and config.rope_scaling is not None,
        experts=config.experts is not None and layer.experts and (number + 1) % config.experts.every == 0,
    )
