"""Compressed models: interrupted and resumed, used again, and what is refused."""

import errno
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cramjax
from cramjax import cli
from cramjax.compress import Compression, compress_model, plots, unfinished
from cramjax.compression import CompressConfig
from cramjax.errors import ConfigError, DataError, ModelError, UserError
from cramjax.evaluation import evaluate_text
from cramjax.kernels.packed import Quantised, is_packed, pack, unpacked
from cramjax.language_model import LanguageModel, load_model
from cramjax.recipes import load_recipe
from cramjax.training import load_run, lock, train
from tests.training.conftest import TINY

MakeModel = Callable[..., LanguageModel]
OPTIONS: dict[str, Any] = {"sequences": 12, "sequence_length": 24, "batch": 6, "bits": 4, "group": 16}


def config(data: str, **options: Any) -> CompressConfig:
    return CompressConfig(**{"data": data, **OPTIONS, **options})


def weights(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name not in ("origin.json", "report.html")}


class StopError(Exception):
    """Stands for a kill."""


def stopping(block: int) -> Callable[[str, int, int], None]:
    def tell(what: str, done: int, total: int) -> None:
        if what.startswith("block") and done == block:
            raise StopError

    return tell


@pytest.fixture(scope="module")
def model(model_of: MakeModel) -> LanguageModel:
    return model_of()


@pytest.fixture(scope="module")
def made(model: LanguageModel, text: str, held_out: str, tmp_path_factory: pytest.TempPathFactory) -> Compression:
    """A model that was compressed without an interruption."""
    out = tmp_path_factory.mktemp("compressed") / "model"
    return compress_model(model, config(text, text=held_out), out)


@pytest.mark.slow
def test_interrupted_at_any_block_it_gives_the_same_bytes(
    model: LanguageModel, made: Compression, text: str, held_out: str, tmp_path: Path
) -> None:
    out, own = tmp_path / "model", config(text, text=held_out)
    for block in range(3):
        with pytest.raises(StopError):
            compress_model(model, own, out, tell=stopping(block))
        assert not out.exists()
        last = tmp_path / "model.unfinished" / f"block-{block - 1:05}.json"
        if block == 2:  # as if it had been killed before the block counted
            last.unlink()
            (last.parent / "stream-00000.safetensors").write_bytes(
                (last.parent / "stream-00001.safetensors").read_bytes()
            )
            with pytest.raises(ModelError, match="is damaged"):
                compress_model(model, own, out)
            json_of_first = json.loads((last.parent / "block-00000.json").read_text(encoding="utf-8"))
            assert json_of_first["report"][0]["name"] == "attention/qkv/kernel"
            (last.parent / "block-00000.json").unlink()
    told: list[str] = []
    compress_model(model, own, out, tell=lambda what, done, total: told.append(what))
    assert [what.split(",")[0] for what in told[:3]] == [f"block {n} of 3" for n in (1, 2, 3)]
    assert told[1].endswith(" left")
    assert weights(out) == weights(made.out)
    assert list(tmp_path.iterdir()) == [out]  # nothing is left behind


def test_what_is_done_is_not_done_again(
    model: LanguageModel, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, visited = tmp_path / "model", []
    with pytest.raises(StopError):
        compress_model(model, config(text), out, tell=stopping(2))
    rewrite = cramjax.compress.run.rewrite
    monkeypatch.setattr(
        cramjax.compress.run, "rewrite", lambda *given, **named: (visited.append(0), rewrite(*given, **named))[1]
    )
    other = replace(model, params=jax.tree.map(lambda leaf: leaf * 1.5, model.params))
    for given, own in ((other, config(text)), (model, config(text, bits=8)), (model, config(text, seed=1))):
        with pytest.raises(ModelError, match="model.unfinished is what is done of another compression"):
            compress_model(given, own, out)
    assert len(compress_model(model, config(text), out).matrices) == 12
    assert len(visited) == 4


def test_a_full_disk_leaves_what_is_done(
    model: LanguageModel, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, out = unfinished.write_safetensors, tmp_path / "model"

    def full(path: Path, outputs: Any) -> Any:
        if "stream-00001" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, outputs)

    with monkeypatch.context() as patched:
        patched.setattr(unfinished, "write_safetensors", full)
        with pytest.raises(ModelError, match="no space is left on the device.* 1 blocks are done and kept"):
            compress_model(model, config(text), out)
    assert not out.exists()
    assert compress_model(model, config(text), out).out == out


def test_killed_before_it_was_cleared_away_the_same_call_ends_it(
    model: LanguageModel, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, own = tmp_path / "model", CompressConfig(method="rtn", bits=4, group=16)
    cleared = iter([StopError(), None, StopError()])

    def clear(path: Path, but: Any = ()) -> None:
        if (stop := next(cleared, None)) is not None:
            raise stop
        lock.clear(path, but)

    monkeypatch.setattr(unfinished, "clear", clear)
    with pytest.raises(StopError):
        compress_model(model, own, out)
    whole = weights(out)
    for other in (replace(own, bits=8), replace(own, symmetric=False)):
        with pytest.raises(ModelError, match="model.unfinished is what is done of another compression"):
            compress_model(model, other, out)
    with pytest.raises(StopError):  # again, when all but its last file is removed
        compress_model(model, own, out)
    found = compress_model(model, own, out)
    assert found.out == out and len(found.matrices) == 12 and found.total.after < found.total.before
    assert weights(out) == whole and list(tmp_path.iterdir()) == [out]
    with pytest.raises(ModelError, match="exists already"):
        compress_model(model, own, out)
    (tmp_path / "file").write_text("a", encoding="utf-8")
    (out / "origin.json").write_text("{", encoding="utf-8")
    for there in (tmp_path / "file", out):  # of neither is read what it holds
        with pytest.raises(ModelError, match="exists already"):
            compress_model(model, own, there)


def test_the_report_counts_everything(made: Compression, model: LanguageModel) -> None:
    total = made.total
    assert total.parameters == sum(leaf.size for leaf in jax.tree.leaves(model.params))
    assert total.before == 4 * total.parameters
    stored = load_model(made.out)
    assert total.after == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(stored.params))
    sizes = {size.part: size for size in made.sizes}
    assert sizes["matrices of blocks"].bits == 4 + 16 / 16  # codes, and a bfloat16 for each 16
    assert sizes["embed"].before == sizes["embed"].after
    content = stored.origin["compressed"][0]
    assert content == json.loads(json.dumps({**made.json(), "with": content["with"], "at": content["at"]}))
    assert len(content["matrices"]) == 12 and content["options"]["method"] == "gptq"
    assert made.tokens == 12 * 24
    text = str(made)
    assert "bits per parameter with everything counted" in text and "attention/qkv" in text


def test_the_page_shows_errors_times_and_bytes(made: Compression) -> None:
    page = (made.out / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 3 and page.count("<table>") == 2 and "http://" not in page.replace("http://www.w3", "")
    errors = plots.errors(made).axes[0]
    wanted = [100 * matrix.error for matrix in made.matrices if matrix.name == "mlp/up/kernel"]
    (line,) = (line for line in errors.get_lines() if line.get_label() == "mlp/up")
    np.testing.assert_allclose(np.asarray(line.get_ydata(), float), wanted)
    bars = [patch.get_width() for patch in plots.sizes(made).axes[0].patches]
    wanted = [part / 2**20 for size in made.sizes for part in (size.before, size.after)]
    np.testing.assert_allclose(bars, wanted)
    spent = sum(patch.get_width() for patch in plots.times(made).axes[0].patches)
    assert spent == pytest.approx(sum(matrix.seconds for matrix in made.matrices))


def test_its_scores_are_those_of_the_two_models(made: Compression, model: LanguageModel, held_out: str) -> None:
    assert made.bits_per_byte is not None
    before, after = made.bits_per_byte
    assert before == pytest.approx(evaluate_text(model, held_out).bits_per_byte, rel=1e-6)
    assert after == pytest.approx(evaluate_text(made.out, held_out).bits_per_byte, rel=1e-6)
    assert before != after


@pytest.mark.parametrize(
    ("bits", "symmetric"),
    [pytest.param(8, True, marks=pytest.mark.slow), (3, False), pytest.param(2, True, marks=pytest.mark.slow)],
)
def test_it_generates_as_the_weights_that_it_stands_for(
    model: LanguageModel, text: str, tmp_path: Path, bits: int, symmetric: bool
) -> None:
    own = config(text, bits=bits, symmetric=symmetric, sequential=False)
    back = load_model(compress_model(model, own, tmp_path / "model").out)
    leaf = back.params["blocks"]["mlp"]["down"]["kernel"]
    assert isinstance(leaf, Quantised) and (leaf.bits, leaf.group) == (bits, 16)
    arrays = replace(back, params=jax.tree.map(unpacked, back.params, is_leaf=is_packed))
    texts = [str(cramjax.generate(each, "the stack", max_tokens=8, temperature=0)) for each in (back, arrays)]
    assert texts[0] == texts[1] and len(texts[0]) > len("the stack")


def test_gptq_is_nearer_to_the_model_than_rounding(model: LanguageModel, text: str, made: Compression, tmp_path: Path):
    nearest = compress_model(model, config(text, method="rtn"), tmp_path / "model")
    for ours, theirs in zip(made.matrices, nearest.matrices, strict=True):
        assert (ours.block, ours.name) == (theirs.block, theirs.name)
        assert ours.error < theirs.error


def test_without_text_weights_are_rounded_all_the_same(model: LanguageModel, tmp_path: Path) -> None:
    own = CompressConfig(method="rtn", bits=8, group=None)
    made = compress_model(model, own, tmp_path / "model")
    kernel = np.asarray(model.params["blocks"]["mlp"]["up"]["kernel"], float)
    off = kernel - np.asarray(load_model(made.out).params["blocks"]["mlp"]["up"]["kernel"].unpacked(), float)
    found = [matrix.error for matrix in made.matrices if matrix.name == "mlp/up/kernel"]
    np.testing.assert_allclose(found, (off**2).sum((1, 2)) / (kernel**2).sum((1, 2)), rtol=1e-4)
    assert made.tokens == 0 and made.bits_per_byte is None and "--text FILE" in str(made)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("causal", {"method": "sparsegpt", "pattern": "2:4", "bits": None}),
        pytest.param("masked", {"method": "wanda", "sparsity": 0.25, "bits": 4}, marks=pytest.mark.slow),
    ],
)
def test_pruned_models_say_what_zeros_take(
    model_of: MakeModel, words: Any, text: str, tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    model = replace(model_of(kind, dtype="bfloat16"), tokenizer=replace(words, mask_id=5))
    made = compress_model(model, config(**{"data": text, **options}), tmp_path / "model")
    share = 0.5 if kind == "causal" else 0.25
    assert all(matrix.zeros >= share for matrix in made.matrices)
    assert ("each takes a bit" if kind == "causal" else "they save no bytes") in str(made)
    leaf = load_model(made.out).params["blocks"]["mlp"]["up"]["kernel"]
    if kind == "causal":
        assert leaf.dtype == jnp.bfloat16
        zeros = np.asarray(leaf == 0).reshape(3, -1, 4, leaf.shape[-1]).sum(2)
        assert (zeros >= 2).all()
        (size,) = (size for size in made.sizes if size.part == "matrices of blocks")
        gone = [matrix.zeros * matrix.shape[0] * matrix.shape[1] for matrix in made.matrices]
        assert size.after == round(size.parameters / 8 + 2 * (size.parameters - sum(gone)))
        files = sum(file.stat().st_size for file in made.out.glob("*.safetensors"))
        assert made.total.after < files < made.total.after + 4096  # and headers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "bits must be one of 8, 4, 3, 2, ternary, nf4, fp8, mxfp4, got 5"),
        ({"data": None}, "gptq needs text to calibrate on: give --data FILE"),
        (
            {"sparsity": 0.5},
            "sparsity is of methods that set weights to 0 .magnitude, wanda, sparsegpt., got method gp",
        ),
        ({"pattern": "2:4"}, "pattern is of methods that set weights to 0"),
        ({"method": "wanda", "pattern": "4:2"}, "pattern must be N:M with N below M.* got '4:2'"),
        ({"method": "wanda", "pattern": "1:3"}, "M a power of 2 up to 128.* got '1:3'"),
        ({"method": "wanda", "pattern": "2:4", "sparsity": 0.5}, "give one of them"),
        ({"method": "sparsegpt", "act_order": True}, "act_order is of gptq, got method sparsegpt"),
        ({"group": 24}, r"attention/qkv/kernel: A group must divide the 32 inputs .*, got 24: 16 would do"),
        ({"group": 8, "bits": 3}, "in groups of 8: use 4 or 8 bits"),
        ({"group": 24, "bits": "nf4"}, r"attention/qkv/kernel: A group must divide the 32 inputs .*: 16 would do"),
        ({"method": "wanda", "pattern": "2:128"}, "the pattern 2:128 does not divide its 32 inputs"),
        ({"sequences": 5000}, "5000 sequences of 24 to calibrate on need at least 120,000: give more text, or --seq"),
        ({"sequence_length": 64}, "sequence_length must be at most the model's context 32, got 64"),
        ({"data": "no-such-file.txt"}, "no-such-file.txt"),
    ],
)
def test_what_cannot_be_is_one_message(
    model: LanguageModel, text: str, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        compress_model(model, config(**{"data": text, **options}), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_be_compressed_are_named(model: LanguageModel, text: str, tmp_path: Path) -> None:
    packed = replace(model, params=pack(model.params, model.model.weights, "int8", 16))
    broken = jax.tree.map(lambda leaf: leaf, model.params)
    broken["blocks"]["mlp"]["up"]["kernel"] = broken["blocks"]["mlp"]["up"]["kernel"].at[1, 2, 3].set(jnp.nan)
    for given, options, words in (
        (packed, {}, "attention/out/kernel is packed in few bits already: give the model that it was packed from"),
        (replace(model, kind="encoder"), {}, "is an encoder without a head"),
        (replace(model, params=broken), {"method": "rtn", "data": None}, "block 1: mlp/up/kernel has weights that are"),
    ):
        with pytest.raises(ModelError, match=words):
            compress_model(given, config(**{"data": text, **options}), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_mistakes_in_the_command_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = tmp_path / "there"
    there.mkdir()
    for words, message in (
        (
            ["model"],
            "cramjax compress needs a model and a method: cramjax compress MODEL METHOD. METHOD is rtn, gptq,",
        ),
        (["model", "gptq", "--data=x"], "needs the model directory to make: --out MODEL2"),
        (["model", "gptqq", "--out=x"], "there is no method 'gptqq'; did you mean gptq?"),
        (["model", "w44", "--out=x"], "did you mean w4? Methods: rtn, gptq,"),
        (
            ["model", "gptq", "--bits=5", "--out=x", "--data=x"],
            "bits must be one of 8, 4, 3, 2, ternary, nf4, fp8, mxfp4, got 5",
        ),
        (["model", "rtn", "--bits=nf5", "--out=x"], "nf4, fp8, mxfp4 or null, got 'nf5'; did you mean nf4?"),
        (["model", "rtn", "--bits=mxfp4", "--group=16", "--out=x"], "32 weights share an exponent, got group 16"),
        (["model", "rtn", "--bits=fp8", "--symmetric=false", "--out=x"], "fp8 has numbers on both sides of 0"),
        (["model", "hqq", "--act_order=true", "--out=x"], "act_order is of gptq, got method hqq: leave it out"),
        (["model", "hqq", "--bits=nf4", "--out=x"], "hqq rounds to 8, 4, 3 or 2 bits, got nf4"),
        (["model", "hqq", "--mse=true", "--out=x"], "mse and hqq both search groups' ranges"),
        (["model", "magnitude", "--awq=true", "--out=x"], "awq scales what rtn or gptq then round, got method magn"),
        (["model", "magnitude", "--shares={'*': 2}", "--out=x"], "shares are from 0 to below 1, got 2"),
        (
            ["model", "magnitude", "--shares=owll", "--out=x"],
            "a mapping or one of owl or null, got 'owll'",
        ),
        (["model", "gptq", "--bitts=5", "--out=x"], "unknown option --bitts; did you mean --bits?"),
        (["model", "gptq", "--out=x"], "gptq needs text to calibrate on"),
        (["nothing", "rtn", f"--out={tmp_path / 'x'}"], "nothing is not a run directory"),
        (["nothing", "rtn", f"--out={there}"], "there exists already: give another path to --out"),
    ):
        assert cli.main(["compress", *words]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: ") and message in printed and printed.count("\n") == 1
    assert list(tmp_path.iterdir()) == [there]


@pytest.mark.slow
def test_stopped_at_ten_random_moments_it_gives_the_same_bytes(
    model: LanguageModel, made: Compression, text: str, held_out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At writes and renames of files, at matrices that are rewritten, before or after them."""
    out, own, generator = tmp_path / "model", config(text, text=held_out), np.random.default_rng(0)
    left = {"calls": -1, "after": False}

    def stopping_at(module: Any, name: str) -> None:
        function = getattr(module, name)

        def stopped(*given: Any, **options: Any) -> Any:
            left["calls"] -= 1
            if left["calls"] == 0 and not left["after"]:
                raise StopError
            last = left["calls"] == 0
            result = function(*given, **options)
            if last:
                raise StopError
            return result

        monkeypatch.setattr(module, name, stopped)

    stopping_at(unfinished, "write_safetensors")
    stopping_at(unfinished, "write_atomically")
    stopping_at(cramjax.compress.run, "rewrite")
    for calls in generator.permutation([1, 2, 2, 3, 4, 4, 5, 6, 8, 9]):  # a block has seven
        left.update(calls=int(calls), after=bool(generator.integers(2)))
        with pytest.raises(StopError):
            compress_model(model, own, out)
        assert not out.exists()
    left["calls"] = -1
    compress_model(model, own, out)
    assert weights(out) == weights(made.out)
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.slow
def test_killed_it_goes_on(made: Compression, model: LanguageModel, text: str, held_out: str, tmp_path: Path) -> None:
    """As a system kills a process: at once, at whatever it is doing."""
    model.save(tmp_path / "model")
    words = ["compress", str(tmp_path / "model"), "gptq", f"--data={text}", f"--text={held_out}"]
    words += [f"--{name}={value}" for name, value in OPTIONS.items()] + [f"--out={tmp_path / 'out'}"]
    for block in (0, 1):
        process = subprocess.Popen([sys.executable, "-m", "cramjax.cli", *words], stderr=subprocess.PIPE)
        while process.poll() is None and not (tmp_path / f"out.unfinished/block-{block:05}.json").exists():
            time.sleep(0.01)
        process.kill()
        assert process.communicate()[1] is not None and process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert cli.main(words) == 0
    assert weights(tmp_path / "out") == weights(made.out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


@pytest.mark.slow
def test_a_run_is_scored_on_its_own_held_out_text(corpus: Path, cache_directory: Path, tmp_path: Path) -> None:
    tuned = {**TINY, "data.source": str(corpus / "*.txt"), "budget": "12steps"}
    run = train(load_recipe("quickstart", tuned), tmp_path / "run")
    made = compress_model(run, CompressConfig(method="rtn", bits=8), tmp_path / "model")
    assert made.bits_per_byte is not None
    assert made.bits_per_byte[0] == pytest.approx(evaluate_text(run).bits_per_byte, rel=1e-6)
    assert 0 < abs(made.bits_per_byte[1] - made.bits_per_byte[0]) < 0.01
    origin = load_model(made.out).origin
    assert "trained" in origin and len(origin["compressed"]) == 1


@pytest.mark.slow
def test_the_command_makes_a_model_that_can_be_tuned(
    model: LanguageModel, text: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model.save(tmp_path / "model")
    out, report = tmp_path / "small", tmp_path / "report.json"
    words = [str(tmp_path / "model"), "w4", f"--data={text}", f"--out={out}", f"--json={report}"]
    assert cli.main(["compress", *words, "--sequences=12", "--sequence_length=24", "--batch=6"]) == 0
    printed = capsys.readouterr()
    assert "bits per parameter" in printed.out and "block 3 of 3" in printed.err
    assert json.loads(report.read_text(encoding="utf-8"))["options"]["group"] == 64
    recipe = tmp_path / "tune.yaml"
    recipe.write_text(
        f"budget: 4steps\nadapter: {{kind: lora, rank: 2, base: int4}}\noptim: {{name: adamw}}\nbatch: {{size: 8}}\n"
        f"data: {{source: '{corpus}/*.txt', sequence_length: 24, validation_fraction: 0.2}}\n"
        "evaluate: {points: 1, tokens: 256, batch: 8, samples: []}\ntrain: {data_parallel: 1}\n",
        encoding="utf-8",
    )
    assert cli.main(["tune", str(out), str(recipe), f"--out={tmp_path / 'run'}"]) == 0
    tuned = load_run(tmp_path / "run").params["blocks"]["mlp"]["up"]["kernel"]
    before = load_model(out).params["blocks"]["mlp"]["up"]["kernel"]
    assert isinstance(tuned.base, Quantised) and bool(jnp.any(tuned.b != 0))
    np.testing.assert_array_equal(tuned.base.unpacked(), before.unpacked())  # not rounded once more
    with pytest.raises(UserError, match="has an adapter: put it into the weights first"):
        compress_model(tmp_path / "run", config(text), tmp_path / "again")
