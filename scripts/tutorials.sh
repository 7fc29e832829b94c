#!/usr/bin/env bash
# Runs every tutorial from the top in smoke mode (CI is set) and leaves the committed outputs alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export CI=1 MPLBACKEND=agg
shopt -s nullglob
notebooks=(tutorials/*.ipynb)
if [ ${#notebooks[@]} = 0 ]; then
    echo "There is no notebook in tutorials/" >&2
    exit 1
fi
exec "${VENV:-.venv}/bin/python" -m pytest -c /dev/null --rootdir . -p no:cacheprovider -q \
    --nbmake --nbmake-timeout=300 --durations=0 "$@" "${notebooks[@]}"
