"""The largest value of a setting whose step fits, in few trials. No torch here."""

from __future__ import annotations

from collections.abc import Callable

MOST = 2**24
_FURTHER = 1.05


def largest_fitting(
    needs: Callable[[int], int], memory_bytes: int, multiple_of: int = 1
) -> tuple[int, dict[int, int]]:
    """The largest number whose needs are within a bound, 0 if there is none.

    Needs are mostly linear, so the next trial is where the line through the last two meets the
    bound. They may dip here and there, because measured times do: once the bound is met, a number
    further on is tried once.

    Args:
        needs: the bytes for a number of at least 1.
        memory_bytes: the bound.
        multiple_of: the number is a multiple of this.

    Returns:
        The number, and the bytes of every number tried.

    >>> largest_fitting(lambda number: 10 + 3 * number, 100)[0]
    30
    """
    tried: dict[int, int] = {}

    def fits(count: int) -> bool:
        number = count * multiple_of
        if number not in tried:
            tried[number] = needs(number)
        return tried[number] <= memory_bytes

    low = _search(fits, tried, memory_bytes, 0, multiple_of)
    further = int(low * _FURTHER)
    while low + 1 < further < MOST and fits(further):
        low = _search(fits, tried, memory_bytes, further, multiple_of)
        further = int(low * _FURTHER)
    return low * multiple_of, tried


def _search(
    fits: Callable[[int], bool],
    tried: dict[int, int],
    memory_bytes: int,
    low: int,
    multiple_of: int,
) -> int:
    """A count that fits, while one more does not."""
    high = MOST
    count = low + 1
    while high - low > 1:
        if fits(count):
            low = count
        else:
            high = count
        known = {number // multiple_of: nbytes for number, nbytes in tried.items()}
        count = _next(known, memory_bytes, low, high)
    return low


def _next(tried: dict[int, int], memory_bytes: int, low: int, high: int) -> int:
    """A count between the bounds to try next."""
    if len(tried) == 1:
        return min(2, max(1, high - 1))
    nearest = sorted(tried, key=lambda count: (abs(tried[count] - memory_bytes), count))[:2]
    one, other = sorted(nearest)
    slope = (tried[other] - tried[one]) / (other - one)
    guess = one + int((memory_bytes - tried[one]) / slope) if slope > 0 else 2 * low
    if high < MOST and (len(tried) % 2 or not low < guess < high):
        # If the line is of no use, bisect.
        guess = (low + high) // 2
    within = high - 1 if high < MOST else min(high - 1, max(4 * low, 2))
    return max(low + 1, min(guess, within))
