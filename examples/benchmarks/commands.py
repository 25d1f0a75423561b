"""Run the commands of a page, and write their output below them.

python examples/benchmarks/commands.py README.md

Each stands in the page as <!-- run: memplan ... -->, before a block of text; a last
"| head -N" keeps N lines of its output.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

BLOCK = re.compile(r"(<!-- run: (.+?) -->\n)```text\n.*?```\n", re.DOTALL)
WIDTH = "92"


def printed(command: str) -> str:
    """The output of a command, without trailing spaces."""
    command, _, most = command.partition(" | head -")
    program, *arguments = shlex.split(command)
    beside = Path(sys.executable).parent / program
    done = subprocess.run(
        [str(beside), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": WIDTH, "NO_COLOR": "1"},
        check=False,
    )
    if done.returncode not in (0, 3):
        sys.exit(f"{command}: exit code {done.returncode}\n{done.stderr}")
    lines = [line.rstrip() for line in done.stdout.strip().splitlines()]
    before = ["x", *lines]
    shown = [line for line, last in zip(lines, before, strict=False) if line or last]
    return "\n".join(shown[: int(most)] if most else shown)


def main() -> None:
    """Rewrite a page."""
    page = Path(sys.argv[1])

    def again(match: re.Match[str]) -> str:
        return f"{match[1]}```text\n$ {match[2]}\n{printed(match[2])}\n```\n"

    page.write_text(BLOCK.sub(again, page.read_text()))


if __name__ == "__main__":
    main()
