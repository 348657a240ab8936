"""Numbers as people read them: as many digits as are certain, and an exponent where zeros would hide them."""

from __future__ import annotations

import math
from decimal import Decimal

__all__ = ["shown", "shown_interval"]

#: Powers of ten from which on, and below which, a number is written with an exponent.
LARGE, SMALL = 6, -4

#: Digits of a mean that are shown beside its half width, at most.
MOST_DIGITS = 6


def shown(value: float, digits: int = 4) -> str:
    """A number with some significant digits.

    >>> shown(0.5), shown(0.000312), shown(12345.6), shown(3.6e24), shown(float("nan"))
    ('0.5000', '0.0003120', '12346', '3.600e+24', 'nan')
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    power = power_of(value, digits)
    if SMALL <= power < LARGE:
        return f"{value:.{max(digits - 1 - power, 0)}f}"
    return f"{value:.{digits - 1}e}"


def shown_interval(mean: float, half_width: float | None) -> str:
    """`mean ± half width`, both up to the second digit of the half width; the mean alone where there is no interval.

    >>> shown_interval(0.36912, 0.01234), shown_interval(3.6e24, 1.1e24), shown_interval(0.00031, 0.000052)
    ('0.369 ± 0.012', '(3.6 ± 1.1)e+24', '0.000310 ± 0.000052')
    """
    if half_width is None or not math.isfinite(half_width) or not math.isfinite(mean):
        return shown(mean)
    width = power_of(half_width, 2)
    power = max(power_of(mean, MOST_DIGITS), width)
    if half_width == 0 or power - width + 2 > MOST_DIGITS:
        return f"{shown(mean)} ± {shown(half_width, 2)}"
    if SMALL <= power < LARGE:
        decimals = max(1 - width, 0)
        return f"{mean:.{decimals}f} ± {half_width:.{decimals}f}"
    scaled = (f"{Decimal(x).scaleb(-power):.{power - width + 1}f}" for x in (mean, half_width))
    return f"({' ± '.join(scaled)})e{power:+03d}"


def power_of(value: float, digits: int) -> int:
    """The power of ten of a number's first digit, once it is rounded to some digits; 0 for zero."""
    return int(f"{value:.{digits - 1}e}".partition("e")[2])
