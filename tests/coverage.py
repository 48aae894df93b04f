"""Coverage by file, after `make test`: python -m tests.coverage [--report-only].

A file below LEAST percent fails, unless coverage.txt beside this module says why, in a line "FILE: reason".
"""

import io
import json
import sys
import tempfile
from pathlib import Path

import coverage

LEAST = 80.0
ROOT = Path(__file__).resolve().parents[1]


def reasons(text: str) -> dict[str, str]:
    """File -> why it may be below LEAST."""
    lines = (line.partition(": ") for line in text.splitlines() if line and not line.startswith("#"))
    return {file: reason.strip() for file, _, reason in lines}


def below(percentages: dict[str, float], known: dict[str, str]) -> list[str]:
    """A sentence for each file below LEAST that no reason speaks for."""
    low = {file: value for file, value in percentages.items() if value < LEAST and not known.get(file)}
    return [f"{file}: {value:.0f}% covered, expected {LEAST:.0f}%" for file, value in sorted(low.items())]


def main(report_only: bool) -> int:
    data = coverage.Coverage(config_file=str(ROOT / "pyproject.toml"))
    data.combine() if list(ROOT.glob(".coverage.*")) else data.load()
    data.report(file=sys.stdout, skip_empty=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "coverage.json"
        sys.stdout, shown = io.StringIO(), sys.stdout
        data.json_report(outfile=str(path))
        sys.stdout = shown
        files = json.loads(path.read_text())["files"]
    found = below(
        {name: entry["summary"]["percent_covered"] for name, entry in files.items()},
        reasons((ROOT / "tests" / "coverage.txt").read_text()),
    )
    print("\n".join(found))
    return int(bool(found) and not report_only)


if __name__ == "__main__":
    sys.exit(main("--report-only" in sys.argv))
