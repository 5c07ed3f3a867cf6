#!/bin/sh
# What an installed wheel does away from the checkout: sh tests/wheel.sh FOLDER_OF_THE_ENVIRONMENT/bin
set -eu
bin=$1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
unset PYTHONPATH

"$bin/luthier" --version
"$bin/python" -c '
import luthier, pathlib, sys
home = pathlib.Path(luthier.__file__).parent
assert pathlib.Path(sys.prefix).resolve() in home.resolve().parents, f"{home} is not the wheel"
assert (home / "py.typed").is_file()
'
"$bin/luthier" methods --kind tuner --json > methods.json
"$bin/luthier" completion bash > completion.sh && grep -q _LUTHIER_COMPLETE completion.sh
run=$("$bin/luthier" tune --quiet --model toy:lm-small --data toy:topic/train --output-dir run max_steps=2 \
  'evaluate=[loss]' dtype=float32)
test -f "$run/report.html"
"$bin/luthier" chat "$run" --prompt "Once" --max-new-tokens 4
"$bin/luthier" export "$run" --as merged --output-dir merged
test -f merged/model.safetensors
echo "the wheel works"
