"""``python -m memplan``."""

from memplan.cli import main

main(prog_name="memplan")
