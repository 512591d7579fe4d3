#!/bin/sh
# Hands its arguments to main.py. LAUNCHER replaces `python`, e.g. LAUNCHER="nice -n 10 python".
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd) && PATH="$here/../../.venv/bin:$PATH"
exec ${LAUNCHER:-python} "$here/main.py" "$@"
