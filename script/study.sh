#!/usr/bin/env bash
# Runs a whole study by its grid: every method and seed, then the tables with their intervals.
#
#   bash script/study.sh quickstart                       a grid of the package, or any FILE.json
#   bash script/study.sh textclass --check                checks every job, prints the plan, starts nothing
#   bash script/study.sh textclass --only LoRA,MTL-LoRA   a part of it
#
# Killed or failed, the same command resumes. Everything it makes lies under output/study/<name>/; docs/study.md says
# what a grid may hold, and the grid what it needs and how long it takes.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if [ $# -lt 1 ]; then echo "usage: bash $0 GRID [flags of mtl-lora study]" >&2; exit 2; fi
case "$1" in
    -*) ;;
    *)  # what the package's grids read is named from the project's folder
        [ -f "$1" ] || cd "${project:-.}"
        set -- --grid "$@"
        ;;
esac
python -m mtl_lora study "$@"
