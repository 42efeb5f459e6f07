"""Numbers as text: units that show them, blocks in order."""

import pytest

from cramjax.show import numbers


@pytest.mark.parametrize(
    ("seconds", "text"), [(44.6, "45s"), (59.7, "1m00s"), (200, "3m20s"), (7500, "2h05m"), (97200, "1d03h")]
)
def test_seconds(seconds: float, text: str):
    assert numbers.format_seconds(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(950, "950"), (12_345, "12.3k"), (4_560_000, "4.56M"), (1.2e9, "1.20B")])
def test_counts(value: float, text: str):
    assert numbers.format_count(value) == text


def test_sparkline_orders_values():
    assert numbers.sparkline([0.0, 1.0, 0.5]) == "▁█▅" or numbers.sparkline([0.0, 1.0, 0.5]) == "▁█▄"
    assert len(numbers.sparkline(list(range(100)))) == 40


@pytest.mark.parametrize(
    ("size", "text"), [(4096, "4 KiB"), (3.25 * 2**20, "3.2 MiB"), (700 * 2**20, "700 MiB"), (3 * 2**29, "1.50 GiB")]
)
def test_bytes_have_a_unit_that_shows_them(size: float, text: str) -> None:
    assert numbers.format_bytes(size) == text
