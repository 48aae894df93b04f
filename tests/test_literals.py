"""Text from data and the shell is never evaluated by MONAI's config."""

from pathlib import Path

import pytest
from monai.bundle import ConfigParser

from semisam_o1.literals import as_config, harmless, is_name, literal

TEXTS = [
    "$__import__('os').system('touch PWNED')",
    "$5",
    "@preset",
    "@##a",
    "%/etc/passwd",
    "%",
    "a#b",
    "a@::b",
    "ä/ö\\n'\"",
    "$a\nb",
    "\udc80$",  # a file name that is no UTF-8
    "",
    "plain name.nii.gz",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_comes_out_as_it_went_in(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {"preset": "quick", "a": as_config(text), "b": [as_config(Path(text or "x"))], "c": "$[@a]"}
    config["d"] = {"_target_": "builtins.dict", "inside": "@a"}
    parser = ConfigParser(config)
    assert parser.get_parsed_content("a") == text
    assert parser.get_parsed_content("b") == [str(Path(text or "x"))]
    assert parser.get_parsed_content("c") == [text] and parser.get_parsed_content("d") == {"inside": text}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [1, 2.5, True, None, [1, "a"], "text"])
def test_plain_values_stay_readable(value):
    assert as_config(value) == value


def test_what_could_be_a_component_is_refused():
    with pytest.raises(TypeError, match="no plain value"):
        as_config({"_target_": "os.system", "command": "touch PWNED"})


def test_a_literal_has_no_sign_of_a_config():
    assert not set("$@%#") & set(literal("".join(TEXTS)))


@pytest.mark.parametrize("text", ["$1/0", "@preset", "%/etc/passwd"])
def test_class_names_in_metadata_are_text(text):
    assert ConfigParser({"channels": {"1": harmless(text)}}).get_parsed_content("channels") == {"1": f"_{text}"}


def test_a_name_must_fit_into_the_name_of_a_file():
    """200 bytes leave room for the suffix, and for what a file has beside its name while it is written."""
    assert is_name("a" * 200) and is_name("\u65e5" * 66)
    assert not is_name("a" * 201) and not is_name("\u65e5" * 67) and not is_name("a\nb") and not is_name(" ")
