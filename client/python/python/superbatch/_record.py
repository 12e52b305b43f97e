"""Messages of the service, as Python sees them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class Record(dict):
    """A message of the service: a dict whose keys are attributes too, at every depth."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"there is no {name!r}; there are {', '.join(self)}") from None

    def __dir__(self) -> Iterable[str]:
        return [*super().__dir__(), *self]


def record(value: Any) -> Any:
    """Dicts as records, at every depth."""
    if isinstance(value, dict):
        return Record({key: record(item) for key, item in value.items()})
    if isinstance(value, list):
        return [record(item) for item in value]
    return value
