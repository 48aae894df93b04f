#!/usr/bin/env bash
# The table of the paper: four methods trained by the published recipe, then the published test of each.
#
#   benchmarks/la_gpu.sh DIR OUT WEIGHTS [ITERATIONS] [ROUNDS] [ID=VALUE ...]
#
# DIR      the data as published: data/<case>.h5, train.txt, val.txt, test.txt
# OUT      a run folder for each method, its test in OUT/<method>/test, and OUT/table.txt
# WEIGHTS  sam_med3d_turbo.pth
# ITERATIONS of a round (15000), ROUNDS (3), and any other settings of `semisam-o1 run`
#
# Killed, it goes on where it was when the same command is given again.
set -euo pipefail
if [ $# -lt 3 ]; then sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 2; fi
dir=$1 out=$2 weights=$3 iterations=${4:-15000} rounds=${5:-3}
shift "$(($# < 5 ? $# : 5))"
settings=("pretrained_ckpt=$weights" "max_iterations=$iterations" "$@")

mkdir -p "$out"
for method in mt uamt dan dtc; do
    run=$out/$method
    if [ ! -f "$run/test/test.csv" ]; then
        if [ ! -d "$run" ] && [ -d "$out/mt/features" ]; then  # they are the same for every method
            mkdir -p "$run"
            cp -r "$out/mt/features" "$run/"
        fi
        semisam-o1 run "$dir" --output "$run" --preset paper --method "$method" --rounds "$rounds" \
            --set "${settings[@]}"
        semisam-o1 test "$dir" --run "$run" --save-pred "$run/test" > "$run/test.txt"
    fi
done
for method in mt uamt dan dtc; do
    printf '%s\n' "$method"
    grep -e '^round ' -e '^  [A-Z]' "$out/$method/test.txt"
done > "$out/table.txt"
cat "$out/table.txt"
