"""Filters by the scores that come with web data: ``clip_similarity_vitb32 >= 0.3``."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_RULE = re.compile(r"^\s*([\w.\- ]*\w)\s*(>=|<=|==|!=|>|<)\s*(.+?)\s*$")


@dataclass(frozen=True)
class Filter:
    """One condition on one field of a sample's metadata; a sample without the field does not pass."""

    field: str
    sign: str
    value: float | str

    def passes(self, value: Any) -> bool:
        """Return whether a value of the field passes; ``nan`` and values of another kind do not."""
        if isinstance(self.value, str):
            return isinstance(value, str) and _OPERATORS[self.sign](value, self.value)
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                return False
        if not isinstance(value, bool | int | float) or value != value:
            return False
        return _OPERATORS[self.sign](float(value), self.value)


def parse_filters(rules: Sequence[str]) -> tuple[Filter, ...]:
    """Parse rules of the form ``field >= number`` or ``field == text``.

    Raises:
        ValueError: a rule has another form, or compares the size of text.
    """
    filters = []
    for rule in rules:
        match = _RULE.match(rule)
        if match is None:
            raise ValueError(f"filter {rule!r} must look like 'clip_similarity_vitb32 >= 0.3' or 'status == success'")
        name, sign, right = match.groups()
        value: float | str
        try:
            value = float(right)
        except ValueError:
            value = right.strip("'\"")
            if sign not in ("==", "!="):
                raise ValueError(f"filter {rule!r}: {sign} needs a number on its right, not {right!r}") from None
        filters.append(Filter(name, sign, value))
    return tuple(filters)


def passes_all(filters: Sequence[Filter], record: Mapping[str, Any]) -> bool:
    """Return whether a sample's metadata passes all filters; dots in a field's name go into mappings."""
    return all(rule.passes(_find(record, rule.field)) for rule in filters)


def _find(record: Any, name: str) -> Any:
    if isinstance(record, Mapping) and name in record:
        return record[name]
    for part in name.split("."):
        if not isinstance(record, Mapping):
            return None
        record = record.get(part)
    return record
