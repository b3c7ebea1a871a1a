"""Numbers and texts as people read them, for the terminal and the report."""

import math
import re

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


def quantity(value: float | None) -> str:
    """Four digits of a measured value: ``2.913``, ``0.0412``, ``1.20e-5``; a dash for None."""
    if value is None:
        return "-"
    size = abs(value)
    if size == 0 or 0.00995 <= size < 1e5:
        digits = 3 if size == 0 else max(0, 3 - math.floor(math.log10(size)))
        return f"{value:,.{digits}f}"
    return rate(value)


def rate(value: float | None) -> str:
    """A learning rate: ``3.00e-4``; a dash for None."""
    if value is None:
        return "-"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if value else "0"


def count(value: float) -> str:
    """A number of things, short: ``950``, ``4,096``, ``1.31M``, ``2.25B``."""
    if abs(value) < 99_999.5:
        return f"{value:,.0f}"
    unit = min(4, math.floor(math.log10(abs(value) * 1.0005) / 3))  # 999.5 thousand is shown as 1.00M
    value /= 1000**unit
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}{' kMBT'[unit]}"


def size(value: float | None) -> str:
    """Bytes: ``412 MiB``, ``1.61 GiB``; a dash for None."""
    if value is None:
        return "-"
    units = ["TiB", "GiB", "MiB", "KiB", "B"]
    unit = units.pop()
    while abs(value) >= 1023.5 and units:
        value, unit = value / 1024, units.pop()
    digits = 0 if unit == "B" or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f} {unit}"


def clock(seconds: float | None) -> str:
    """Time on a clock: ``0:42``, ``12:03``, ``1:02:03``, ``2 d 3:04:05``; ``-:--`` for None."""
    if seconds is None:
        return "-:--"
    minutes, s = divmod(max(0, round(seconds)), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if not hours:
        return f"{m}:{s:02}"
    return (f"{days} d " if days else "") + f"{h}:{m:02}:{s:02}"


def span(seconds: float) -> str:
    """Time in a sentence: ``42 s``, ``2 min 41 s``, ``3 h 5 min``, ``2 d 4 h``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def percent(share: float | None) -> str:
    """A share of 1: ``31 %``, ``0.4 %``; a dash for None."""
    if share is None:
        return "-"
    return f"{100 * share:.{1 if 0 < abs(share) < 0.0995 else 0}f} %"


def one_line(text: str) -> str:
    """The text without control characters and line ends, safe to print on a terminal."""
    return _CONTROL.sub(" ", text).strip()
