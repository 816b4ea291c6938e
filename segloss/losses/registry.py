"""Every loss class, found by name: a loss is its class, its function's name and its short name."""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

# those with a short name, in the order in which they are defined
LOSSES: dict[str, Any] = {}
# all of them, a user's own too; by `key`
_CLASSES: WeakValueDictionary[str, Any] = WeakValueDictionary()


def register(loss_class: Any, function: str | None, short: str | None) -> None:
    """Give the class its `key`, `function` and `short`, and let it be found by them."""
    place = f"{loss_class.__module__}:{loss_class.__qualname__}".removeprefix("segloss.losses.")
    key, number = place, 1
    while key in _CLASSES:  # defined again, as in a notebook: losses of both may be alive
        key, number = f"{place}#{number}", number + 1
    loss_class.key, loss_class.function, loss_class.short = key, function, short
    _CLASSES[key] = loss_class
    if short is not None:
        LOSSES[short] = loss_class


def find(key: str) -> Any:
    """The class of a key."""
    return _CLASSES[key]
