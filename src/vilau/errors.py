"""What an error says, short enough to stand within another error's line."""

from __future__ import annotations


def first_line(error: BaseException, lines: int = 1) -> str:
    """Return the first line of an error's message, or its first few joined; its type where it says nothing."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(said[:lines]) or type(error).__name__
