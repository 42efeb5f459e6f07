"""Generation over three tiers against `generate`, which holds the model whole."""

import contextlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from cramjax import cli
from cramjax.config import LayerConfig
from cramjax.errors import ConfigError, RunError
from cramjax.experts import ExpertsConfig
from cramjax.kernels.packed import quantise
from cramjax.language_model import load_model
from cramjax.offloading import OffloadConfig
from cramjax.recipes import load_recipe
from cramjax.serve import generate
from cramjax.serve.offload import run as running
from cramjax.serve.offload.cost_model import Shares
from cramjax.serve.offload.run import generate_offloaded, one_batch_at_a_time, open_stored, opened, plan_generation
from cramjax.serve.offload.streams import Streams
from cramjax.serve.prompts import encoded_prompts
from cramjax.serve.sampling import Sampling
from cramjax.training import train

from .late import Late

PROMPTS = ["the stack ", "walks", "", "every token pays for its own place", "block", "budget of it"]


def drawn_by(plan_of, path: Path, sampling: Sampling, tokens: int, schedule="overlapped", prompts=PROMPTS, **plan):
    _, rows = encoded_prompts(open_stored(path).model, prompts, chat=False)
    setting, made = plan_of(path, [len(row) for row in rows], tokens, **plan)
    with opened(setting, made, schedule=schedule) as session:
        drawn = session.generate(rows, tokens, sampling, seed=3)
    assert list(made.limits.disk.iterdir()) == [], "nothing is left on the disk"
    return drawn


def expected(path: Path, tokens: int, **sampling) -> list[str]:
    made = generate(load_model(path), PROMPTS, max_tokens=tokens, seed=3, **sampling)
    return [each.text for each in made]


def texts(path: Path, drawn: list[list[int]]) -> list[str]:
    tokenizer = open_stored(path).model.tokenizer
    return [tokenizer.decode(own[:-1] if own[-1] in tokenizer.ends else own) for own in drawn]


@pytest.mark.slow
def test_three_tiers_draw_token_for_token_what_memory_does(model: Path, plan_of):
    """Weights, cache and activations on each; rows of unequal length; two blocks, of which the last is not full."""
    greedy = Sampling(temperature=0.0)
    drawn = drawn_by(plan_of, model, greedy, 9, batch=2, batches=2, cache=Shares(0.5, 0.0, 0.5))
    assert texts(model, drawn) == expected(model, 9, temperature=0.0)
    hot = drawn_by(plan_of, model, Sampling(0.9, 40, 0.95), 9)
    assert texts(model, hot) == expected(model, 9, temperature=0.9, top_k=40, top_p=0.95)
    assert hot != drawn


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"layers": 4, "pattern": (LayerConfig(window=6), LayerConfig()), "mask_documents": True, "tied": False},
        {"positions": "learned", "qk_norm": True, "kv_heads": 2, "embedding_skip": True, "value_embeddings": True},
        {"layers": 4, "experts": ExpertsConfig(number=4, active=2, every=2)},
        {"bigram_buckets": 64, "norm": "rmsnorm", "activation": "swiglu", "tied": False, "adaptive_head": (64, 128)},
    ],
    ids=str,
)
def test_every_kind_of_block_does(save_model, plan_of, options: dict):
    path = save_model(**options)
    assert texts(path, drawn_by(plan_of, path, Sampling(0.0), 12)) == expected(path, 12, temperature=0.0)


@pytest.mark.slow
def test_the_schedule_changes_nothing(model: Path, plan_of):
    greedy = Sampling(temperature=0.0)
    together = drawn_by(plan_of, model, greedy, 8)
    assert drawn_by(plan_of, model, greedy, 8, schedule="in_turn") == together
    everything_on_disk = {name: Shares(0.0, 0.0, 1.0) for name in ("weights", "cache", "hidden")}
    assert drawn_by(plan_of, model, greedy, 8, **everything_on_disk) == together
    _, plan = plan_of(model, [8], 8)
    assert one_batch_at_a_time(plan).policy.rows == plan.policy.batch


@pytest.mark.slow
def test_streams_that_are_behind_change_nothing(model: Path, plan_of, monkeypatch: pytest.MonkeyPatch):
    """Everything is stored and read as late as somebody waits for it; caches lie on all tiers at once."""
    shares = Shares(0.25, 0.5, 0.25)
    own = {"batches": 3, "prompts": PROMPTS * 2, "cache": shares, "hidden": shares}
    monkeypatch.setattr(running, "streams", lambda _: contextlib.nullcontext(Streams(*[Late() for _ in range(5)])))
    late = drawn_by(plan_of, model, Sampling(temperature=0.0), 8, **own)
    assert texts(model, late) == expected(model, 8, temperature=0.0) * 2


@pytest.mark.slow
def test_the_command_keeps_to_its_plan(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """From limits that force all three tiers to texts, by the policy that is found with this machine's constants."""
    prompts, out, report = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl", tmp_path / "report.json"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS), encoding="utf-8")
    disk = tmp_path / "disk"
    disk.mkdir()
    limits = ["--device_memory=1200KiB", "--host_memory=0.4MiB", f"--disk={disk}", "--max_tokens=6"]
    words = [str(model), f"--prompts={prompts}", *limits]
    greedy = ["--temperature=0", f"--out={out}", f"--json={report}"]
    assert cli.main(["generate", *words, *greedy]) == 0
    found = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [each["text"] for each in found] == expected(model, 6, temperature=0.0)
    assert list(disk.iterdir()) == []
    plan = json.loads(report.read_text(encoding="utf-8"))["plan"]
    assert 0 < plan["device_bytes"] <= 1200 * 2**10 and 0 < plan["host_bytes"] <= 0.4 * 2**20
    assert plan["shares"]["weights"][2] > 0
    assert cli.main(["plan", words[0], "--generate", *words[1:]]) == 0
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompts={none}"], "cannot be read: No such file"),
        (["--prompts={empty}"], "holds no prompt"),
        ([], "needs prompts"),
        (["one", "--prompts={empty}"], "exclude each other"),
        (["one", "--max_tokens=63"], "prompt 1 has"),
        (["one", "--device_memory=100KiB", "--max_tokens=4"], "--device_memory must hold one block"),
        (["one", "--device_memory=much"], "--device_memory must be a number of bytes"),
        (["one", "--disk={none}"], "is no directory"),
    ],
)
def test_bad_input_is_one_message(
    model: Path, tmp_path: Path, by_xla: None, capsys: pytest.CaptureFixture[str], words: list[str], message: str
):
    (tmp_path / "empty").write_text("\n", encoding="utf-8")
    places = {"none": tmp_path / "none", "empty": tmp_path / "empty"}
    before = sorted(tmp_path.iterdir())
    given = [word.format(**places) for word in words]
    limits = [f"--disk={tmp_path}"] * (not any("--disk" in word for word in given))
    limits += ["--device_memory=2MiB"] * (not any("--device" in word for word in given))
    assert cli.main(["generate", str(model), *given, *limits]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and said.startswith("error: ") and "\n" not in said.split("error: ")[1]
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_no_model_directory_is_refused(tmp_path: Path):
    with pytest.raises(RunError, match="not a model directory"):
        generate_offloaded(tmp_path, ["a"], OffloadConfig(disk=str(tmp_path), device_memory="1GiB"))
    with pytest.raises(ConfigError, match="one text or more"):
        generate_offloaded(tmp_path, [], OffloadConfig())


@pytest.mark.slow
def test_a_plan_within_no_limits_says_what_would_be(model: Path, tmp_path: Path, by_xla: None):
    """What the message calls enough is enough."""
    config = OffloadConfig(device_memory="150KiB", disk=str(tmp_path))
    with pytest.raises(ConfigError) as refused:
        plan_generation(model, config, [8], max_tokens=4)
    enough = str(refused.value).split("tokens: ")[1].split(" is enough")[0]
    made = plan_generation(model, OffloadConfig(device_memory=enough, disk=str(tmp_path)), [8], max_tokens=4)
    assert made.memory.device <= made.limits.device and np.isfinite(made.tokens_per_second)
    assert jax.tree.leaves(made.json())
    unsaid = plan_generation(model, OffloadConfig(device_memory="64MiB", disk=str(tmp_path)), 2)
    context = load_model(model).context
    assert (unsaid.prompts, unsaid.prompt, unsaid.output) == (2, context // 2, context - context // 2)


@pytest.mark.slow
def test_four_bits_score_text_as_the_rounded_matrices_do(corpus: Path, tmp_path: Path, plan_of):
    """Rows forced through the walk token by token, against one forward pass of the model with its matrices rounded by
    definition; keys and values of 4 bits cost a trained model less than a hundredth of its bits.
    """
    options = {
        "data.source": str(corpus / "[0-2]*.txt"),
        "data.sequence_length": 64,
        "tokenizer.vocab_size": 300,
        "model.layers": 2,
        "model.width": 128,
        "model.heads": 2,
        "model.mlp": 256,
        "batch.size": 16,
        "train.compute_dtype": "float32",
        "budget": "80steps",
    }
    path = train(load_recipe("quickstart", options), tmp_path / "run").language_model.save(tmp_path / "model")
    given = load_model(path)
    ids = given.tokenizer.encode((corpus / "35.txt").read_text(encoding="utf-8"))
    rows = [ids[at : at + 40] for at in range(0, 480, 40)]

    def bits(**held) -> float:
        """Of the rows, given the first token of each."""
        setting, made = plan_of(path, [1] * len(rows), 39, batch=4, batches=3, cache=Shares(0.5, 0.0, 0.5), **held)
        lost = []

        def choose(order: np.ndarray):
            def forced(number: int, step: int, logits: jax.Array) -> np.ndarray:
                own = np.array([rows[row][step + 1] for row in order[4 * number : 4 * number + 4]])
                lost.extend(-np.asarray(jax.nn.log_softmax(logits))[np.arange(4), own] / np.log(2))
                return own

            return forced

        with opened(setting, made) as session:
            session.through([row[:1] for row in rows], 39, choose)
        assert len(lost) == 39 * len(rows), "no row ends before the others"
        return float(np.sum(lost))

    def plain(params) -> float:
        tokens = jax.numpy.array(rows)
        logs = jax.nn.log_softmax(given.model.logits(params, given.model.hidden(params, tokens[:, :-1])))
        return float(-jax.numpy.take_along_axis(logs, tokens[:, 1:, None], axis=-1).sum() / np.log(2))

    def rounded(path, leaf, weight):
        del path
        if weight.role != "matrix":
            return leaf
        return quantise(leaf, 4, 64, symmetric=False, scale_dtype=jax.numpy.bfloat16).unpacked()

    whole = bits()
    assert whole == pytest.approx(plain(given.params), rel=1e-3)
    assert whole < 0.6 * 39 * len(rows) * np.log2(300), "it has learnt something"
    by_hand = jax.tree_util.tree_map_with_path(rounded, given.params, given.model.weights)
    coded = bits(weights_held="int4")
    assert coded == pytest.approx(plain(by_hand), rel=2e-3) and coded != pytest.approx(whole, rel=5e-3)
    assert bits(cache_held="int4") == pytest.approx(whole, rel=0.01)
