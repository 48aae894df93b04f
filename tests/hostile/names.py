"""Names of scans, classes, folders and settings that are code, formulas, paths or hard to print."""

from __future__ import annotations

import json
import os
import unicodedata

import nibabel

from tests.hostile.trials import (
    ASIDE,
    OTHER,
    POOL,
    REFUSED,
    RIGHT,
    SETTINGS,
    TEMPLATE,
    TEST,
    Place,
    Trial,
    leave,
)  # fmt: skip

NAMES = {
    "import": "$__import__('os').system('touch PWNED')",
    "open": "$open('PWNED','w')",
    "print": "$print",
    "number": "$5",
    "at": "@preset",
    "at_cohort": "@cohort#classes",
    "percent": "%passwd",
    "hash": "#",
    "hash_inside": "train#lr",
    "double_colon": "a::b",
    "formula": "=cmd|' C'!A0",
    "formula_plus": "+1-1",
    "script": "<script>alert(1)</script>".replace("/", "\u2215"),
    "jinja": "{{ 7 * 7 }}{% raw %}",
    "format": "{0.__class__}%s%n",
    "space": " spaces  inside ",
    "quotes": 'it\'s "quoted" `touch PWNED`',
    "shell": "$(touch PWNED);touch PWNED&",
    "backslash": "a\\nb\\",
    "composed": unicodedata.normalize("NFC", "Löwe é"),
    "decomposed": unicodedata.normalize("NFD", "Löwe é"),
    "chinese": "病人",
    "emoji": "🫀",
    "dash": "-rf",
    "option": "--output",
    "dots": "...",
    "comma": "a,b",
    "equals": "a=b",
    "star": "*",
    "brackets": "[a]",
    "long": "n" * 200,
}
# Not printable: refused wherever a name is taken from them, or set aside.
ODD = {
    "newline": "a\nb",
    "return": "a\rb",
    "tab": "a\tb",
    "escape": "\x1b[2Jgone",
    "bell": "a\x07b",
    "right_to_left": "a\u202eb",
    "undecodable": os.fsdecode(b"a\xff\xfeb"),
}
ALL = NAMES | ODD


def as_scan(case: str, new: str):
    def spoil(place: Place) -> None:
        place.rename(case, new)
        place.named = place.words["name"] = new

    return spoil


def as_class(name: str):
    def spoil(place: Place) -> None:
        (place.data / "classes.json").write_text(json.dumps([name, name]))

    return spoil


def as_image(name: str):
    def spoil(place: Place) -> None:
        path = place.image(TEST).rename(place.image(TEST).with_name(f"{name}.nii.gz"))
        place.words["image"] = str(path)

    return spoil


def as_data(name: str):
    def spoil(place: Place) -> None:
        place.data = place.data.rename(place.root / f"x{name}")
        place.words["data"] = str(place.data)

    return spoil


def as_output(name: str):
    def spoil(place: Place) -> None:
        place.out = place.root / "out" / name
        place.words["out"] = str(place.out)

    return spoil


def as_run(name: str):
    def spoil(place: Place) -> None:
        place.words["run"] = str(place.run.rename(place.root / f"r{name}"))

    return spoil


def as_word(name: str):
    def spoil(place: Place) -> None:
        place.words["name"] = name

    return spoil


def predicted(place: Place) -> None:
    (label,) = (place.out / "labels").iterdir()
    assert nibabel.load(label).shape == nibabel.load(place.words["image"]).shape


PREDICT = ("predict", "{image}", "--run", "{run}", "--output", "{out}", "--device", "cpu")
AGAIN = ("run", "{data}", "--output", "{run}", *SETTINGS)
SUGGEST = ("suggest-template", "{data}", "--output", "{out}")


def trials_of(name: str, text: str) -> list[Trial]:
    odd = (REFUSED, RIGHT)
    words = (f"--template={text}",) if text.startswith("-") else ("--template", text)
    found = [
        Trial("names", f"template_{name}", as_scan(TEMPLATE, text), ("validate", "{data}"), (REFUSED, RIGHT)),
        Trial("names", f"pool_{name}", as_scan(POOL, text), ("validate", "{data}"), (REFUSED, ASIDE, RIGHT)),
        Trial("names", f"image_{name}", as_image(text), PREDICT, odd if name in ODD else (RIGHT,), predicted),
        Trial("names", f"output_{name}", as_output(text), PREDICT, odd if name in ODD else (RIGHT,), predicted),
    ]
    if "{" not in text:
        found.append(Trial("names", f"no_template_{name}", leave, ("validate", "{data}", *words), (REFUSED,)))
    if name in FEW:
        found += [
            Trial("names", f"class_{name}", as_class(text), ("validate", "{data}"), (REFUSED, RIGHT)),
            Trial("names", f"data_{name}", as_data(text), ("validate", "{data}"), (REFUSED, RIGHT)),
            Trial("names", f"run_{name}", as_run(text), PREDICT, odd if name in ODD else (RIGHT,), predicted),
            Trial("names", f"no_image_{name}", as_word(text), ("predict", "./{name}", *PREDICT[2:]), (REFUSED,)),
            Trial(
                "names", f"weights_{name}", as_word(text),
                ("predict", "{image}", "--weights={name}", *PREDICT[4:]), (REFUSED,),
            ),
            Trial("names", f"device_{name}", as_word(text), (*PREDICT[:-1], "{name}"), (REFUSED,)),
            Trial("names", f"step_{name}", as_word(text), (*AGAIN, "--restart-from={name}"), (REFUSED,)),
            Trial("names", f"given_{name}", as_word(text), (*SUGGEST, "--given={name}"), (REFUSED,)),
        ]  # fmt: skip
    return found


FEW = ("import", "at", "percent", "hash", "quotes", "escape", "undecodable")


def hostile_cohort(place: Place) -> None:
    """Every scan and class has a hostile name."""
    for case, name in ((TEMPLATE, "import"), (POOL, "formula"), (OTHER, "at"), (TEST, "open")):
        place.rename(case, NAMES[name])
    as_class("$open('PWNED','w')")(place)


def recorded(place: Place) -> None:
    """The template in run.json is an expression."""
    path = place.run / "run.json"
    kept = json.loads(path.read_text())
    kept["template"] = [NAMES["import"], "@preset"]
    kept["classes"] = dict.fromkeys(kept["classes"], "$open('PWNED','w')")
    path.write_text(json.dumps(kept))


def recorded_settings(place: Place) -> None:
    path = place.run / "run.json"
    kept = json.loads(path.read_text())
    kept["settings"] |= dict.fromkeys(("num_classes", "image_key", "spacing"), "$open('PWNED','w')")
    kept["settings"]["metric_definition"] = "@preset"
    path.write_text(json.dumps(kept))


def labelled(place: Place) -> None:
    names = {path.name for path in (place.out / "pseudo_labels").iterdir()}
    assert names == {f"{NAMES[name]}.nii.gz" for name in ("formula", "at")}, names


def pseudonym_key(text: str):
    def spoil(place: Place) -> None:
        place.file.write_text(text, errors="surrogateescape")

    return spoil


KEYS = {
    "expression": f"case,pseudonym\n{POOL},$open('PWNED')\n",
    "path": f"case,pseudonym\n{POOL},../../user/notes\n",
    "twice": f"case,pseudonym\n{POOL},a\n{OTHER},a\n",
    "dots": f"case,pseudonym\n{POOL},..\n",
    "no_columns": "a,b\nc,d\n",
    "binary": os.fsdecode(bytes(range(128, 256)) * 9),
    "quote": 'case,pseudonym\n"unfinished,a\n',
    "huge_cell": f"case,pseudonym\n{POOL},{'a' * 200_000}\n",
    "long": f"case,pseudonym\n{POOL},{'a' * 300}\n",
    "nul": f"case,pseudonym\n{POOL},a\0b\n",
}
RUN = ("run", "{data}", "--output", "{out}")
WITH_KEY = ("predict", "{data}/images/phantom_01.nii.gz", "--pseudonyms", "{file}", *PREDICT[2:])

TRIALS = [
    *(trial for name, text in ALL.items() for trial in trials_of(name, text)),
    Trial("names", "whole_run", hostile_cohort, (*RUN, *SETTINGS, "num_rounds=1"), (RIGHT,), labelled),
    Trial("names", "record_template", recorded, ("evaluate", "{run}", "{data}"), (REFUSED,)),
    Trial("names", "record_settings", recorded_settings, ("evaluate", "{run}", "{data}"), (REFUSED,)),
    Trial("names", "record_predict", recorded, PREDICT, (RIGHT, REFUSED)),
    *(Trial("names", f"key_{name}", pseudonym_key(text), WITH_KEY, (REFUSED,)) for name, text in KEYS.items()),
]  # fmt: skip
