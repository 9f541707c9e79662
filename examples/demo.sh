#!/usr/bin/env bash
# The main job on a small trained Llama (6.8 M weights, 13.6 MB): plan, pack, measure, generate.
set -euo pipefail
cd "$(dirname "$0")/.."
model=examples/ref-llama
out=demo-out
rm -rf "$out" && mkdir "$out"
run() { printf '\n$ waterfill %s\n' "$*"; waterfill "$@"; }

run plan "$model" --size 3MB --save "$out/plan.json"
run pack "$model" "$out/packed" --plan "$out/plan.json"
run inspect "$out/packed"
text=$(python -c "import argparse; print(argparse.__file__)")  # Python source, as the model was trained on
run eval "$out/packed" --against "$model" --text "$text" --context 512 --windows 24
run report "$out/packed" --original "$model" --text "$text" --context 512 --windows 24 --prompt "def read_file(path):"
run generate "$out/packed" --prompt "def read_file(path):" --max-new-tokens 64 --seed 1
