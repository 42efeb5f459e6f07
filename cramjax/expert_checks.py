"""What `model.experts` must satisfy beyond ranges; a part of `cramjax.validation`."""

from cramjax.config import LayerConfig, ModelConfig, OptimConfig
from cramjax.errors import ConfigError
from cramjax.experts import ExpertsConfig


def check_experts(model: ModelConfig, optim: OptimConfig) -> None:
    """Check the experts of a model, if it has any.

    Raises:
        ConfigError: the first number or combination that cannot be.
    """
    experts = model.experts
    if experts is None:
        return
    if experts.active > experts.number:
        raise ConfigError(
            f"model.experts.active must be at most model.experts.number, which is {experts.number}, got "
            f"{experts.active}: lower it, or give more experts."
        )
    if experts.shared_gate and not experts.shared:
        raise ConfigError(
            "model.experts.shared_gate is true, and there are no shared experts: set model.experts.shared to 1 or more."
        )
    if experts.width is None and model.mlp % (experts.active + experts.shared):
        raise ConfigError(
            f"model.mlp is {model.mlp}, which the {experts.active + experts.shared} experts of a token (active and "
            "shared) do not divide: set model.experts.width."
        )
    if not any(layer.experts for layer in model.pattern or (LayerConfig(),)) or experts.every > model.layers:
        raise ConfigError(
            f"model.experts.every is {experts.every}, and with model.layers={model.layers} and the pattern given no "
            "block has experts: lower it, or leave model.experts out."
        )
    if model.bias:
        raise ConfigError(
            "model.bias is true, and experts have no biases: set it to false, or leave model.experts out."
        )
    if model.mup_base_width is not None:
        raise ConfigError(
            "model.mup_base_width is given, and µP has no rule here for the router of model.experts: leave one out."
        )
    if experts.normalised and experts.active == 1:
        raise ConfigError(
            "model.experts.normalised is true with active=1: the one score would always be 1, and the router learn "
            "nothing. Set it to false, or active to 2 or more."
        )
    if optim.traits.curvature:
        raise ConfigError(
            f"optim.name is {optim.name}, which differentiates the loss twice, and the products of model.experts "
            "can be differentiated once: choose adamw or muon, say."
        )
    for key, of in (("balance_rate", "bias"), ("balance_loss", "loss")):
        if experts.balance != of and getattr(experts, key) != getattr(ExpertsConfig(), key):
            raise ConfigError(
                f"model.experts.{key} is {getattr(experts, key):g}, but balance is {experts.balance}, and only {of} "
                "has it: leave it out."
            )
