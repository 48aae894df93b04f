"""Settings and options of a wrong kind, out of range, misspelt, or larger than any machine."""

from __future__ import annotations

from tests.hostile.trials import POOL, REFUSED, RIGHT, SETTINGS, TEMPLATE, Place, Trial, leave

RUN = ("run", "{data}", "--output", "{out}", *SETTINGS)
# Each must be refused before any work.
BAD = {
    "seed": ["1.5", "-1", "abc", "null", "1e30", "[1]", "true", "9" * 400],
    "feature_voxels": ["0", "-5", "abc", "NaN", "1e300", "[2000]", "null", "Infinity"],
    "train_voxels": ["0", "-5", "abc", "NaN", "1e300", "null"],
    "feature_spacing": ["1e9", "0", "-1", "abc", "NaN", "[1, 2]"],
    "num_classes": ["abc", "0", "1", "-1", "1000000000", "2.5", "[3]", "NaN"],
    "num_rounds": ["-1", "1.5", "abc", "[1]", "null", "1e300"],
    "max_iterations": ["0", "-1", "1.5", "abc", "null"],
    "iterations_per_epoch": ["0", "-1", "abc", "0.5"],
    "patch_size": ["[8]", "abc", "[0, 0, 0]", "[-8, 8, 8]", "[8.5, 8, 8]", "null"],
    "labeled_num": ["-1", "0", "abc", "1.5", "null", "1000"],
    "spacing": ["0", "-1", "abc", "[1, 2]", "NaN", "[1, 2, 3, 4]"],
    "knn_k": ["0", "-1", "abc", "1.5"],
    "learning_rate": ["NaN", "-1", "abc", "Infinity", "[]"],
    "threads": ["0", "-1", "abc", "1.5"],
    "cache_num": ["-1", "abc"],
    "checkpoint_seconds": ["-1", "abc", "NaN"],
    "uncertainty_quantile": ["-0.5", "2", "abc", "NaN"],
    "label_fusion": ["5", "abc", "[]"],
    "split": ["nowhere", "5", "[]", "../pool"],
    "template": ["5", "nobody", "[5]", '{"a": 1}'],
    "image_key": ["5", "[]"],
    "device": ["abc", "cuda:99", "-1", "5", "[]"],
    "pool_batch": ["-1", "abc", "1.5"],
    "metric_definition": ["abc", "5"],
    "feature_dtype": ["int8", "abc", "5"],
    "feature_overlap": ["-1", "1", "abc"],
    "most_rounds": ["0", "-1", "abc"],
    "pseudonyms": ["5", '["a"]'],
}
MISSPELT = [
    "max_iteration=5", "Seed=1", "train#optimizr#lr=1", "train#optimizer#nothing=1", "windows#modus=1", "a#b#c=1", "a=",
    "=5", "=", "seed", "#=1", "seed#=1", "##=1", "preset=paper", "seed#0=1", "$seed=1", "@seed=1", "_target_=os.system",
    f"{'n' * 5000}=1", "seed=" + "[" * 50_000,
]  # fmt: skip
OPTIONS = {
    "seed_negative": [*RUN, "--seed", "-1"],
    "seed_text": [*RUN, "--seed", "abc"],
    "rounds_negative": [*RUN, "--rounds", "-1"],
    "rounds_fraction": [*RUN, "--rounds", "1.5"],
    "rounds_superscript": [*RUN, "--rounds", "²"],
    "device": [*RUN[:-1], "--device", "toaster"],
    "device_cuda_99": ["validate", "{data}", "--device", "cuda:99", "--preset", "nothing"],
    "preset": [*RUN, "--preset", "nothing"],
    "method": [*RUN, "--method", "nothing"],
    "method_path": [*RUN, "--method", "../presets/quick"],
    "encoder": [*RUN, "--encoder", "nothing"],
    "refinement": [*RUN, "--refinement", "nothing"],
    "split": ["propagate", "{data}", "--output", "{out}", "--split", "train"],
    "top_negative": ["suggest-template", "{data}", "--top", "-1", "--output", "{out}"],
    "top_zero": ["suggest-template", "{data}", "--top", "0", "--output", "{out}"],
    "top_text": ["suggest-template", "{data}", "--top", "x", "--output", "{out}"],
    "spacing_negative": ["suggest-template", "{data}", "--spacing", "-1", "--output", "{out}"],
    "spacing_nan": ["suggest-template", "{data}", "--spacing", "nan", "--output", "{out}"],
    "spacing_two": ["suggest-template", "{data}", "--spacing", "1", "2", "--output", "{out}"],
    "suggest_seed": ["suggest-template", "{data}", "--seed", "-1", "--output", "{out}"],
    "given_all": ["suggest-template", "{data}", "--output", "{out}", "--given", TEMPLATE, POOL, "phantom_02"],
    "cases_negative": ["demo-data", "{out}", "--cases", "-5"],
    "cases_two": ["demo-data", "{out}", "--cases", "2"],
    "cases_many": ["demo-data", "{out}", "--cases", "1000000000000"],
    "demo_seed": ["demo-data", "{out}", "--cases", "3", "--seed", "-1"],
    "restart": [*RUN, "--restart-from", "round_0"],
    "restart_round": [*RUN, "--restart-from", "round_99999999999999999999"],
    "no_command": [],
    "unknown_command": ["destroy"],
    "unknown_option": [*RUN, "--force"],
    "no_output": ["run", "{data}"],
    "no_data": ["validate", "{root}/nowhere"],
    "data_empty_text": ["validate", ""],
    "data_file": ["validate", "{image}"],
    "data_nul": ["validate", "a\0b"],
    "data_long": ["validate", "/" + "n" * 5000],
    "output_nul": ["predict", "{image}", "--run", "{run}", "--output", "a\0b"],
    "images_none": ["predict", "--run", "{run}", "--output", "{out}"],
    "images_twice": ["predict", "{image}", "{image}", "--run", "{run}", "--output", "{out}"],
    "image_folder": ["predict", "{data}", "--run", "{run}", "--output", "{out}"],
    "run_nowhere": ["predict", "{image}", "--run", "{root}/nowhere", "--output", "{out}"],
    "run_file": ["predict", "{image}", "--run", "{image}", "--output", "{out}"],
    "evaluate_nowhere": ["evaluate", "{root}/nowhere", "{data}"],
    "evaluate_swapped": ["evaluate", "{data}", "{run}"],
    "test_list": ["test", "{data}", "--run", "{run}", "--test-list", "/etc/passwd"],
    "test_list_above": ["test", "{data}", "--run", "{run}", "--test-list", "../../../../etc/passwd"],
    "test_list_fifo": ["test", "{data}", "--run", "{run}", "--test-list", "/dev/zero"],
    "test_list_nul": ["test", "{data}", "--run", "{run}", "--test-list", "a\0"],
}
MAY_BE_RIGHT = ("given_all", "image_folder")


def with_root(place: Place) -> None:
    place.words["root"] = str(place.root)


def all_values() -> list[Trial]:
    """Every value of every setting."""

    def trial(id: str, number: int, value: str) -> Trial:
        def spoil(place: Place) -> None:
            place.words["value"] = value

        return Trial("settings", f"{id}_{number}", spoil, (*RUN, "--set", f"{id}={{value}}"), (REFUSED,), early=True)

    return [trial(id, number, value) for id, values in BAD.items() for number, value in enumerate(values)]


TRIALS = [
    *all_values(),
    *(
        Trial("settings", f"misspelt_{number}", leave, (*RUN, "--set", text), (REFUSED,), early=True)
        for number, text in enumerate(MISSPELT)
    ),
    *(
        Trial(
            "settings",
            f"option_{name}",
            with_root,
            command,
            (REFUSED, RIGHT) if name in MAY_BE_RIGHT else (REFUSED,),
        )
        for name, command in OPTIONS.items()
    ),
]
