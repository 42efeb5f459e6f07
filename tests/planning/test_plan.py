"""Plans: the choice they make, how they say it, and what they refuse."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from rich.console import Console

import cramjax
from cramjax import cli
from cramjax.config import Remat
from cramjax.errors import ConfigError
from cramjax.planning import KINDS, Memory, Plan, estimate_memory, fit, measure, missing, place, plan, targets
from cramjax.planning.plan import choices, choose, largest_microbatch, under
from cramjax.planning.steps import vocabulary_of
from cramjax.recipes import load_recipe
from cramjax.show.numbers import format_bytes
from cramjax.training.offload import Offloaded

needs_compiler = pytest.mark.skipif(missing() is not None, reason=f"no ahead-of-time compiler for GPUs: {missing()}")


@pytest.fixture(scope="module")
def bert() -> Plan:
    return plan("crammed-bert", "a6000", price=0.5)


def test_the_fastest_policy_that_fits_is_chosen(bert: Plan) -> None:
    fitting = [option for option in bert.options if option.fits]
    assert bert.chosen.tokens_per_second == max(option.tokens_per_second or 0 for option in fitting)
    assert bert.chosen.policy == "none" and bert.chosen.memory.device_bytes <= bert.device.usable
    assert bert.config.batch.microbatch == bert.chosen.microbatch and bert.config.batch.size == 8192


def test_the_microbatch_is_the_largest_divisor_of_the_batch_that_fits() -> None:
    config, device = (
        load_recipe("crammed-bert", ["--batch.size=8160", "--batch.microbatch=96"]),
        place.device_named("rtx-2080-ti"),
    )
    chosen, memory, fits = largest_microbatch(config, vocabulary_of(config), device)
    assert fits and chosen.batch.microbatch is not None and 8160 % chosen.batch.microbatch == 0
    larger = next(n for n in range(chosen.batch.microbatch + 1, 8161) if 8160 % n == 0)
    grown = estimate_memory(
        replace(config, batch=replace(config.batch, microbatch=larger)),
        vocab_size=32768,
        compute_dtype="bfloat16",
        gpu=device.gpu,
    )
    assert memory.device_bytes <= device.usable < grown.device_bytes


def test_a_batch_that_grows_starts_below_its_size() -> None:
    config = load_recipe("crammed-bert", ["--batch.size=64", "--batch.microbatch=16"])
    chosen, _, fits = largest_microbatch(config, vocabulary_of(config), place.device_named("h100"))
    assert fits and chosen.batch.microbatch == 32


@pytest.mark.parametrize(
    ("card", "usable"), [("rtx-2080-ti", 0.95 * 11), ("v100-16gb", 0.95 * 16), ("h100", 0.95 * 81559 / 1024)]
)
def test_a_part_of_a_cards_memory_is_the_drivers(card: str, usable: float) -> None:
    device = place.device_named(card)
    assert device.usable / 2**30 == pytest.approx(usable, abs=0.05)
    assert device.memory - device.usable >= place.CONTEXT_BYTES


def test_a_plan_reads_as_a_table(bert: Plan) -> None:
    text = str(bert)
    assert "crammed-bert on NVIDIA RTX A6000: 120M parameters" in text
    for line in text.splitlines():
        assert len(line) <= 110
    assert re.search(r"none +512 +2\d\.\d\d GiB +- +[\d.]+k +\d\d% +best", text)
    assert "selective+offload_optimizer" in text and "Budget 24h:" in text and "It costs 12.00." in text
    assert "<th>policy</th>" in bert._repr_html_() and "selective+offload_optimizer" in bert._repr_html_()


def test_a_plan_is_readable_in_a_narrow_terminal(bert: Plan) -> None:
    console = Console(width=50, color_system=None)
    with console.capture() as captured:
        console.print(bert)
    shown = captured.get().replace("\xa0", " ")
    assert all(len(line.rstrip()) <= 50 for line in shown.splitlines()) and "…" not in shown
    for option in bert.options:
        assert f"\n{option.policy}\n" in shown.replace(" \n", "\n")
        assert f"device {format_bytes(option.memory.device_bytes)}" in shown
    assert "fits best" in shown


def test_a_plan_is_json(bert: Plan) -> None:
    values = json.loads(json.dumps(bert.json()))
    needed = "device_bytes host_bytes by_kind microbatch policy tokens_per_second tokens exact_device_bytes"
    assert set(needed.split()) <= set(values)
    assert values["exact_device_bytes"] is None
    assert set(values["by_kind"]) == set(KINDS) and sum(values["by_kind"].values()) == values["device_bytes"]
    assert values["tokens"] == pytest.approx(values["tokens_per_second"] * 24 * 3600)


def test_a_plan_is_drawn(bert: Plan, tmp_path: Path) -> None:
    bert.plot().save(tmp_path / "plan.svg")
    drawn = (tmp_path / "plan.svg").read_text(encoding="utf-8")
    assert all(f">{kind}</text>" in drawn for kind in KINDS) and "none × 512" in drawn
    assert bert.plot()._repr_svg_().startswith("<svg")


def test_several_devices_share_the_batch_and_states() -> None:
    one, four = plan("gpt-1.3b", "h100"), plan("gpt-1.3b", "h100", devices=4, **{"evaluate.batch": 4})
    assert four.config.train.data_parallel == 4 and four.chosen.microbatch % 4 == 0
    assert 2 * one.purchase.tokens < four.purchase.tokens < 4 * one.purchase.tokens
    shared = plan("gpt-1.3b", "rtx4090", devices=4, policies=["full"], **{"train.fsdp": 4, "evaluate.batch": 4})
    assert shared.chosen.memory.by_kind["weights"] * 4 == pytest.approx(one.chosen.memory.by_kind["weights"], rel=1e-6)


def test_policies_are_those_that_can_be() -> None:
    card, cpu = place.device_named("h100"), place.device_named("cpu")
    adam, muon = load_recipe("gpt-1.3b"), load_recipe("gpt-124m")
    assert "full+offload_optimizer" in choices(adam, card)
    assert choices(muon, card) == ["none", "selective", "full", "offload"]
    assert choices(adam, cpu) == ["none", "selective", "full"]
    unrolled = replace(adam, train=replace(adam.train, layer_loop="unroll"))  # of which ZeRO-Offload knows no walk
    assert choices(unrolled, card) == ["none", "selective", "full", "offload"]
    offloaded = under(adam, "none+offload_optimizer")
    assert offloaded.train.param_dtype == "bfloat16" and all("+" in policy for policy in choices(offloaded, card))


def test_what_does_not_fit_says_by_how_much_and_what_would() -> None:
    with pytest.raises(ConfigError) as caught:
        plan("gpt-1.3b", "rtx-4090", **{"optim.name": "schedule_free_adamw"})
    message = str(caught.value)
    assert re.search(r"of 22.79 GiB that a step may take, .* needs 2\d\.\d\d GiB, \d\.\d\d GiB too much", message)
    assert "optim.name=adalomo" in message and "train.offload_optimizer=true" in message and "--device" in message


def test_what_does_not_fit_says_why() -> None:
    made = plan("gpt-1.3b", "rtx-4090")
    full, offload = (
        next(o for o in made.options if o.policy == policy) for policy in ("full", "none+offload_optimizer")
    )
    over = (full.memory.device_bytes - made.device.usable) / 2**30
    assert f"full ({over:.2f} GiB too much)" in re.sub(r"\s+", " ", str(made)) and offload.lacks is None
    lacking = {policy["policy"] for policy in made.json()["policies"] if policy["lacks"]}
    assert lacking == {"none", "selective", "full", "offload"}


def test_reasons_are_those_of_device_card_and_host() -> None:
    card = replace(place.device_named("h100"), usable=100, memory=100, host_memory=50)
    assert card.lacks(Memory({"weights": 60}, {"optimizer": 50})) is None
    assert card.lacks(Memory({"weights": 100 + (3 << 20)})) == "3.0 MiB too much"
    recomputed = card.lacks(Memory({"weights": 60}, {"activations": 16}))
    assert recomputed is not None and "above 75% of the card" in recomputed
    assert card.lacks(Memory({"weights": 60}, {"activations": 15})) is None
    hosted = card.lacks(Memory({"weights": 60}, {"optimizer": 50 + (1 << 30)}))
    assert hosted is not None and hosted.startswith("1.00 GiB of host memory too much")


def test_what_stops_a_step_but_the_devices_memory_is_said() -> None:
    with pytest.raises(ConfigError) as caught:
        plan("llama-7b", "rtx-4090", policies=["offload"])
    assert "has room on the device, but: with the 41.50 GiB that wait in host memory" in str(caught.value)
    assert "What would fit: train.remat=full; " in str(caught.value)


def test_what_would_fit_is_what_the_caller_may_choose() -> None:
    config, device = load_recipe("gpt-1.3b"), place.device_named("a4000")
    with pytest.raises(ConfigError) as caught:
        choose(config, device, get_args(Remat))
    message = str(caught.value)
    assert "train.remat=none with train.offload_optimizer=true and train.param_dtype=bfloat16" in message
    assert "data.sequence_length" not in message  # which no policy without the host would fit by
    with pytest.raises(ConfigError) as caught:
        poor = replace(place.device_named("v100-32gb"), host_memory=64 << 30)
        choose(load_recipe("llama-13b"), poor, ["full+offload_optimizer"])
    assert "of host memory too much" in str(caught.value) and "a card with" not in str(caught.value)


def test_what_a_plan_chooses_for_the_recipe_is_said_as_options() -> None:
    made = plan("gpt-1.3b", "rtx-4090", **{"batch.microbatch": 2})
    assert made.changes == {
        "batch.microbatch": 4, "train.remat": "none", "train.offload_optimizer": True, "train.param_dtype": "bfloat16"
    }  # fmt: skip
    options = [f"--{name}={str(value).lower()}" for name, value in made.changes.items()]
    assert " ".join(options) in re.sub(r"\s+", " ", str(made))
    assert load_recipe("gpt-1.3b", options).train == replace(made.config.train, data_parallel=None)
    again = plan("gpt-1.3b", "rtx-4090", **made.changes)
    assert again.changes == {} and "To train so" not in str(again)


def test_a_batch_without_accumulation_is_told_what_size_would_fit() -> None:
    with pytest.raises(ConfigError, match=r"What would fit: .*batch.size=\d+"):
        plan("llama-7b", "rtx-4090", policies=["full"], **{"batch.size": 64})


def test_activations_are_not_sent_to_a_host_that_cannot_hold_them() -> None:
    config, device = load_recipe("gpt-1.3b"), place.device_named("h100")
    poor = replace(device, host_memory=1 << 30)
    vocabulary = vocabulary_of(config)
    rich, _, _ = largest_microbatch(under(config, "offload"), vocabulary, device)
    assert not largest_microbatch(under(config, "none+offload_optimizer"), vocabulary, poor)[2]
    assert (rich.batch.microbatch or 0) > 1 and not largest_microbatch(under(config, "offload"), vocabulary, poor)[2]


def test_a_cpu_is_its_own_host() -> None:
    cpu = replace(place.device_named("cpu"), usable=100)
    assert cpu.holds(Memory({"weights": 60}, {"optimizer": 40})) and not cpu.holds(Memory({"weights": 60}, {"x": 41}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "rtx4900"}, "no device 'rtx4900' in the table: did you mean rtx-4090"),
        ({"device": 3}, "device must be a card's name or cpu, got 3"),
        ({"device": "h100", "devices": "two"}, "devices must be a whole number, got 'two'"),
        ({"device": "h100", "devices": 0}, "devices must be at least 1, got 0"),
        ({"device": "h100", "budget": "1e-9s"}, "budget 1e-09s buys no step on NVIDIA H100"),
        ({"device": "h100", "budget": "10tok"}, "one takes about 4096 tokens. Give a larger one"),
        ({"device": "cpu", "devices": 2}, "devices must be 1 for a CPU"),
        ({"device": "h100", "devices": 3}, "batch.size is 32, which 3 devices cannot share equally"),
        (
            {"device": "h100", "devices": 4, "batch.size": 4, "batch.microbatch": 2, "batch.ramp": 0.5},
            "batch.size is 4, 2 of them as batch.ramp starts, which 4 devices cannot share equally: make it a multiple",
        ),
        ({"device": "h100", "price": -1.0}, "price must be at least 0, got -1"),
        ({"device": "h100", "budget": "5"}, "budget '5' has no unit"),
        ({"device": "h100", "policies": ["some"]}, "There is no policy 'some' for optim.name=muon on NVIDIA H100"),
        (
            {"device": "h100", "devices": 4, "train.fsdp": 2, "train.data_parallel": 1, "evaluate.batch": 4},
            "devices is 4, but train.data_parallel × train.fsdp is 2",
        ),
        (
            {"device": "h100", "devices": 2, "train.fsdp": 4},
            "train.fsdp must divide the devices, which are 2: one of 1, 2, got 4",
        ),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan("gpt-mini", **arguments)


def test_exact_needs_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "missing", lambda: "nvidia.cuda_nvcc is not installed")
    targets.devices_of.cache_clear()
    with pytest.raises(
        ConfigError, match=r'nvidia.cuda_nvcc is not installed. Install with pip install "cramjax\[aot\]"'
    ):
        plan("gpt-mini", "rtx-4090", exact=True)


@needs_compiler
@pytest.mark.slow
def test_exact_bytes_stand_beside_the_estimate() -> None:
    made = plan("gpt-mini", "rtx-4090", exact=True, policies=["none"])
    assert made.exact_device_bytes is not None
    assert made.chosen.memory.device_bytes == pytest.approx(made.exact_device_bytes, rel=0.25)  # it is small
    assert "Compiler: " in str(made) and made.json()["exact_device_bytes"] == made.exact_device_bytes


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("card", "published", "size"), [("rtx-2080-ti", 96, 8160), ("a6000", 512, 8192)])
def test_published_microbatches_of_crammed_bert_fit(card: str, published: int, size: int) -> None:
    # Geiping & Goldstein's, without recomputation; the A4000's is in benchmarks/plan_accuracy.py.
    config = load_recipe("crammed-bert", [f"--batch.size={size}", f"--batch.microbatch={published}"])
    assert cramjax.planning.compile_step(config, card).device_bytes <= place.device_named(card).usable  # pyright: ignore


# ---- on this computer's CPU


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MEASURE_SECONDS", 0.05)


_TINY = {
    "data.sequence_length": 32,
    "tokenizer.vocab_size": 300,
    "model.layers": 2,
    "model.width": 32,
    "model.heads": 2,
    "model.mlp": 64,
    "batch.size": 16,
    "train.data_parallel": 1,
}


def test_a_cpu_is_timed_once(quick: None, monkeypatch: pytest.MonkeyPatch, cache_directory: Path) -> None:
    made = plan("quickstart", "cpu", budget="200s", **_TINY)
    assert made.chosen.speed is not None and "timed on this CPU" in made.chosen.speed.source
    assert 0 < made.purchase.tokens < 200 * (made.chosen.tokens_per_second or 0)
    monkeypatch.setattr(measure, "_measure", lambda *_: pytest.fail("it was measured again"))
    again = plan("quickstart", "cpu", budget="100s", **_TINY)
    assert again.chosen.speed == made.chosen.speed
    other = _TINY | {"model.width": 64}
    with pytest.raises(pytest.fail.Exception):
        plan("quickstart", "cpu", **other)


def test_a_cpu_times_the_offloaded_step(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, step = [], Offloaded.__call__

    def counted(self: Offloaded, *arguments: Any) -> Any:
        taken.append(1)
        return step(self, *arguments)

    monkeypatch.setattr(Offloaded, "__call__", counted)
    offloaded = {"optim.name": "adamw", "train.offload_optimizer": True, "train.param_dtype": "bfloat16"}
    made = plan("quickstart", "cpu", budget="200s", **_TINY | offloaded)
    assert made.chosen.policy == "none+offload_optimizer" and len(taken) >= 4  # a warm-up and three
    assert made.chosen.speed is not None and made.chosen.speed.step_seconds(1) > 0


def test_memory_auto_chooses_and_says_so() -> None:
    said: list[str] = []
    config = load_recipe("quickstart", _TINY | {"train.memory": "auto"})
    fitted = fit(config, said.append)
    assert fitted.batch.microbatch == 16 and fitted.train.remat == "none" and fitted.train.data_parallel == 1
    assert len(said) == 1 and said[0].startswith("memory: microbatches of 16 with train.remat=none are planned to take")
    as_given = load_recipe("quickstart", _TINY)
    assert fit(as_given, said.append) is as_given and len(said) == 1


def test_memory_auto_needs_no_microbatch_that_divides() -> None:
    options = ["--batch.size=8160", "--train.memory=auto"]
    for microbatch in ("128", "null"):
        assert load_recipe("crammed-bert", [*options, f"--batch.microbatch={microbatch}"]).batch.size == 8160
    with pytest.raises(ConfigError, match="batch.microbatch must divide batch.size"):
        load_recipe("crammed-bert", options[:1])


def test_memory_auto_recomputes_where_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_recipe("quickstart", _TINY | {"train.memory": "auto", "model.layers": 12, "batch.size": 64})
    roomy = fit(config, lambda _: None)
    monkeypatch.setattr(place, "CPU_SHARE", 20e6 / place.machine.memory_limit(place.jax.devices()[0]))
    small = fit(config, lambda _: None)
    assert (roomy.batch.microbatch or 0) > (small.batch.microbatch or 0) >= 1
    monkeypatch.setattr(place, "CPU_SHARE", 1e-6)
    with pytest.raises(ConfigError, match="does not fit"):
        fit(config, lambda _: None)


def test_the_command_prints_writes_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    words = ["plan", "gpt-124m", "--device", "rtx4090", "--budget=300Mtok", "--price=0.4", "--optim.name=adamw"]
    assert cli.main([*words, "--json", str(out), "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "gpt-124m on NVIDIA GeForce RTX 4090" in printed and "300M tokens" in printed
    values = json.loads(out.read_text(encoding="utf-8"))
    assert values["tokens"] == 300e6 and values["cost"] > 0 and picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "cramjax plan needs a recipe: crammed-bert, "),
        (["gpt-mini", "--device", "gtx4090x"], "no device 'gtx4090x' in the table: did you mean rtx-4090"),
        (["gpt-mini", "--devices=two"], "--devices"),
        (["gpt-mini", "--plot", "plan.gif"], "--plot must be a .png, .svg or .pdf file, got 'plan.gif'"),
        (["gpt-mini", "--json", "/no/such/place/plan.json"], "there is no such directory. Give another file to --json"),
        (["gpt-mini", "--model.widht=3"], "did you mean --model.width?"),
    ],
)
def test_mistakes_of_the_command_are_one_sentence(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err


def test_the_notebook_has_it() -> None:
    made = cramjax.plan("gpt-124m", "rtx4090", optim={"name": "adamw"})
    assert isinstance(made, Plan) and "plan" in cramjax.__all__ and len(cramjax.__all__) <= 12  # a dozen names
    assert cramjax.plan(cramjax.recipe("gpt-124m"), "rtx4090", budget="1h").budget == "1h"
