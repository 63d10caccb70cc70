#!/usr/bin/env bash
# Trains on a slice of Cloud TPU VMs: creates it or uses it, installs this commit on all of its hosts, starts, follows
# the log, and starts again after a preemption, until the run is finished or the trainer refuses what it was given.
#
#   ./run.sh pod --name=SLICE --project=PROJECT --zone=ZONE
#       --accelerator=TYPE --version=RUNTIME --workdir=DIR [--spot]
#       [--setup=COMMAND] [--dry-run]
#       -- --config=FILE.py:VARIANT [flags of the trainer]
#
#   --accelerator  Google's name such as v5litepod-16, or that of the plan such
#                  as v5e:4x4
#   --version      the runtime that the accelerator needs
#   --workdir      a folder that all hosts see: a mounted bucket or file store
#   --setup        run on each host before installing, such as mounting that
#                  folder or installing Python 3.11
#   --spot         may be preempted, and costs less
#   --dry-run      print the commands and run none
#
# Ctrl-C here ends the watching and not the run; the same command watches again. The slice costs money until it is
# deleted, also when the run is finished or has failed; the last line says how to stop the run and delete the slice.

# shellcheck disable=SC2016 # what is quoted is for the shells of the hosts
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
read_flags "name project zone accelerator version workdir spot setup" "$@"
need name project zone accelerator version workdir
need_config

case ${flag[accelerator]} in
*:*) # a machine of the plan: NAME:SHAPE
  [[ ${flag[accelerator]} =~ ^(v2|v3|v4|v5e|v5p|v6e):([0-9]+x[0-9]+(x[0-9]+)?)$ ]] ||
    fail "--accelerator is ${flag[accelerator]}; write v5litepod-16, or NAME:SHAPE such as v5e:4x4 with v2, v3, v4, v5e, v5p or v6e"
  machine=(--type="${BASH_REMATCH[1]/v5e/v5litepod}" --topology="${BASH_REMATCH[2]}")
  ;;
*) machine=(--accelerator-type="${flag[accelerator]}") ;;
esac
place=("${flag[name]}" --project="${flag[project]}" --zone="${flag[zone]}")

tpu() { # tpu VERB ARGUMENTS
  local verb=$1
  shift
  run gcloud compute tpus tpu-vm "$verb" "${place[@]}" "$@"
}
on() { tpu ssh --worker="$1" --command="$2"; } # on WORKER|all COMMAND

state() { gcloud compute tpus tpu-vm describe "${place[@]}" --format='value(state)' 2>/dev/null || true; }

create() { tpu create "${machine[@]}" --version="${flag[version]}" ${flag[spot]:+--spot}; }

install() {
  run git archive --prefix=vit_scaling/ --output=/tmp/vit_scaling.tar.gz HEAD
  run gcloud compute tpus tpu-vm scp /tmp/vit_scaling.tar.gz "${flag[name]}:vit_scaling.tar.gz" \
    --project="${flag[project]}" --zone="${flag[zone]}" --worker=all
  on all "tar -xzf vit_scaling.tar.gz${flag[setup]:+ && ${flag[setup]}} && vit_scaling/run.sh install tpu"
}

# On every host; host.sh stops what an earlier start left running there.
start() {
  local command
  command="launch/host.sh $(quoted "${flag[workdir]}" "${train[@]}")"
  on all "cd vit_scaling && { mv -f host.pid previous.pid; setsid nohup $command >host.log 2>&1 </dev/null & echo \"\$!\" >host.pid; }"
}

# Until the run on the first host ends, or the host goes away.
follow() { on 0 'tail --lines=+1 --follow --pid="$(cat vit_scaling/host.pid)" vit_scaling/host.log'; }
running() { on 0 'kill -0 "$(cat vit_scaling/host.pid)"' 2>/dev/null; }
ended_with() { on 0 'cat vit_scaling/host.code' 2>/dev/null || true; }

costs() {
  say "the slice ${flag[name]} costs money until it is deleted; stop a run on it, and delete it, with:"
  stop='kill -TERM -- "-$(cat vit_scaling/host.pid)"'
  quoted gcloud compute tpus tpu-vm ssh "${place[@]}" --worker=all --command="$stop" >&2
  quoted gcloud compute tpus tpu-vm delete "${place[@]}" >&2
}

if [ -n "${flag[dry-run]:-}" ]; then
  echo '#!/usr/bin/env bash'
  echo '# shellcheck disable=SC1003,SC2016 # what is quoted is for the shells of the hosts'
  echo '# Unless the slice exists:'
  create
  echo '# Then, and again after each preemption:'
  install
  start
  follow
  echo '# Until this says 0 (finished) or 2 (the trainer refused what it was given):'
  ended_with
  echo '# The slice costs money until this:'
  tpu delete
  exit 0
fi

while true; do
  began=$SECONDS
  case $(state) in
  READY) say "using ${flag[name]}" ;;
  "")
    say "creating ${flag[name]}"
    create
    ;;
  PREEMPTED | TERMINATED | STOPPED)
    say "${flag[name]} was preempted: creating it again"
    tpu delete --quiet
    create
    ;;
  *)
    say "${flag[name]} is $(state); looking again in a minute"
    sleep 60
    continue
    ;;
  esac
  trap costs EXIT
  if running || { install && start; }; then
    follow || true
    case $(ended_with) in
    0) break ;;
    1) fail "the trainer was given up after 10 short attempts in a row; its log is above" ;;
    2) fail "the trainer refused its flags, data or workdir, as its log says above; nothing is started again" ;;
    esac
  fi
  say "the run is not finished"
  pause_after "$((SECONDS - began))" || fail "given up after 10 attempts in a row of less than 10 minutes"
done
say "finished: ${flag[workdir]}"
