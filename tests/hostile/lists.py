"""train.txt, val.txt, test.txt and classes.json with contents and kinds that nobody expects."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

from tests.hostile.trials import ASIDE, OTHER, POOL, REFUSED, RIGHT, TEMPLATE, TEST, VAL, Place, Trial

VALIDATE = ("validate", "{data}")
LISTED = {"train.txt": [TEMPLATE, POOL, OTHER], "val.txt": [VAL], "test.txt": [TEST]}


def text_of(names, end="\n") -> bytes:
    return "".join(f"{name}{end}" for name in names).encode(errors="surrogateescape")


def shuffled_rubbish(names: list[str], place: Place) -> bytes:
    """Known names among random lines."""
    lines = [*names, *(place.rng.randbytes(place.rng.randrange(40)).decode("latin-1") for _ in range(30))]
    place.rng.shuffle(lines)
    return text_of(lines)


Bytes = Callable[[list[str], Place], bytes]
# File content -> how the command may end.
CONTENTS: dict[str, tuple[Bytes, tuple[str, ...]]] = {
    "binary": (lambda names, place: place.rng.randbytes(3000), (REFUSED,)),
    "utf_16": (lambda names, place: "\n".join(names).encode("utf-16"), (REFUSED,)),
    "bom": (lambda names, place: b"\xef\xbb\xbf" + text_of(names), (RIGHT,)),
    "crlf": (lambda names, place: text_of(names, "\r\n"), (RIGHT,)),
    "cr": (lambda names, place: text_of(names, "\r"), (RIGHT,)),
    "spaces": (lambda names, place: text_of(f"  {name} \t" for name in names), (RIGHT,)),
    "file_names": (lambda names, place: text_of(f"{name}.nii.gz" for name in names), (RIGHT,)),
    "twice": (lambda names, place: text_of(names * 2), (RIGHT,)),
    "200000_times": (lambda names, place: text_of(names * (200_000 // len(names))), (RIGHT,)),
    "unknown": (lambda names, place: text_of([*names, "nobody"]), (RIGHT, ASIDE)),
    "10000_unknown": (lambda names, place: text_of([*names, *(f"nobody_{n}" for n in range(10_000))]), (RIGHT, ASIDE)),
    "absolute": (lambda names, place: text_of([*names, "/etc/passwd"]), (REFUSED,)),
    "above": (lambda names, place: text_of([*names, f"../labels/{names[0]}"]), (REFUSED,)),
    "10000_above": (lambda names, place: text_of([*names, *(f"../{n}" for n in range(10_000))]), (REFUSED,)),
    "backslash": (lambda names, place: text_of([*names, "..\\x"]), (REFUSED,)),
    "drive": (lambda names, place: text_of([*names, "C:x"]), (REFUSED,)),
    "nul": (lambda names, place: text_of([*names, "a\0b"]), (REFUSED,)),
    "escape": (lambda names, place: text_of([*names, "\x1b[31mred"]), (REFUSED, ASIDE, RIGHT)),
    "right_to_left": (lambda names, place: text_of([*names, "\u202egnp"]), (REFUSED, ASIDE, RIGHT)),
    "long_line": (lambda names, place: text_of([*names, "n" * 1_000_000]), (REFUSED, ASIDE, RIGHT)),
    "long_lines": (lambda names, place: text_of([*names, *("n" * 5000 + str(n) for n in range(99))]), (REFUSED, RIGHT)),
    "expressions": (lambda names, place: text_of([*names, "$open('PWNED', 'w')", "@preset", "%x"]), (RIGHT, ASIDE)),
    "empty": (lambda names, place: b"", (REFUSED, RIGHT)),
    "blank": (lambda names, place: b"\n \n\t\n", (REFUSED, RIGHT)),
    "all_cases": (lambda names, place: text_of([TEMPLATE, POOL, OTHER, VAL, TEST]), (REFUSED,)),
    "rubbish": (shuffled_rubbish, (REFUSED, RIGHT)),
    "rubbish_2": (shuffled_rubbish, (REFUSED, RIGHT)),
}
KINDS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "fifo": (lambda path, place: os.mkfifo(path), (REFUSED,)),
    "folder": (lambda path, place: path.mkdir(), (REFUSED,)),
    "loop": (lambda path, place: path.symlink_to(path.name), (REFUSED,)),
    "dangling": (lambda path, place: path.symlink_to("/nowhere"), (REFUSED,)),
    "endless": (lambda path, place: path.symlink_to("/dev/zero"), (REFUSED,)),
    "terminal": (lambda path, place: path.symlink_to("/dev/stdin"), (REFUSED, RIGHT)),
}


def of_content(file: str, name: str, make: Bytes, ends) -> Trial:
    def spoil(place: Place) -> None:
        (place.data / file).write_bytes(make(LISTED[file], place))
        place.named = "nobody"

    ends = (RIGHT,) if name == "empty" and file == "val.txt" else ends
    return Trial("lists", f"{file.removesuffix('.txt')}_{name}", spoil, VALIDATE, ends)


def of_kind(file: str, name: str, make: Callable, ends) -> Trial:
    def spoil(place: Place) -> None:
        (place.data / file).unlink()
        make(place.data / file, place)

    return Trial("lists", f"{file.partition('.')[0]}_{name}", spoil, VALIDATE, ends)


# classes.json
CLASSES: dict[str, tuple[Callable[[Place], bytes | str], tuple[str, ...]]] = {
    "100000_brackets": (lambda place: "[" * 100_000, (REFUSED,)),
    "100000_braces": (lambda place: '{"a":' * 100_000, (REFUSED,)),
    "number": (lambda place: "5", (REFUSED,)),
    "null": (lambda place: "null", (REFUSED,)),
    "text": (lambda place: '"liver"', (REFUSED,)),
    "no_json": (lambda place: "liver, spleen", (REFUSED,)),
    "empty": (lambda place: "", (REFUSED,)),
    "nested": (lambda place: '{"1": {"_target_": "os.system", "command": "touch PWNED"}}', (REFUSED,)),
    "numbers": (lambda place: "[1, 2, 3]", (REFUSED,)),
    "infinity": (lambda place: '{"Infinity": "a", "1e999": "b"}', (REFUSED,)),
    "huge_number": (lambda place: '{"%s": "a"}' % ("9" * 10_000), (REFUSED, RIGHT)),
    "negative": (lambda place: '{"-1": "a"}', (REFUSED, RIGHT)),
    "blank_name": (lambda place: '{"1": "  "}', (REFUSED,)),
    "duplicates": (lambda place: '{"1": "a", "01": "b", "1": "c"}', (REFUSED, RIGHT)),
    "same_name": (lambda place: '["a", "a"]', (REFUSED, RIGHT)),
    "10000_names": (lambda place: json.dumps([f"class {n}" for n in range(10_000)]), (REFUSED, RIGHT)),
    "long_name": (lambda place: json.dumps(["n" * 1_000_000]), (REFUSED, RIGHT)),
    "nul": (lambda place: '["a\\u0000b"]', (REFUSED, RIGHT)),
    "escape": (lambda place: '["\\u001b[2J"]', (REFUSED, RIGHT)),
    "surrogate": (lambda place: '["\\ud800"]', (REFUSED, RIGHT)),
    "expression": (lambda place: "[\"$open('PWNED', 'w')\", \"@preset\"]", (RIGHT,)),
    "bytes": (lambda place: place.rng.randbytes(500), (REFUSED,)),
    "utf_16": (lambda place: '["liver"]'.encode("utf-16"), (REFUSED,)),
}


def of_classes(name: str, make: Callable, ends) -> Trial:
    def spoil(place: Place) -> None:
        made = make(place)
        (place.data / "classes.json").write_bytes(made if isinstance(made, bytes) else made.encode())

    return Trial("lists", f"classes_{name}", spoil, VALIDATE, ends)


TRIALS = [
    *(of_content(file, name, *made) for file in LISTED for name, made in CONTENTS.items()),
    *(of_kind(file, name, *made) for file in (*LISTED, "classes.json") for name, made in KINDS.items()),
    *(of_classes(name, *made) for name, made in CLASSES.items()),
]
