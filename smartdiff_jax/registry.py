"""Names to objects, once, at the border."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from smartdiff_jax.errors import InvalidConfig, InvalidField

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """A read-only table of named alternatives; a wrong name is one error that lists the right ones."""

    def __init__(self, field: str, entries: Mapping[str, T], error: type[InvalidField] = InvalidConfig):
        self.field, self._error = field, error
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            near = difflib.get_close_matches(str(name), self._entries, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise self._error(self.field, name, f"{hint}choose one of {', '.join(sorted(self._entries))}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
