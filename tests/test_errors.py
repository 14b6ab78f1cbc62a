"""Errors of libraries, in a line."""

from __future__ import annotations

from vilau.errors import first_line


def test_first_line() -> None:
    """Blank lines do not hide the message, a silent error shows its type, and some need their second line."""
    error = RuntimeError("\n  Error(s) in loading:\n\n\tsize mismatch for a\n\tand for b")
    assert first_line(error) == "Error(s) in loading:"
    assert first_line(error, 2) == "Error(s) in loading: size mismatch for a"
    assert first_line(MemoryError()) == "MemoryError"
