#!/usr/bin/env bash
# Runs a whole study by its grid: every method and seed, then the table with its intervals.
#
#   bash script/study.sh quickstart                       script/grids/quickstart.json, or any FILE.json
#   bash script/study.sh textclass --check True           every recipe is checked, the plan printed, nothing started
#   bash script/study.sh textclass --only LoRA,MTL-LoRA   a part of it
#
# Killed or failed, the same command goes on where it was. Everything it makes lies under output/study/<name>/;
# docs/study.md says what a grid may hold, and the grid what it needs and how long it takes.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if [ $# -lt 1 ]; then echo "usage: bash $0 GRID [flags of python -m mtl_lora.study]" >&2; exit 2; fi
case "$1" in
    -*) ;;
    *.json) set -- --grid "$@" ;;
    *) set -- --grid "script/grids/$1.json" "${@:2}" ;;
esac
python -m mtl_lora.study "$@"
