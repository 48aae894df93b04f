"""Text from outside: as values of a MONAI config (the only place that makes config of data), as names, as output.

In a MONAI config, text that starts with ``$`` is evaluated as Python, ``@id`` refers to another value, ``%file`` opens
a file, and ``#`` separates the parts of an id. Names of cases, files and classes may contain these signs.
"""

from __future__ import annotations

import logging
from pathlib import PurePath
from typing import Any

LONGEST_NAME = 200  # bytes; file systems allow 255, with the suffix and what a file has beside its name while written
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


def is_name(text: str) -> bool:
    """Whether a text can be the name of a case or class: printable, not blank, not too long for a file's name."""
    return bool(text.strip()) and text.isprintable() and len(text.encode(errors="surrogateescape")) <= LONGEST_NAME


def printable_log() -> None:
    """Keep control characters that a path or name may have out of the log of this package."""
    logging.getLogger("semisam_o1").addFilter(_printable_record)  # once, however often it is called


def _printable_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(record.getMessage()), ()
    return True


def printable(text: str, most: int | None = None) -> str:
    """``text`` for a terminal, with ? for control characters; cut after ``most`` letters."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
    return shown if most is None or len(shown) <= most else f"{shown[: most - 3]}..."
