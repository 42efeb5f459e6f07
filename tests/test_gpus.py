"""The table of GPUs: the names people give cards, and figures that must agree with one another."""

import pytest

from cramjax.errors import ConfigError
from cramjax.gpus import GPUS, gpu_named, gpu_of_kind


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("4090", "rtx-4090"),
        ("rtx4090", "rtx-4090"),
        ("RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("2080ti", "rtx-2080-ti"),
        ("RTX A6000", "a6000"),
        ("a100-80", "a100-80gb"),
        ("V100-32GB", "v100-32gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("h100", "h100"),
        ("RTX 6000 Ada", "6000-ada"),
        ("Tesla T4", "t4"),
    ],
)
def test_a_card_answers_to_the_names_people_give_it(name: str, key: str) -> None:
    assert gpu_named(name) is GPUS[key]


def test_an_unknown_card_is_an_error_that_lists_the_near_ones() -> None:
    with pytest.raises(ConfigError, match="no device 'rtx4900' in the table: did you mean rtx-4090"):
        gpu_named("rtx4900")
    with pytest.raises(ConfigError, match="did you mean .*v100-16gb"):
        gpu_named("v100-24")
    with pytest.raises(ConfigError, match="'toaster' in the table. It has cpu, t4, "):
        gpu_named("toaster")


def test_a_name_of_several_cards_is_an_error() -> None:
    with pytest.raises(ConfigError, match="several devices 'a100': say which of a100-40gb, a100-80gb"):
        gpu_named("a100")


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 3090 (as NVIDIA A10)", "rtx-3090"),
        ("NVIDIA L40", None),
        ("NVIDIA A10", None),
        ("cpu", None),
    ],
)
def test_a_drivers_name_finds_its_card(kind: str, key: str | None) -> None:
    assert gpu_of_kind(kind) is (None if key is None else GPUS[key])


# float32 TFLOP/s as the sheets print them, beside which the table's come from units and clock.
_SHEETS = {
    "t4": 8.1, "v100-16gb": 15.7, "rtx-2080-ti": 13.45, "rtx-3090": 35.6, "rtx-4090": 82.6, "rtx-5090": 104.8,
    "a4000": 19.2, "a5000": 27.8, "a6000": 38.7, "6000-ada": 91.1, "l4": 30.3, "l40s": 91.6, "a100-80gb": 19.5,
    "h100": 66.9, "h100-pcie": 51.2, "h200": 66.9, "b200": 75,
}  # fmt: skip


@pytest.mark.parametrize("key", _SHEETS)
def test_float32_peaks_follow_from_units_and_clocks(key: str) -> None:
    assert GPUS[key].float32_flops / 1e12 == pytest.approx(_SHEETS[key], rel=0.02)


def test_bfloat16_runs_as_float32_on_cards_without_it() -> None:
    turing, ada = GPUS["rtx-2080-ti"], GPUS["rtx-4090"]
    assert turing.peak_flops("bfloat16") == turing.peak_flops("float32") < turing.tensor_flops
    assert ada.peak_flops("bfloat16") == 165e12 > ada.peak_flops("float32")
