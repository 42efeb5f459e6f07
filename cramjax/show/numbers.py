"""Numbers as text: durations, counts, bytes, estimates with their intervals, and a line of blocks."""

import math

Interval = tuple[float, float]

_BARS = "▁▂▃▄▅▆▇█"


def format_seconds(seconds: float) -> str:
    """Seconds as `45s`, `3m20s`, `2h05m` or `1d03h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def format_count(value: float) -> str:
    """A count with three digits and a suffix: `950`, `12.3k`, `4.56M`, `1.20B`."""
    for scale, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            scaled = value / scale
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f}{suffix}"
    return f"{value:.0f}"


def format_bytes(value: float) -> str:
    """Bytes as KiB, MiB or GiB."""
    if value >= 2**30:
        return f"{value / 2**30:.2f} GiB"
    return f"{value / 2**20:.{int(value < 10 * 2**20)}f} MiB" if value >= 2**20 else f"{value / 2**10:.0f} KiB"


def number(value: float, interval: Interval | None = None) -> str:
    """A value with as many digits as its interval leaves it: at least three, at most seven."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "-∞" if value < 0 else "?"
    digits = 4
    if interval is not None and value:
        width = abs(interval[1] - interval[0])
        if math.isfinite(width) and width > 0:
            digits = min(max(3, 2 + math.ceil(math.log10(abs(value) / width))), 7)
    return f"{value:.{digits}g}"


def span(interval: Interval) -> str:
    """An interval as `low … high`."""
    return f"{number(interval[0], interval)} … {number(interval[1], interval)}"


def finite(value: float) -> float | None:
    """A number for JSON, which has no infinity."""
    return float(value) if math.isfinite(value) else None


def ends(interval: Interval) -> list[float | None]:
    """An interval for JSON; null: no bound on that side."""
    return [finite(interval[0]), finite(interval[1])]


def sparkline(values: list[float], width: int = 40) -> str:
    """A line of block characters, the lowest value lowest; the newest `width` values."""
    values = values[-width:]
    low, high = min(values), max(values)
    reach = (high - low) or 1.0
    return "".join(_BARS[round((value - low) / reach * (len(_BARS) - 1))] for value in values)
