"""The cost model against the throughputs that the paper measured, and against sums that need no model."""

from dataclasses import replace

import pytest

from cramjax.serve.offload.cost_model import (
    Memory,
    Policy,
    Shares,
    opt,
    peak_memory,
    predict,
    prompt_streams,
    step_streams,
    t4,
)

_30B, _175B = (48, 7168), (96, 12288)


def predicted(size: tuple[int, int], prompt: int, policy: tuple[int, ...], disk_read: float = 2.65e9) -> float:
    """Tokens per second of a policy as the paper writes it: rows, batches, and six shares in percent."""
    batch, batches, *percent = policy
    pairs = [Shares(a / 100, b / 100, (100 - a - b) / 100) for a, b in zip(percent[::2], percent[1::2], strict=True)]
    layers, width = size
    work = opt(layers, width, prompt, 32)
    return predict(work, t4(batch, width, disk_read), Policy(batch, batches, *pairs)).tokens_per_second


@pytest.mark.parametrize(
    ("prompt", "policy", "measured"),
    [(512, (48, 3, 20, 80, 0, 100, 0, 100), 7.32), (1024, (20, 4, 4, 96, 0, 100, 0, 100), 3.50)],
)
def test_opt_30b_is_predicted_within_a_tenth_of_the_papers_table(prompt: int, policy: tuple[int, ...], measured: float):
    """Tables 2 and 15 of arXiv:2303.06865; cache and activations in the host's memory, attention there."""
    assert predicted(_30B, prompt, policy) == pytest.approx(measured, rel=0.1)


_FROM_DISK = [
    (256, (64, 8, 0, 50, 0, 0, 0, 100), 1.36),
    (512, (32, 8, 0, 50, 0, 0, 0, 100), 0.69),
    (1024, (12, 12, 0, 50, 0, 0, 0, 100), 0.35),
]


@pytest.mark.parametrize(("prompt", "policy", "measured"), _FROM_DISK)
def test_opt_175b_is_predicted_within_a_tenth_with_the_disks_that_the_papers_machine_has(
    prompt: int, policy: tuple[int, ...], measured: float
):
    """Weights and cache from four local disks, for which Google states 2,650 MB/s; nothing is fitted."""
    assert predicted(_175B, prompt, policy) == pytest.approx(measured, rel=0.1)


def test_the_authors_own_constant_of_the_disk_does_not_explain_their_runs_from_it():
    """Said in `t4`."""
    prompt, policy, measured = _FROM_DISK[1]
    assert predicted(_175B, prompt, policy, disk_read=0.473 * 2**30) < measured / 4


def test_opt_30b_in_batches_of_160_is_faster_than_predicted():
    """Known: 19% low. The rate of a step's products, 4.3 TFLOP/s, was fitted to batches of 20 to 64 rows; what of it is
    a time that a batch takes whatever its rows, the paper does not say, and it is not made up here.
    """
    found = predicted(_30B, 256, (160, 2, 10, 90, 0, 100, 0, 100))
    assert found == pytest.approx(0.81 * 16.01, rel=0.02)


def test_the_papers_policies_fit_the_papers_machine():
    """16 GB of a T4 and 208 GB of the host; that of 30B fills the card."""
    work = opt(*_30B, 512, 32)
    policy = Policy(48, 3, Shares(0.2, 0.8, 0.0), Shares(0, 1.0, 0), Shares(0, 1.0, 0))
    memory = peak_memory(work, policy)
    assert 12 < memory.device / 2**30 < 15 and memory.host / 2**30 < 204 and memory.disk == 0
    assert memory.within(Memory(15 * 2**30, 204 * 2**30, 0)) and not memory.within(Memory(1, 1e12, 0))


def test_streams_are_bytes_over_bandwidths():
    """Counted by hand for one layer of a small shape."""
    work, machine = opt(1, 8, 4, 3), t4(2, 8)
    half = Shares(0.5, 0.25, 0.25)
    policy = Policy(2, 3, half, half, half)
    weights, rows = 8 * 8**2 + 4 * 8 * 32, 6
    prompt = prompt_streams(work, machine, policy)
    assert prompt.to_device == pytest.approx((weights / 2 + 2 * 8 * rows * 4 / 2) / machine.to_device)
    assert prompt.from_disk == pytest.approx((weights / 4 + 2 * 8 * rows * 4 / 4) / machine.disk_read)
    step = step_streams(work, machine, policy)
    read = weights / 4 / 0.95 + 4 * 8 * rows * (4 + 1.5) / 4 + 2 * 8 * rows / 4
    assert step.from_disk == pytest.approx(read / machine.disk_read)


def test_the_papers_form_overlaps_everything():
    work, machine = opt(*_30B, 512, 32), t4(48, 7168)
    policy = Policy(48, 3, Shares(0.2, 0.8, 0.0), Shares(0, 1.0, 0), Shares(0, 1.0, 0))
    assert predict(work, machine, policy, "paper").seconds < predict(work, machine, policy, "code").seconds


def test_pieces_cost_streams_and_computing_what_each_is_timed_at():
    """A batch's rows on the disk are a piece each for keys and for values, read and written in a step."""
    thirds = Shares(0.5, 0.0, 0.5)
    policy, work = Policy(4, 3, thirds, thirds, Shares(1.0, 0.0, 0.0)), replace(opt(1, 8, 4, 3), cache_pieces=2)
    work = replace(work, weight_pieces=6)
    bare = t4(4, 8)
    machine = replace(bare, piece_read=0.5, piece_written=0.25, piece_seconds=0.125, writing_seconds=1e-3)
    for streams, read, written, stored in (
        (prompt_streams, 3, 12, 4 * 8 * 6 * 5),
        (step_streams, 3 + 12, 12, 4 * 8 * 6),
    ):
        before, after = streams(work, bare, policy), streams(work, machine, policy)
        assert after.from_disk - before.from_disk == pytest.approx(0.5 * read)
        assert after.to_disk - before.to_disk == pytest.approx(0.25 * written)
        assert after.compute - before.compute == pytest.approx(0.125 * (read + written) + 1e-3 * stored)
