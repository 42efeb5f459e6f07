"""Places, the disk, codes of a cache, and weights on their way, each by itself."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from cramjax.errors import ConfigError, ModelError, RunError
from cramjax.formats.table import flatten
from cramjax.kernels.packed import quantise
from cramjax.language_model import load_model
from cramjax.offloading import parse_bytes
from cramjax.serve.offload.cost_model import Policy, Shares
from cramjax.serve.offload.encoding import Grouped, token_bytes
from cramjax.serve.offload.layout import layout_of
from cramjax.serve.offload.place import place, rows_of, whole_rows
from cramjax.serve.offload.run import open_stored
from cramjax.serve.offload.store import scratch
from cramjax.serve.offload.streams import streams
from cramjax.serve.offload.weights import Coming, read_weights


@pytest.mark.parametrize("shares", [(0.3, 0.3, 0.4), (0.0, 0.5, 0.5), (0.05, 0.05, 0.9)])
def test_neither_device_nor_host_gets_more_than_its_share(model: Path, shares: tuple[float, float, float]):
    layout = layout_of(open_stored(model), "auto")
    made = place(layout, Shares(*shares))
    small = sum(leaf.bytes for stage in layout.walked for leaf in stage.leaves if leaf.small)
    total = sum(stage.bytes for stage in layout.walked)
    assert made.shares.device * total <= shares[0] * total + small
    assert made.shares.host <= shares[1] + 1e-9
    assert sum(made.on_disk) == pytest.approx(made.shares.disk * total)
    assert made.ring >= max(made.on_disk)


def test_rows_are_whole_and_rounded_away_from_the_device():
    shares = Shares(0.49, 0.3, 0.21)
    policy = whole_rows(Policy(5, 1, shares, shares, shares))
    assert rows_of(policy, policy.cache) == (slice(0, 2), slice(2, 3), slice(3, 5))


def test_codes_of_a_cache_are_as_near_as_their_steps_allow():
    """Each number within half a step of its group, and what 16-bit scales lose; 4.5 bits each."""
    x = np.random.default_rng(0).normal(size=(3, 5, 2, 128)).astype(np.float32) * [[[[1.0]], [[50.0]]] * 2 + [[[0.0]]]]
    encoding = Grouped("float32")
    held = jax.jit(encoding.encode)(x.astype(np.float32))
    found = np.asarray(encoding.decode(held))
    groups = x.reshape(3, 5, 2, 2, 64)
    reach = groups.max(-1, keepdims=True) - groups.min(-1, keepdims=True)
    allowed = reach / 30 * 1.02 + 2e-3 * np.abs(groups).max(-1, keepdims=True)
    assert np.all(np.abs(found.reshape(groups.shape) - groups) <= allowed)
    assert token_bytes(encoding, 2, 128) == 2 * 2 * 128 * 4.5 / 8


@pytest.mark.parametrize("schedule", ["overlapped", "in_turn"])
def test_weights_on_their_way_are_those_of_the_model(model: Path, plan_of, schedule):
    """Through a ring that holds little more than the largest stage, three times round."""
    setting, _ = plan_of(model, [8], 8)
    stored = setting.stored
    placement = place(setting.layout, Shares(0.0, 0.3, 0.7), ahead=1)
    weights = read_weights(stored, setting.layout, placement, None, device=setting.device)
    truth = dict(flatten(load_model(model).params))
    stages = range(len(setting.layout.walked))
    with streams(schedule) as flow:
        coming = Coming(weights, placement.ring, flow.weights, setting.device, ahead=schedule == "overlapped")
        for _ in range(3):
            coming.expect(stages)
            for number in stages:
                for path, leaf in flatten(coming.take()):
                    own = truth[path] if number == stages[-1] else truth[f"blocks/{path}"][number]
                    np.testing.assert_array_equal(np.asarray(leaf), np.asarray(own))
                coming.release()
    rows = weights.rows(np.array([[3, 5], [3, 0]]))
    np.testing.assert_array_equal(rows, np.asarray(truth["embed/token/table"])[[[3, 5], [3, 0]]])
    weights.files.close()


def test_a_damaged_file_is_told_before_anything_is_generated(save_model, plan_of):
    path = save_model(layers=1)
    file = next(path.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-200] ^= 0xFF
    file.write_bytes(content)
    setting, _ = plan_of(path, [8], 8)
    with pytest.raises(ModelError, match="damaged"):
        read_weights(
            setting.stored, setting.layout, place(setting.layout, Shares(1, 0, 0)), None, device=setting.device
        )


def test_a_full_disk_is_one_message_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(RunError, match=r"has no room for 2.00 GiB .* free some"), scratch(tmp_path) as made:
        made.file("cache", 2 << 30)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_while_it_is_written_is_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(RunError, match="has no room"), scratch(tmp_path) as made:
        file = made.file("cache", 64)
        monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        file.write(0, np.zeros(8, np.float32))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("text", "size"), [("2GiB", 2 << 30), ("500 MB", 500_000_000), ("1.5k", 1536), ("7", 7)])
def test_sizes_are_read_as_users_write_them(text: str, size: int):
    assert parse_bytes(text, "--host_memory") == size


@pytest.mark.parametrize("text", ["", "GiB", "2 gigs", "-1", "1e9"])
def test_what_is_no_size_is_refused(text: str):
    with pytest.raises(ConfigError, match="--host_memory must be a number of bytes such as 2GiB"):
        parse_bytes(text, "--host_memory")


def test_matrices_that_are_stored_in_codes_are_taken_as_they_are(model: Path, tmp_path: Path, plan_of):
    """Of GPTQ, say: asking for int4 rounds them no second time; read in place from the disk or not."""
    given = load_model(model)

    def rounded(leaf, weight):
        return quantise(leaf, 4, 32) if weight.role == "matrix" else leaf

    codes = jax.tree.map(rounded, given.params, given.model.weights)
    path = tmp_path / "coded"
    replace(given, params=codes).save(path)
    setting, _ = plan_of(path, [8], 8, weights_held="int4")
    placement = place(setting.layout, Shares(0.3, 0.3, 0.4))
    with scratch(tmp_path) as made:
        weights = read_weights(setting.stored, setting.layout, placement, made, device=setting.device)
        with streams("overlapped") as flow:
            coming = Coming(weights, placement.ring, flow.weights, setting.device, ahead=True)
            coming.expect(range(len(setting.layout.walked)))
            for number in range(len(setting.layout.blocks)):
                for path_, leaf in flatten(coming.take()):
                    own = jax.tree.map(lambda x, n=number: np.asarray(x[n]), dict(flatten(codes))[f"blocks/{path_}"])
                    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, leaf), own)
                coming.release()
            coming.take()
        weights.files.close()
    assert any(getattr(leaf, "bits", None) == 4 for leaf in dict(flatten(codes)).values())
