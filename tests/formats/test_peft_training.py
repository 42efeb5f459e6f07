"""Adapters train as peft's do: the losses of twenty AdamW steps from one start, here and in PyTorch."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.config import OptimConfig
from cramjax.formats.peft import read_adapter
from cramjax.language_model import LanguageModel
from cramjax.model.objectives import Task, task_loss
from cramjax.model.weights import Constant, Weight
from cramjax.optim import make_optimizer
from cramjax.training.frozen import split
from cramjax.training.step import Batch, initial_state, make_step

from .models import tokens

pytest.importorskip("peft", reason="needs the `parity` extra: pip install -e '.[parity]'")
torch = pytest.importorskip("torch")

from .test_peft import ADAPTERS, random_adapter  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of peft and transformers

STEPS, RATE, DECAY, BETAS = 20, 2e-3, 0.1, (0.9, 0.95)
"""At five times the rate the loss of rsLoRA on BERT no longer falls evenly, and float32 runs part by themselves."""
ROLES: dict[str, Any] = {"rows": "embedding", "keys": "embedding", "values": "embedding"}
ROLES |= {"a": "matrix", "b": "matrix", "magnitude": "norm", "inputs": "scalar", "outputs": "scalar"}
UNDECAYED = ("magnitude", "ia3")


def their_losses(model: Any, causal: bool, logits_of: Callable[[Any], Any]) -> list[float]:
    """Losses of PyTorch's AdamW on what is trained of a model; nothing drops out."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    free = [parameter for name, parameter in trained if any(word in name for word in UNDECAYED)]
    decayed = [parameter for name, parameter in trained if not any(word in name for word in UNDECAYED)]
    groups = [{"params": free, "weight_decay": 0.0}, {"params": decayed, "weight_decay": DECAY}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=RATE, betas=BETAS, eps=1e-8)
    ids, losses = torch.from_numpy(tokens()), []
    for _ in range(STEPS):
        logits = logits_of(model)
        logits, targets = (logits[:, :-1], ids[:, 1:]) if causal else (logits, ids)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def our_losses(given: LanguageModel, params: Any) -> list[float]:
    """Losses of the training step on the same."""

    def loss(params: Any, tokens: jax.Array, *_: Any) -> Any:
        seen, targets = (tokens[:, :-1], tokens[:, 1:]) if given.kind == "causal" else (tokens, tokens)
        return task_loss(given.model, params, Task(seen, targets.reshape(-1), None, jnp.float32(targets.size)))

    def declared(path: Any, leaf: Any) -> Weight:
        return Weight(leaf.shape, ("rank",) * leaf.ndim, ROLES[path[-1].name], Constant(0.0))

    trained, _ = split(params, ["*"])
    weights = jax.tree_util.tree_map_with_path(declared, trained)
    beta1, beta2 = BETAS
    config = OptimConfig("adamw", RATE, beta1=beta1, beta2=beta2, weight_decay=DECAY, clip=None, schedule="constant")
    optimizer = make_optimizer(config, weights)
    state, step = initial_state(params, optimizer, 0, ["*"]), jax.jit(make_step(loss, optimizer))
    batch, losses = Batch(jnp.asarray(tokens()[None], jnp.int32), jnp.int32(1)), []
    for _ in range(STEPS):
        state, metrics = step(state, batch, jnp.float32(0.5))
        losses.append(float(metrics.loss))
    return losses


FAST = [("gpt2", "ia3"), ("llama", "lora"), ("bert", "dora")]
SLOW = [(kind, method) for kind in ("gpt2", "llama", "bert") for method in ADAPTERS if (kind, method) not in FAST]


@pytest.mark.parametrize(("kind", "method"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_twenty_steps_of_adamw_give_the_losses_of_pytorch(
    kind: str, method: str, imported: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    their = random_adapter(kind, ADAPTERS[method]())
    their.save_pretrained(tmp_path / "theirs")
    given = imported(kind)
    params = read_adapter(tmp_path / "theirs", given)
    assert_same_losses(given, params, their, lambda model: model(torch.from_numpy(tokens())).logits)


def assert_same_losses(given: LanguageModel, params: Any, their: Any, logits_of: Callable[[Any], Any]) -> None:
    """Train both from where they are, theirs by its logits."""
    given = replace(given, model=replace(given.model, unroll=False))  # one block compiles sooner than three
    wanted = their_losses(their, given.kind == "causal", logits_of)
    assert wanted[-1] < wanted[0]
    np.testing.assert_allclose(our_losses(given, params), wanted, rtol=1e-4)
