"""``python -m benchmarks NAME ...``: measurements that do not belong in tests, with competitors in the same run."""

import argparse

from benchmarks import (
    corrected_runs,
    corrections,
    cropped,
    damaged,
    encoder,
    monai_label,
    neighbours,
    odd_files,
    perturbed,
    propagation,
    quality,
    rounds,
    store,
    suggested,
    turned,
)

MODULES = (
    propagation, quality, perturbed, turned, cropped, damaged, suggested, corrections, corrected_runs, monai_label,
    rounds, encoder, store, neighbours, odd_files,
)  # fmt: skip
BENCHMARKS = {module.__name__.rpartition(".")[2]: module for module in MODULES}


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    commands = parser.add_subparsers(metavar="NAME")
    for name, module in BENCHMARKS.items():
        command = commands.add_parser(name, help=module.__doc__.splitlines()[0])
        module.options(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args()
    if hasattr(options, "run"):
        options.run(options)
        return
    for name in BENCHMARKS:  # `make bench` without a name: all benchmarks, on synthetic data
        defaults = parser.parse_args([name])
        defaults.run(defaults)


if __name__ == "__main__":
    main()
