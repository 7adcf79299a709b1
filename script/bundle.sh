#!/usr/bin/env bash
# Packs what a machine without network needs into parts of a fixed size, which script/unbundle.sh unpacks there: the
# project, the wheels that the machine's image lacks, embedded base models and the prepared data (docs/offline.md).
#
#   bash script/bundle.sh OUT [--part_mb 50] [--only language] [--models smollm2-135m,minilm-l6]
#       [--have FILE] [--data DIR [--allow_partial]]
#
# Needs git, the network (pip) and 500 MB of disk while it runs. Takes about two minutes. --help lists the flags.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
PYTHONPATH="${project:-$PWD/}src${PYTHONPATH:+:$PYTHONPATH}" exec python "${project}script/bundle.py" "$@"
