"""Bytes as people write them, and budgets. Inside memplan every size is an int of bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from memplan.errors import UnitsError

_ACCEPTED = 'accepted forms: 6000000000, "6GiB", "6 GB", "500MB", "1.5g" (a bare letter is binary)'
_BUDGET_ACCEPTED = f'{_ACCEPTED}, or "50%" of what the step needs above its resident bytes'

_FACTORS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _FACTORS[_letter] = _FACTORS[f"{_letter}ib"] = 1024**_power
    _FACTORS[f"{_letter}b"] = 1000**_power

_NUMBER = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", re.IGNORECASE | re.ASCII)
_PERCENT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*%\s*", re.ASCII)


def parse_bytes(size: int | str) -> int:
    """Parse a number of bytes.

    Args:
        size: an int of bytes, or text such as ``"6GiB"``, ``"6 GB"`` or ``"1.5g"``.

    Raises:
        UnitsError: for anything else, with the accepted forms.

    >>> parse_bytes("1.5KiB"), parse_bytes("6 GB"), parse_bytes(7)
    (1536, 6000000000, 7)
    """
    if isinstance(size, int) and not isinstance(size, bool):
        if size < 0:
            raise UnitsError(f"{size!r} is negative; {_ACCEPTED}")
        return size
    match = _NUMBER.fullmatch(size) if isinstance(size, str) else None
    if match is None or match[2].lower() not in _FACTORS:
        raise UnitsError(f"{size!r} is not a number of bytes; {_ACCEPTED}")
    return int(Fraction(match[1]) * _FACTORS[match[2].lower()])


def parse_share(text: str) -> float:
    """Parse a percentage.

    Raises:
        UnitsError: for anything else.

    >>> parse_share("2%")
    0.02
    """
    match = _PERCENT.fullmatch(text)
    if match is None:
        raise UnitsError(f'{text!r} is not a percentage such as "2%"')
    return float(Fraction(match[1]) / 100)


def format_bytes(nbytes: int) -> str:
    """Format a number of bytes for people.

    >>> format_bytes(1536), format_bytes(12), format_bytes(-2 * 1024**3)
    ('1.50 KiB', '12 B', '-2.00 GiB')
    """
    magnitude = float(abs(nbytes))
    sign = "-" if nbytes < 0 else ""
    if magnitude < 1024:
        return f"{nbytes} B"
    for unit in ("KiB", "MiB", "GiB"):
        magnitude /= 1024
        if magnitude < 1024:
            return f"{sign}{magnitude:.2f} {unit}"
    return f"{sign}{magnitude / 1024:.2f} TiB"


@dataclass(frozen=True, slots=True)
class Budget:
    """A bound on the peak of the whole step: a number of bytes, or a share of what the step needs.

    Attributes:
        nbytes: the bound in bytes, or None where ``fraction`` is given.
        fraction: the share, in [0, 1], of the original peak above the resident bytes.
    """

    nbytes: int | None = None
    fraction: float | None = None

    def resolve(self, resident_bytes: int, original_peak_bytes: int) -> int:
        """The bound in bytes for a step with these resident bytes and this unplanned peak."""
        if self.nbytes is not None:
            return self.nbytes
        assert self.fraction is not None
        return resident_bytes + int(self.fraction * (original_peak_bytes - resident_bytes))


def parse_budget(budget: int | str) -> Budget:
    """Parse a budget.

    Raises:
        UnitsError: for anything that is neither bytes nor a percentage up to 100.

    >>> parse_budget("50%").resolve(resident_bytes=100, original_peak_bytes=300)
    200
    """
    if isinstance(budget, str):
        match = _PERCENT.fullmatch(budget)
        if match is not None:
            if float(match[1]) > 100:
                raise UnitsError(f"budget {budget!r} is above 100%; {_BUDGET_ACCEPTED}")
            return Budget(fraction=float(match[1]) / 100)
    try:
        return Budget(nbytes=parse_bytes(budget))
    except UnitsError as error:
        raise UnitsError(f"budget {budget!r} cannot be read; {_BUDGET_ACCEPTED}") from error
