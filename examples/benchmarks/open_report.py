"""Open reports in headless Chromium; fail if one logs an error or makes a network request.

python examples/benchmarks/open_report.py REPORT.html...
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CONSOLE = re.compile(r":CONSOLE[(:]\d+\)?\] (.*)")
SECONDS = 120


def problems(browser: str, report: Path) -> list[str]:
    """The problems of a report, one line each."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "net.json"
        done = subprocess.run(
            [
                browser,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-background-networking",
                "--disable-component-update",
                "--no-first-run",
                "--host-resolver-rules=MAP * ~NOTFOUND",
                f"--user-data-dir={folder}/profile",
                f"--log-net-log={log}",
                "--enable-logging=stderr",
                "--virtual-time-budget=2000",
                "--dump-dom",
                report.resolve().as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        if done.returncode != 0:
            return [f"the browser ended with {done.returncode}"]
        found = [f"console: {words}" for words in CONSOLE.findall(done.stderr)]
        found += [f"request: {url}" for url in _requests(log)]
    if 'id="memplan"' not in done.stdout:
        found.append("the page did not load")
    return found


def _requests(log: Path) -> list[str]:
    """Addresses that the page requested; the browser's own requests have no origin."""
    found = json.loads(log.read_text())
    starts = found["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    params = [event.get("params", {}) for event in found["events"] if event["type"] == starts]
    return [
        one["url"]
        for one in params
        if one.get("initiator", "not an origin") != "not an origin"
        and not one["url"].startswith(("file:", "data:"))
    ]


def main(reports: list[str]) -> int:
    """Check each report; return 1 if there is a problem."""
    browser = shutil.which("chromium")
    if browser is None:
        print("chromium is not installed", file=sys.stderr)
        return 1
    failed = False
    for report in reports:
        lines = problems(browser, Path(report))
        print(f"{report}: {'; '.join(lines) or 'no error, no request'}")
        failed = failed or bool(lines)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
