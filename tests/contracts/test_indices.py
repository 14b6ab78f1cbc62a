"""The indices of docs and configurations name every file there is."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_index_of_docs_is_whole() -> None:
    """Each page below docs is linked from its README, and no link is dead."""
    text = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    linked = {(ROOT / "docs" / target).resolve() for target in re.findall(r"\]\(([^)#]+)\)", text)}
    assert [str(path) for path in linked if not path.exists()] == []
    pages = set((ROOT / "docs").rglob("*.md")) - {ROOT / "docs" / "README.md"}
    assert sorted(str(path.relative_to(ROOT)) for path in pages - linked) == []


def test_every_configuration_is_explained() -> None:
    """Each configuration is named in configs/README.md, or is within a span of numbered ones that is."""
    text = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w.-]+?)(?:\.yaml)?`", text))
    for name, first, last in re.findall(r"`([\w-]+-)(\d)` to `[\w-]+-(\d)`", text):
        named |= {f"{name}{number}" for number in range(int(first), int(last) + 1)}
    assert sorted(path.name for path in (ROOT / "configs").rglob("*.yaml") if path.stem not in named) == []
