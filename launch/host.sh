#!/usr/bin/env bash
# Trains on this host, with the others of its slice, until there is a result: host.sh WORKDIR FLAGS OF THE TRAINER.
# Whatever ends the trainer, all its processes end, and all begin again at the newest checkpoint.

set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
workdir=$1
shift

# What an earlier start left running here saves, or is killed. Signals go to whole groups, so that the trainer gets one.
if previous=$(cat previous.pid 2>/dev/null) && kill -TERM -- "-$previous" 2>/dev/null; then
  timeout 300 tail --pid="$previous" --follow /dev/null
  kill -KILL -- "-$previous" 2>/dev/null
fi

stopped=
trap 'stopped=yes' TERM INT
for attempt in {1..100}; do
  .venv/bin/python -m vit_scaling.train --workdir="$workdir" "$@" &
  trainer=$!
  wait "$trainer"
  code=$?
  if [ -n "$stopped" ]; then
    wait "$trainer" # it had the signal too, and saves
    exit 143
  fi
  [ ! -e "$workdir/result.json" ] || exit 0
  # 2: the trainer has said what is wrong with its flags, its data or its workdir; it would say so again.
  [ "$code" -ne 2 ] || exit 2
  echo "attempt $attempt ended with code $code; the next begins in 10 s" >&2
  sleep 10
done
exit 1
