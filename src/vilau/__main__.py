"""`python -m vilau`."""

from vilau.cli.main import run

run()
