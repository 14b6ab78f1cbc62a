"""`python -m vilau.cli`."""

from vilau.cli.main import run

run()
