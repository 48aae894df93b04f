"""Data as values of a MONAI config: the only place that turns text and paths into config.

In a MONAI config, text that starts with ``$`` is evaluated as Python, ``@id`` refers to another value, ``%file`` opens
a file, and ``#`` separates the parts of an id. Names of cases, files and classes may contain these signs.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

SIGNS = "$@%#"  # with a meaning in a config


def as_config(value: Any) -> Any:
    """The config whose parsed content is ``value``: a text, path, number, bool, None or list of these.

    Raises:
        TypeError: another type. A dict could name a ``_target_``.
    """
    if isinstance(value, (list, tuple)):
        return [as_config(part) for part in value]
    if isinstance(value, PurePath):
        value = str(value)
    if isinstance(value, str):
        return f"${literal(value)}" if any(sign in value for sign in SIGNS) else value
    if value is None or isinstance(value, (bool, int, float)):
        return value
    raise TypeError(f"{value!r} is no plain value for a config")


def literal(text: str) -> str:
    """A Python literal of ``text`` in which only ASCII letters, digits and some harmless signs stand as they are."""
    kept = (c if c.isascii() and (c.isalnum() or c in " /._-") else f"\\U{ord(c):08x}" for c in text)
    return f"'{''.join(kept)}'"


def harmless(text: str) -> str:
    """``text`` for JSON that people read and MONAI parses, e.g. class names: a leading sign gets an underscore."""
    return f"_{text}" if text.startswith(tuple(SIGNS)) else text
