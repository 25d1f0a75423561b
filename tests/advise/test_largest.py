"""The largest number that fits, against trying them all."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from memplan.advise.largest_batch import MOST, largest_fitting


@given(
    start=st.integers(0, 1000),
    slope=st.integers(1, 50),
    curve=st.integers(0, 3),
    bound=st.integers(0, 20000),
    multiple=st.integers(1, 8),
)
def test_it_is_the_largest(start, slope, curve, bound, multiple):
    def needs(number):
        return start + slope * number + curve * number * number

    found, tried = largest_fitting(needs, bound, multiple)
    fitting = [n for n in range(multiple, 20001, multiple) if needs(n) <= bound]
    assert found == max(fitting, default=0)
    assert all(nbytes == needs(number) for number, nbytes in tried.items())
    assert len(tried) <= 45


def test_a_line_is_met_in_a_few_trials():
    found, tried = largest_fitting(lambda number: 10**6 + 54321 * number, 10**9)
    assert found == (10**9 - 10**6) // 54321
    assert len(tried) <= 15


def test_what_saturates_is_found_too():
    """Plans stay just below their budget for long."""

    def needs(number):
        return min(100 + 7 * number, 990) if number <= 500 else 1100

    assert largest_fitting(needs, 1000)[0] == 500


def test_a_step_of_noise_is_stepped_over():
    def needs(number):
        return 1001 if number == 40 else 10 * number

    assert largest_fitting(needs, 1000)[0] == 100


def test_what_needs_no_more_ends():
    found, tried = largest_fitting(lambda number: 10, 100)
    assert found == MOST - 1 and len(tried) < 60
