"""The linear program against all divisions in quarters."""

import itertools
import math

import pytest

from cramjax.serve.offload.cost_model import Memory, divided, opt, peak_memory, predict, t4
from cramjax.serve.offload.policy import least_device, search, solve

_WORK = opt(12, 1024, 64, 32)
_MACHINE = t4(8, 1024)
_WEIGHTS = _WORK.layers * _WORK.weight_bytes
_QUARTERS = [(a / 4, b / 4, (4 - a - b) / 4) for a in range(5) for b in range(5 - a)]


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize(("device", "host"), [(0.4, 0.5), (0.8, 0.3), (2.0, 0.0), (0.4, 4.0)])
def test_no_division_in_quarters_is_faster(form: str, device: float, host: float):
    limits = Memory(device * _WEIGHTS, host * _WEIGHTS, 10 * _WEIGHTS)
    found = solve(_WORK, _MACHINE, limits, 8, 4, form=form)  # pyright: ignore[reportArgumentType]
    assert found is not None and found.memory.within(limits.scaled(1 + 1e-6))
    for shares in (found.policy.weights, found.policy.cache, found.policy.hidden):
        assert shares.device + shares.host + shares.disk == pytest.approx(1.0)
    tried = [divided(found.policy, sum(each, ())) for each in itertools.product(_QUARTERS, repeat=3)]
    fitting = [policy for policy in tried if peak_memory(_WORK, policy).within(limits)]
    assert fitting, "the grid holds policies that fit"
    best = min(predict(_WORK, _MACHINE, policy, form).seconds for policy in fitting)  # pyright: ignore
    assert found.prediction.seconds <= best * 1.01


def test_what_does_not_fit_has_no_policy():
    assert solve(_WORK, _MACHINE, Memory(1e5, 1e12, 1e12), 8, 4) is None
    assert list(search(_WORK, lambda batch: _MACHINE, Memory(1e5, 1e12, 1e12))) == []


def test_a_missing_tier_gets_nothing():
    found = solve(_WORK, _MACHINE, Memory(0.5 * _WEIGHTS, 4 * _WEIGHTS, 0.0), 8, 4)
    assert found is not None
    assert max(found.policy.weights.disk, found.policy.cache.disk, found.policy.hidden.disk) < 1e-9


def test_the_least_memory_of_the_device_is_where_policies_begin():
    limits = Memory(math.inf, 0.2 * _WEIGHTS, 10 * _WEIGHTS)
    least = least_device(_WORK, limits, 8)
    for share, fits in ((1.001, True), (0.999, False)):
        asked = Memory(share * least, limits.host, limits.disk)
        assert (solve(_WORK, _MACHINE, asked, 8, 1) is not None) == fits


def test_blocks_grow_until_they_are_no_faster_and_never_past_the_prompts():
    limits = Memory(0.5 * _WEIGHTS, 0.5 * _WEIGHTS, 100 * _WEIGHTS)
    found = list(search(_WORK, lambda batch: t4(batch, 1024), limits, prompts=24, batches=(4, 8, 64)))
    assert [each.policy.batch for each in found] == [4, 8]
    assert all(1 < each.policy.batches <= math.ceil(24 / each.policy.batch) for each in found)
