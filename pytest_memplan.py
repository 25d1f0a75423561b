"""For pytest: ``@pytest.mark.limit_tensor_memory("300 MiB")``.

A module of its own, because importing anything of the package imports torch, which sessions that
do not use the marker should not pay for.
"""

from __future__ import annotations

from collections.abc import Generator

import pytest

_MARKER = "limit_tensor_memory"


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line(
        "markers",
        f'{_MARKER}(size, *, device="cpu"): fail if torch\'s allocator hands out more bytes than '
        'this, such as "300 MiB", above what was there when the test started',
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse limits that cannot be read, before any test runs."""
    for item in items:
        _limit_of(item)


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Measure the test itself; fixtures are set up before, and torn down after."""
    limit = _limit_of(item)
    if limit is None:
        return (yield)
    import torch  # noqa: PLC0415  only now, see above

    from memplan.profiler.limits import describe_excess, measured  # noqa: PLC0415  the same

    limit_bytes, name = limit
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"{_MARKER} measures {name}, which is not there")
    with measured(device) as usage:
        result = yield
    used = usage()
    if used.peak_bytes > limit_bytes:
        pytest.fail(f"{item.name}: {describe_excess(used, limit_bytes)}", pytrace=False)
    return result


def _limit_of(item: pytest.Item) -> tuple[int, str] | None:
    """Bytes and device, if the test has the marker; the innermost counts.

    Raises:
        pytest.UsageError: if it cannot be read.
    """
    marker = item.get_closest_marker(_MARKER)
    if marker is None:
        return None
    from memplan import UnitsError, parse_bytes  # noqa: PLC0415  only now, see above

    options = {"device": "cpu", **marker.kwargs}
    if len(marker.args) != 1 or set(options) != {"device"}:
        raise pytest.UsageError(
            f'{item.nodeid}: write {_MARKER}("300 MiB") or {_MARKER}("300 MiB", device="cuda")'
        )
    device = str(options["device"])
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise pytest.UsageError(
            f'{item.nodeid}: {_MARKER} measures "cpu" or "cuda", not {device!r}'
        )
    try:
        return parse_bytes(marker.args[0]), device
    except UnitsError as error:
        raise pytest.UsageError(f"{item.nodeid}: {_MARKER}: {error}") from error
