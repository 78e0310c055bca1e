#!/usr/bin/env bash
# Install each peer into a folder of its own:
#
#   experiments/peers/build.sh FOLDER [PEER ...]                       all peers, or trl, automodel
#   WHEELS=wheels experiments/peers/build.sh FOLDER                    from wheels, without a network
#   PYTHON=.venv/bin/python experiments/peers/build.sh FOLDER          for this interpreter
#   experiments/peers/build.sh --wheels wheels                         fetch the wheels for the line above
#
# A peer's folder goes before the packages of the interpreter that runs sftlab, so every side uses the same torch. Nothing
# is resolved (--no-deps): the requirements files are complete, and no peer can pull another torch or CUDA packages.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
fail() { echo "error: $1" >&2; exit 1; }

if [ "${1:-}" = --wheels ]; then
  [ $# = 2 ] || fail "usage: build.sh --wheels FOLDER"
  for peer in trl automodel; do
    "$python" -m pip download --quiet --no-deps --only-binary=:all: -d "$2/$peer" -r "$here/$peer.txt"
  done
  exit
fi
[ $# -ge 1 ] || fail "usage: build.sh FOLDER [trl] [automodel]"
folder=$1
shift
[ $# -gt 0 ] || set -- trl automodel
for peer in "$@"; do
  [ -f "$here/$peer.txt" ] || fail "$peer: no such peer; the peers with an environment are trl and automodel"
  offline=()
  if [ -n "${WHEELS:-}" ]; then
    [ -d "$WHEELS/$peer" ] || fail "WHEELS=$WHEELS: there is no folder $peer in it; build.sh --wheels makes it"
    offline=(--no-index --find-links "$WHEELS/$peer")
  fi
  rm -rf "${folder:?}/$peer"
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps "${offline[@]}" \
    --target "$folder/$peer" -r "$here/$peer.txt"
  echo "$peer: $folder/$peer"
done
