"""A profiled run leaves a trace in which layers and phases are named, as events that took time."""

from collections.abc import Callable
from pathlib import Path

import pytest
from jax.profiler import ProfileData

from cramjax.config import RunConfig
from cramjax.errors import RunError
from cramjax.training import train
from cramjax.training.profile import name_layers, scopes_of
from cramjax.training.step_profile import read_step_profile


@pytest.mark.slow
@pytest.mark.parametrize("layer_loop", ["scan", "unroll"])
def test_the_trace_has_layers_and_phases_as_events(
    tiny: Callable[..., RunConfig], tmp_path: Path, layer_loop: str
) -> None:
    train(tiny(train__profile=True, train__layer_loop=layer_loop), tmp_path / "run")
    (trace,) = (tmp_path / "run" / "plugins" / "profile").glob("*/*.xplane.pb")
    plane = ProfileData.from_file(str(trace)).find_plane_with_name("/device:CUSTOM:layers")
    nanoseconds: dict[str, float] = {}
    for line in plane.lines:
        ended: list[float] = []
        for event in line.events:
            nanoseconds[event.name] = nanoseconds.get(event.name, 0) + event.duration_ns
            ended = [end for end in ended if end > event.start_ns]
            # XProf draws an event below the one it lies in, and must not reach out of. (1 ns: rounding.)
            assert all(event.start_ns + event.duration_ns <= end + 1 for end in ended)
            ended.append(event.start_ns + event.duration_ns)
    layers = ["layer"] if layer_loop == "scan" else ["layer_0", "layer_1"]
    both_ways = [*layers, *(f"{layer}/{part}" for layer in layers for part in ("attention", "mlp"))]
    for name in [*both_ways, *(f"{name} (backward)" for name in both_ways), "cross_entropy", "optimizer"]:
        assert nanoseconds.get(name, 0) > 0, name
    outermost = {name.removesuffix(" (backward)").split("/")[0] for name in nanoseconds}
    assert outermost <= {*layers, "embed", "head", "cross_entropy", "optimizer"}


@pytest.mark.parametrize(
    ("operation", "scopes"),
    [
        ("jit(step)/jvp(layer_2)/attention/dot_general", ("layer_2", "layer_2/attention")),
        ("jit(step)/while/body/transpose(jvp(layer_0))/mul", ("layer_0 (backward)",)),
        ("jit(step)/jvp()/while/body/checkpoint/layer/rematted_computation/layer/mlp/max", ("layer", "layer/mlp")),
        ("jit(step)/optimizer/jit(norm)/reduce_sum", ("optimizer",)),
        ("jit(step)/jvp(cross_entropy)/cond/branch_1_fun/jvp()/gather", ("cross_entropy",)),
        ("jit(step)/convert_element_type", ()),
    ],
)
def test_scopes_are_read_from_the_names_jax_gives(operation: str, scopes: tuple[str, ...]) -> None:
    assert scopes_of(operation) == scopes


# Two programs on one thread; a layer's operations that overlap, and one after a long pause.
_TRACE = """planes { name: "/host:CPU"
  lines { id: 1 name: "worker"
    events { metadata_id: 1 offset_ps: 1000000 duration_ps: 4000000
             stats { metadata_id: 1 str_value: "a.1" } stats { metadata_id: 2 str_value: "jit_step" }
             stats { metadata_id: 3 int64_value: 7 } }
    events { metadata_id: 1 offset_ps: 4000000 duration_ps: 1000000
             stats { metadata_id: 1 str_value: "b" } stats { metadata_id: 2 str_value: "jit_step" }
             stats { metadata_id: 3 int64_value: 7 } }
    events { metadata_id: 1 offset_ps: 6000000 duration_ps: 1000000
             stats { metadata_id: 1 str_value: "b" } stats { metadata_id: 2 str_value: "jit_other" }
             stats { metadata_id: 3 int64_value: 7 } }
    events { metadata_id: 1 offset_ps: 900000000 duration_ps: 1000000
             stats { metadata_id: 1 str_value: "b" } stats { metadata_id: 2 str_value: "jit_step" }
             stats { metadata_id: 3 int64_value: 7 } } }
  event_metadata { key: 1 value { id: 1 name: "operation" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
  stat_metadata { key: 2 value { id: 2 name: "hlo_module" } }
  stat_metadata { key: 3 value { id: 3 name: "run_id" } } }"""
_PROGRAM = """HloModule jit_step, is_scheduled=true
  %a.1 = f32[] add(x, y), metadata={op_name="jit(step)/jvp(layer_0)/mlp/add"}
  ROOT %b = f32[] multiply(x, y), metadata={op_name="jit(step)/jvp(layer_0)/attention/mul" stack_frame_id=1}
"""


def test_operations_of_a_layer_that_follow_each_other_are_one_event(tmp_path: Path) -> None:
    trace = tmp_path / "host.xplane.pb"
    trace.write_bytes(ProfileData.text_proto_to_serialized_xspace(_TRACE))
    name_layers(trace, lambda: _PROGRAM)
    host, layers = ProfileData.from_file(str(trace)).planes
    assert len(list(next(iter(host.lines)).events)) == 4
    (line,) = layers.lines
    assert [(event.name, event.start_ns, event.duration_ns) for event in line.events] == [
        ("layer_0", 1000, 4000),
        ("layer_0/mlp", 1000, 3000),
        ("layer_0/attention", 4000, 1000),
        ("layer_0", 900_000, 1000),
        ("layer_0/attention", 900_000, 1000),
    ]


def test_where_the_time_went_is_each_part_without_the_parts_in_it(tmp_path: Path) -> None:
    trace = tmp_path / "plugins" / "profile" / "then" / "host.xplane.pb"
    trace.parent.mkdir(parents=True)
    trace.write_bytes(ProfileData.text_proto_to_serialized_xspace(_TRACE))
    with pytest.raises(RunError, match="no layers are named"):
        read_step_profile(tmp_path)
    name_layers(trace, lambda: _PROGRAM)
    found = read_step_profile(tmp_path)
    # Of the 5000 ns in layer_0, its feed-forward layer has 3000, and attention 1000 and 1000: none is its own.
    assert found.seconds == pytest.approx({"layer/mlp": 3e-6, "layer/attention": 2e-6, "layer": 0.0}, abs=1e-12)
    assert found.shares["layer/mlp"] == pytest.approx(0.6) and next(iter(found.shares)) == "layer/mlp"
    assert "60.0%" in str(found) and "60.0%" in found._repr_html_()
    assert "layer/attention" in found.plot()._repr_svg_()


# Two steps, of 10 and 6 µs, on the thread of the loop; and on another thread something that is none of them.
_PHASES = """planes { name: "/host:CPU"
  lines { id: 1 name: "python"
    events { metadata_id: 1 offset_ps: 1000000 duration_ps: 10000000 }
    events { metadata_id: 2 offset_ps: 2000000 duration_ps: 3000000 }
    events { metadata_id: 3 offset_ps: 6000000 duration_ps: 4000000 }
    events { metadata_id: 1 offset_ps: 20000000 duration_ps: 6000000 }
    events { metadata_id: 2 offset_ps: 20000000 duration_ps: 5000000 } }
  lines { id: 2 name: "worker" events { metadata_id: 4 offset_ps: 2000000 duration_ps: 9000000 } }
  event_metadata { key: 1 value { id: 1 name: "offload/step" } }
  event_metadata { key: 2 value { id: 2 name: "offload/device" } }
  event_metadata { key: 3 value { id: 3 name: "offload/up" } }
  event_metadata { key: 4 value { id: 4 name: "dot" } } }"""


def test_phases_of_a_step_on_the_host_are_means_and_add_up(tmp_path: Path) -> None:
    trace = tmp_path / "plugins" / "profile" / "then" / "host.xplane.pb"
    trace.parent.mkdir(parents=True)
    trace.write_bytes(ProfileData.text_proto_to_serialized_xspace(_PHASES))
    found = read_step_profile(tmp_path)
    expected = {"device": 4e-6, "down": 0.0, "update": 0.0, "up": 2e-6, "other": 2e-6}
    assert found.phases == pytest.approx(expected, abs=1e-15) and not found.seconds
    assert str(found) == "A step of 8e-06 s waits for: device 4e-06, down 0, update 0, up 2e-06, other 2e-06."
    assert "<th>device</th><td>4e-06</td>" in found._repr_html_() and "device" in found.plot()._repr_svg_()


def test_a_run_that_was_not_profiled_says_how(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"train\.profile=true"):
        read_step_profile(tmp_path)


def test_a_trace_without_operations_of_a_cpu_is_left_alone(tmp_path: Path) -> None:
    trace = tmp_path / "host.xplane.pb"
    trace.write_bytes(ProfileData.text_proto_to_serialized_xspace('planes { name: "/device:GPU:0" }'))
    before = trace.read_bytes()
    name_layers(trace, lambda: pytest.fail("the program is not needed"))
    assert trace.read_bytes() == before
