"""A profiled run leaves a trace in which layers and phases are named."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cramjax.config import RunConfig
from cramjax.train import train


@pytest.mark.parametrize("layer_loop", ["scan", "unroll"])
def test_the_trace_names_layers_and_phases(tiny: Callable[..., RunConfig], tmp_path: Path, layer_loop: str) -> None:
    train(tiny(train__profile=True, train__layer_loop=layer_loop), tmp_path / "run")
    (trace,) = (tmp_path / "run" / "plugins" / "profile").glob("*/*.xplane.pb")
    text = trace.read_bytes()
    layers = [b"/layer/"] if layer_loop == "scan" else [b"/layer_0/", b"/layer_1/"]
    for name in [*layers, b"/attention/", b"/mlp/", b"cross_entropy", b"optimizer/", b"transpose(jvp"]:
        assert name in text, name
