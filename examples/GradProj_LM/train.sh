#!/bin/sh
# Hands its arguments to main.py. LAUNCHER replaces `python`, e.g. LAUNCHER="torchrun --nproc_per_node 2".
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd) && PATH="$here/../../.venv/bin:$PATH"
exec ${LAUNCHER:-python} "$here/main.py" "$@"
