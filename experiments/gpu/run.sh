#!/usr/bin/env bash
# Everything that wants a GPU, in under 9 minutes on one H100 or H200, in order of importance:
#
#   experiments/gpu/run.sh [--tiny] [--out DIR] [--parts start,squad,...]
#
# --tiny runs the same on a CPU with the demo's model, to try the script. It leaves DIR/results.json, DIR/results.md and a
# log per part. A part that fails or takes too long is recorded, and the next one starts.
#
# On a machine without a network, KIT names a folder that experiments/gpu/prepare.sh filled (wheels, tokenizer, peers).
# What it has is used; without it, the tokenizer is the demo's and the peers are only those that need no environment.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-python3}
[ -n "${PYTHON:-}" ] || [ ! -x "$root/.venv/bin/python" ] || python=$root/.venv/bin/python
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

if [ -n "${KIT:-}" ]; then
  [ -d "$KIT" ] || { echo "error: KIT=$KIT: there is no such folder; experiments/gpu/prepare.sh FOLDER makes it" >&2; exit 1; }
  KIT=$(cd "$KIT" && pwd)
  # not in /tmp, where another user could plant code
  installed=${KIT_INSTALLED:-${XDG_CACHE_HOME:-$HOME/.cache}/sftlab/kit}
  if [ -d "$KIT/wheels" ] && [ ! -d "$installed/site" ]; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$installed/site" "$KIT"/wheels/*.whl
  fi
  if [ -d "$KIT/peers" ] && [ ! -d "$installed/peers" ]; then
    WHEELS=$KIT/peers PYTHON=$python "$root/experiments/peers/build.sh" "$installed/peers"
  fi
  [ ! -d "$installed/site" ] || export PYTHONPATH=$PYTHONPATH:$installed/site
  [ ! -d "$installed/peers" ] || set -- --peers "$installed/peers" "$@"
  [ ! -d "$KIT/tokenizer" ] || set -- --tokenizer "$KIT/tokenizer" "$@"
fi
exec "$python" -m experiments.gpu.run "$@"
