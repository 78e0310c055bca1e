#!/usr/bin/env bash
# Fill a folder with what run.sh needs on a GPU machine that has Python, torch and transformers, and no network:
#
#   experiments/gpu/prepare.sh FOLDER [TOKENIZER]
#
# TOKENIZER is a folder with a tokenizer in Hugging Face form, such as that of meta-llama/Llama-3.2-1B. Take FOLDER and
# this checkout there, and run: KIT=FOLDER experiments/gpu/run.sh. PYTHON_VERSION is that machine's (3.12).
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: prepare.sh FOLDER [TOKENIZER]" >&2; exit 1; }
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
mkdir -p "$1"
folder=$(cd "$1" && pwd)
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
  platforms+=(--platform "${tag}_x86_64")
done
fetch() { # FOLDER, then what to fetch
  local to=$1
  shift
  "$python" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp \
    --python-version "${PYTHON_VERSION:-3.12}" "${platforms[@]}" -d "$to" "$@"
}
fetch "$folder/wheels" -c "$root/constraints.txt" hydra-core omegaconf submitit datasets dill multiprocess
# antlr4 has no wheel of the version that Hydra wants, so one is built.
"$python" -m pip wheel --quiet --no-deps -w "$folder/wheels" -c "$root/constraints.txt" antlr4-python3-runtime
for peer in trl automodel; do
  fetch "$folder/peers/$peer" -r "$root/experiments/peers/$peer.txt"
done
if [ $# -ge 2 ]; then
  [ -f "$2/tokenizer_config.json" ] || { echo "error: $2 has no tokenizer_config.json" >&2; exit 1; }
  rm -rf "$folder/tokenizer"
  cp -rL "$2" "$folder/tokenizer"
fi
du -sh "$folder"
