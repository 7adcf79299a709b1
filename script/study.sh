#!/usr/bin/env bash
# Runs the study that a grid describes: every method and seed, then the tables with their intervals.
#
#   bash script/study.sh quickstart                       a grid of the package, or any FILE.json
#   bash script/study.sh textclass --check                check every job and print the plan; start nothing
#   bash script/study.sh textclass --only LoRA,MTL-LoRA   some of its experiments
#
# After a kill or a failure the same command resumes. Everything it writes is under output/study/<name>/. docs/study.md
# describes grids; a grid says what it needs and how long it takes.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if [ $# -lt 1 ]; then echo "usage: bash $0 GRID [flags of mtl-lora study]" >&2; exit 2; fi
case "$1" in
    -*) ;;
    *)  # the package's grids use paths relative to the project's folder
        [ -f "$1" ] || cd "${project:-.}"
        set -- --grid "$@"
        ;;
esac
python -m mtl_lora study "$@"
