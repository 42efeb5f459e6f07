"""Models of experts of Llama's shape: Mixtral, and Qwen's of the second and third generation.

Files have a matrix of each expert, or, as transformers 5 holds them, all of a block's in one tensor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from cramjax.config import LayerConfig
from cramjax.errors import ModelError
from cramjax.experts import ExpertsConfig
from cramjax.formats.family import Architecture, Family, HfConfig, need, patterned, require
from cramjax.formats.llama import IGNORED, common_table, read_common, write_common
from cramjax.formats.table import Table, linear
from cramjax.formats.tensors import Tensors
from cramjax.model.pattern import layer_configs

_BLOCK = "model.layers.{}"
_PARTS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class _Expert:
    """A matrix of an expert within a tensor of all of them."""

    name: str
    number: int
    rows: slice
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ExpertTensors:
    """Tensors of files with each expert's matrices in the place of those of all of a block's in one."""

    tensors: Any
    """`SafetensorsFiles` or `ArrayTensors`."""
    renamed: Mapping[str, str]
    """Parts of names of files that hold them in one, and what the others have for these."""

    @property
    def names(self) -> Sequence[str]:
        """Of all tensors."""
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one."""
        place = self._places[name]
        return self.tensors.shape(place) if isinstance(place, str) else place.shape

    def dtype(self, name: str) -> np.dtype:
        """Of one."""
        place = self._places[name]
        return self.tensors.dtype(place if isinstance(place, str) else place.name)

    def read(self, name: str) -> np.ndarray:
        """One array."""
        place = self._places[name]
        if isinstance(place, str):
            return self.tensors.read(place)
        return self.tensors.read_part(place.name, place.number)[place.rows]

    @cached_property
    def _places(self) -> dict[str, str | _Expert]:
        places: dict[str, str | _Expert] = {}
        for name in self.tensors.names:
            stem, _, part = name.rpartition(".experts.")
            if part not in ("gate_up_proj", "down_proj"):
                places[self._called(name)] = name
                continue
            number, rows, columns = self.tensors.shape(name)
            parts = _PARTS[:2] if part == "gate_up_proj" else _PARTS[2:]
            height = rows // len(parts)
            for expert in range(number):
                for place, own in enumerate(parts):
                    called = self._called(f"{stem}.experts.{expert}.{own}.weight")
                    cut = slice(place * height, (place + 1) * height)
                    places[called] = _Expert(name, expert, cut, (height, columns))
        return places

    def _called(self, name: str) -> str:
        for part, other in self.renamed.items():
            name = name.replace(part, other)
        return name


_MIXTRAL_NAMES = {".mlp.": ".block_sparse_moe.", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def _view(tensors: Tensors) -> Tensors:
    return ExpertTensors(tensors, {}) if _in_one(tensors) else tensors


def _view_mixtral(tensors: Tensors) -> Tensors:
    return ExpertTensors(tensors, _MIXTRAL_NAMES) if _in_one(tensors) else tensors


def _in_one(tensors: Tensors) -> bool:
    return any(name.endswith(".experts.gate_up_proj") for name in tensors.names)


def _experts_table(stem: str, parts: tuple[str, str, str]) -> dict[str, Any]:
    gate, up, down = (f"{stem}.experts.{{}}.{part}" for part in parts)
    return {
        "blocks/experts/router/kernel": linear(f"{stem}.gate"),
        "blocks/experts/router/bias": (),
        "blocks/experts/up/kernel": linear(gate, up),
        "blocks/experts/down/kernel": linear(down),
        "blocks/experts/shared/up/kernel": linear(*(f"{stem}.shared_expert.{part}" for part in _PARTS[:2])),
        "blocks/experts/shared/down/kernel": linear(f"{stem}.shared_expert.down_proj"),
        "blocks/experts/shared_gate/kernel": linear(f"{stem}.shared_expert_gate"),
    }


def _mixtral_table(config: HfConfig) -> Table:
    return common_table(config) | _experts_table(f"{_BLOCK}.block_sparse_moe", ("w1", "w3", "w2"))


def _qwen_table(config: HfConfig) -> Table:
    return common_table(config) | _experts_table(f"{_BLOCK}.mlp", _PARTS)


def _read_experts(config: HfConfig, number: str, **fields: Any) -> ExpertsConfig:
    """What is said of experts alike; their loss in tuning is that of the class."""
    need(config, number, "num_experts_per_tok")
    require(config, hidden_act="silu")
    return ExpertsConfig(
        number=config[number],
        active=config["num_experts_per_tok"],
        scores="softmax",
        balance="loss",
        balance_loss=config.get("router_aux_loss_coef", 0.001),
        z_loss=0.0,
        **fields,
    )


def _read_mixtral(config: HfConfig) -> Architecture:
    need(config, "intermediate_size")
    # Of one expert, the normalised score is always 1.
    experts = _read_experts(config, "num_local_experts", normalised=True, width=config["intermediate_size"])
    if config.get("num_experts_per_tok") == 1:
        raise ModelError("each token goes to one of its experts, whose weight is always 1; here it is its score.")
    window = config.get("sliding_window")
    return read_common(config, base=1_000_000.0, positions=4096 * 32, window=window, experts=experts)


def _read_qwen(config: HfConfig, *, shared: int, **fields: Any) -> Architecture:
    require(config, use_sliding_window=False)
    need(config, "num_hidden_layers", "moe_intermediate_size")
    experts = _read_experts(
        config,
        "num_experts" if "num_experts" in config else "num_local_experts",
        normalised=bool(config.get("norm_topk_prob", False)),
        width=config["moe_intermediate_size"],
        every=config.get("decoder_sparse_step", 1),
        shared=shared,
        shared_gate=shared > 0,
    )
    without = config.get("mlp_only_layers") or []
    blocks = [LayerConfig(experts=index not in without) for index in range(config["num_hidden_layers"])]
    return read_common(config, positions=32_768, experts=experts, **patterned(blocks), **fields)


def _read_qwen2(config: HfConfig) -> Architecture:
    need(config, "moe_intermediate_size", "shared_expert_intermediate_size")
    width, own = config["moe_intermediate_size"], config["shared_expert_intermediate_size"]
    if own % width or not own:
        raise ModelError(
            f"shared_expert_intermediate_size={own} is not a multiple of moe_intermediate_size={width}, and the "
            "experts that all tokens share are as wide as others here."
        )
    return _read_qwen({**config, "head_dim": None}, shared=own // width, qkv_bias=config.get("qkv_bias", True))


def _read_qwen3(config: HfConfig) -> Architecture:
    require(config, attention_bias=False)
    return _read_qwen(config, shared=0, qk_norm=True, qk_norm_weight=True)


def _written(given: Architecture, number: str) -> dict[str, Any]:
    own = given.config.experts or ExpertsConfig(active=2)
    return {
        number: own.number,
        "num_experts_per_tok": own.active,
        "router_aux_loss_coef": own.balance_loss if own.balance == "loss" else 0.0,
    }


def _width(given: Architecture) -> int:
    """Of an expert."""
    config = given.config
    own = config.experts or ExpertsConfig(active=2)
    return own.width or max(1, config.mlp // (own.active + own.shared))


def _write_mixtral(given: Architecture) -> dict[str, Any]:
    written = write_common(given) | _written(given, "num_local_experts")
    return written | {"intermediate_size": _width(given), "sliding_window": given.config.window}


def _write_qwen(given: Architecture) -> dict[str, Any]:
    own = given.config.experts or ExpertsConfig(active=2)
    without = [index for index, block in enumerate(layer_configs(given.config)) if not block.experts]
    return write_common(given) | {
        **_written(given, "num_experts"),
        "moe_intermediate_size": _width(given),
        "norm_topk_prob": own.normalised,
        "decoder_sparse_step": 1,
        "mlp_only_layers": without if given.config.experts else [],
        "use_sliding_window": False,
    }


def _write_qwen2(given: Architecture) -> dict[str, Any]:
    own = given.config.experts or ExpertsConfig(active=2)
    written = _write_qwen(given)
    del written["head_dim"]  # the class divides the width
    qkv_bias = given.config.qkv_bias or given.config.bias
    return written | {"shared_expert_intermediate_size": _width(given) * max(1, own.shared), "qkv_bias": qkv_bias}


def _write_qwen3(given: Architecture) -> dict[str, Any]:
    return _write_qwen(given) | {"attention_bias": False}


MIXTRAL = Family(
    "mixtral",
    {"causal": "MixtralForCausalLM"},
    _read_mixtral,
    _write_mixtral,
    _mixtral_table,
    "model.",
    IGNORED,
    _view_mixtral,
)
QWEN2_MOE = Family(
    "qwen2_moe",
    {"causal": "Qwen2MoeForCausalLM"},
    _read_qwen2,
    _write_qwen2,
    _qwen_table,
    "model.",
    IGNORED,
    _view,
)
QWEN3_MOE = Family(
    "qwen3_moe",
    {"causal": "Qwen3MoeForCausalLM"},
    _read_qwen3,
    _write_qwen3,
    _qwen_table,
    "model.",
    IGNORED,
    _view,
)
