#!/usr/bin/env bash
# Trains on this host, together with the other hosts of its slice, until the run is finished: host.sh WORKDIR FLAGS OF
# THE TRAINER. Whatever ends the trainer ends all its processes, and all start again at the newest checkpoint.
# Exits, and writes to host.code: 0 finished; 1 given up; 2 the trainer refused what it was given; 143 stopped.

set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
# shellcheck source=launch/common.sh
source launch/common.sh
workdir=$1
shift
rm -f host.code
trap 'echo "$?" >host.code' EXIT

# A trainer that an earlier start left running here saves, or is killed. Signals go to its whole group.
if previous=$(cat previous.pid 2>/dev/null) && kill -TERM -- "-$previous" 2>/dev/null; then
  timeout 300 tail --pid="$previous" --follow /dev/null
  kill -KILL -- "-$previous" 2>/dev/null
  rm -f host.code
fi

stopped=
trap 'stopped=yes' TERM INT
while true; do
  began=$SECONDS
  .venv/bin/python -m vit_scaling.train --workdir="$workdir" "$@" &
  trainer=$!
  wait "$trainer"
  code=$?
  if [ -n "$stopped" ]; then
    wait "$trainer" # it received the signal too, and saves
    exit 143
  fi
  if eval "$(finished "$workdir")"; then exit 0; fi
  if [ "$code" -eq 2 ]; then
    say "the trainer refused its flags, data or workdir, as it says above; it is not started again"
    exit 2
  fi
  say "the trainer ended with code $code after $((SECONDS - began)) s"
  if ! pause_after "$((SECONDS - began))"; then
    say "given up after 10 attempts in a row of less than 10 minutes"
    exit 1
  fi
done
