"""Prompts and prefixes in peft's files: the same logits here and there, both ways, and the same losses in training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cramjax.errors import ModelError
from cramjax.formats.peft import CONFIG, read_adapter, write_adapter
from cramjax.formats.tensors import whole, write_safetensors
from cramjax.kernels.packed import merge
from cramjax.language_model import LanguageModel

peft = pytest.importorskip("peft", reason="needs the `parity` extra: pip install -e '.[parity]'")
torch = pytest.importorskip("torch")

from .models import tokens  # noqa: E402
from .test_peft import assert_close, loaded, our_logits, random_adapter  # noqa: E402
from .test_peft_training import assert_same_losses  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of peft and transformers

COUNT = 5
METHODS: dict[str, Any] = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}
CASES = [("gpt2", "prompt"), ("gpt2", "prefix"), ("llama", "prompt"), ("llama", "prefix")]
CASES += [("bert", "prompt"), ("bert", "prefix")]


def adapted(kind: str, method: str) -> Any:
    task = "FEATURE_EXTRACTION" if kind == "bert" else "CAUSAL_LM"
    return random_adapter(kind, METHODS[method](num_virtual_tokens=COUNT, task_type=task))


def their_logits(model: Any) -> Any:
    """Of the tokens alone."""
    return model(input_ids=torch.from_numpy(tokens())).logits[:, -tokens().shape[1] :]


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_they_are_read_trained_and_written_back(
    kind: str, method: str, imported: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    their = adapted(kind, method)
    their.save_pretrained(tmp_path / "theirs")
    given, wanted = imported(kind), their_logits(their).detach().numpy()
    params = read_adapter(tmp_path / "theirs", given)
    assert np.abs(our_logits(given, given.params) - wanted).max() > 0.1  # without, they are others
    assert_close(our_logits(given, params), wanted)
    write_adapter(tmp_path / "ours", params, given)
    assert_close(their_logits(loaded(kind, tmp_path / "ours")).detach().numpy(), wanted)
    with pytest.raises(ModelError, match="has 5 virtual tokens beside it .* cannot be merged"):
        merge(params)
    assert_same_losses(given, params, their, their_logits)


@pytest.mark.parametrize(
    ("kind", "tensors", "more", "words"),
    [
        ("PROMPT_TUNING", {"prompt_embeddings": (5, 40)}, {}, r"must have shape \(virtual tokens, 48\), got \(5, 40\)"),
        ("PREFIX_TUNING", {"prompt_embeddings": (5, 48)}, {}, r"must have shape \(virtual tokens, 144\), got"),
        ("PREFIX_TUNING", {"prompt_embeddings": (0, 144)}, {}, r"got \(0, 144\)"),
        ("PROMPT_TUNING", {"prompts": (5, 48)}, {}, "has the tensors prompts, and one of type PROMPT_TUNING has"),
        ("PROMPT_TUNING", {"prompt_embeddings": (5, 48)}, {"num_transformer_submodules": 2}, "models here are one"),
        ("P_TUNING", {"prompt_embeddings": (5, 48)}, {}, "of type LORA, IA3, PROMPT_TUNING, PREFIX_TUNING can be read"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_said(
    kind: str,
    tensors: dict[str, tuple[int, ...]],
    more: dict[str, Any],
    words: str,
    imported: Callable[[str], LanguageModel],
    tmp_path: Path,
) -> None:
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": kind, **more}), encoding="utf-8")
    zeros = {name: np.zeros(shape, np.float32) for name, shape in tensors.items()}
    outputs = [whole(name, x.shape, x.dtype, lambda x=x: x) for name, x in zeros.items()]
    write_safetensors(tmp_path / "adapter_model.safetensors", outputs)
    with pytest.raises(ModelError, match=words):
        read_adapter(tmp_path, imported("llama"))
