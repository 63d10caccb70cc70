#!/usr/bin/env bash
# Trains on one or several slices of Cloud TPU VMs: creates them or uses them, installs this commit on all hosts, starts,
# follows the log, and starts again after a preemption, until the run is finished or the trainer refuses what it was
# given.
#
#   ./run.sh pod --name=SLICE --project=PROJECT --zone=ZONE
#       --accelerator=TYPE --version=RUNTIME --workdir=DIR [--spot]
#       [--queued] [--slices=N] [--delete] [--price-per-chip-hour=P]
#       [--setup=COMMAND] [--dry-run]
#       -- --config=FILE.py:VARIANT [flags of the trainer]
#
#   --accelerator  Google's name such as v5litepod-16, or that of the plan such
#                  as v5e:4x4
#   --version      the runtime that the accelerator needs
#   --workdir      a folder that all hosts see: gs://BUCKET/PATH, a mounted
#                  bucket or a file store
#   --setup        run on each host before installing, such as mounting that
#                  folder or installing Python 3.11
#   --spot         may be preempted, and costs less
#   --queued       ask for a queued resource, which waits until there is capacity
#   --slices       slices of one run, joined by the data-center network; more
#                  than one are a queued resource, with --config.mesh.replica=N
#   --delete       delete the slices once the run has ended
#   --price-per-chip-hour  price in any currency, to say what an hour costs
#   --dry-run      print the commands and run none
#
# Ctrl-C here ends the watching and not the run; the same command watches again. The slices cost money until they are
# deleted, also when the run is finished or has failed; the last lines say how to stop the run and delete them.

# shellcheck disable=SC2016 # what is quoted is for the shells of the hosts
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
read_flags "name project zone accelerator version workdir spot setup queued slices delete price-per-chip-hour" "$@"
need name project zone accelerator version workdir
need_config
name=${flag[name]} slices=${flag[slices]:-1} queued=${flag[queued]:-} price=${flag[price-per-chip-hour]:-}
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices is $slices; it must be a number of slices, 1 or more"
[[ $price =~ ^([0-9]+\.?[0-9]*)?$ ]] || fail "--price-per-chip-hour is $price; it must be a number"

case ${flag[accelerator]} in
*:*) # a machine of the plan: NAME:SHAPE
  [[ ${flag[accelerator]} =~ ^(v2|v3|v4|v5e|v5p|v6e):([0-9]+x[0-9]+(x[0-9]+)?)$ ]] ||
    fail "--accelerator is ${flag[accelerator]}; write v5litepod-16, or NAME:SHAPE such as v5e:4x4 with v2, v3, v4, v5e, v5p or v6e"
  machine=(--type="${BASH_REMATCH[1]/v5e/v5litepod}" --topology="${BASH_REMATCH[2]}")
  chips=$((slices * ${BASH_REMATCH[2]//x/ * }))
  ;;
*) # Google's name, which counts chips, or TensorCores of which a chip has two
  [[ ${flag[accelerator]} =~ ^(v2|v3|v4|v5litepod|v5p|v6e)-([1-9][0-9]*)$ ]] ||
    fail "--accelerator is ${flag[accelerator]}; write TYPE-NUMBER such as v5litepod-16, or NAME:SHAPE such as v5e:4x4"
  machine=(--accelerator-type="${flag[accelerator]}")
  case ${BASH_REMATCH[1]} in
  v5litepod | v6e) chips=$((slices * BASH_REMATCH[2])) ;;
  *) chips=$((slices * BASH_REMATCH[2] / 2)) ;;
  esac
  ;;
esac

place=(--project="${flag[project]}" --zone="${flag[zone]}")
nodes=("$name")
if [ "$slices" -gt 1 ]; then
  queued=yes nodes=()
  for ((node = 0; node < slices; node++)); do nodes+=("$name-$node"); done
  [[ "${train[*]}" == *--config.mesh.replica* ]] || train+=("--config.mesh.replica=$slices")
fi

gcloud_tpus() { # gcloud_tpus KIND VERB NAME ARGUMENTS
  run gcloud compute tpus "$1" "$2" "$3" "${place[@]}" "${@:4}"
}
on_first() { gcloud_tpus tpu-vm ssh "${nodes[0]}" --worker=0 --command="$1"; } # on_first COMMAND
on_all() { # on_all COMMAND: on all hosts of all slices at a time
  local node job code=0 jobs=()
  for node in "${nodes[@]}"; do
    if [ -n "${flag[dry-run]:-}" ]; then
      gcloud_tpus tpu-vm ssh "$node" --worker=all --command="$1"
    else
      gcloud_tpus tpu-vm ssh "$node" --worker=all --command="$1" &
      jobs+=($!)
    fi
  done
  for job in "${jobs[@]}"; do wait "$job" || code=$?; done
  return "$code"
}

# What gcloud calls the slices as a whole: a TPU VM, or a queued resource, whose states differ.
if [ -n "$queued" ]; then
  kind=queued-resources version=(--runtime-version="${flag[version]}")
  if [ "$slices" -gt 1 ]; then version+=(--node-count="$slices" --node-prefix="$name"); else version+=(--node-id="$name"); fi
else
  kind=tpu-vm version=(--version="${flag[version]}")
fi
state() { gcloud_tpus $kind describe "$name" --format="value(state${queued:+.state})" 2>/dev/null || true; }
create() { gcloud_tpus $kind create "$name" "${machine[@]}" "${version[@]}" ${flag[spot]:+--spot}; }
delete() { gcloud_tpus $kind delete "$name" ${queued:+--force} "$@"; }

install() {
  local node extras=tpu
  [[ ${flag[workdir]} != gs://* ]] || extras=tpu,gcs
  run git archive --prefix=vit_scaling/ --output=/tmp/vit_scaling.tar.gz HEAD || return
  for node in "${nodes[@]}"; do
    run gcloud compute tpus tpu-vm scp /tmp/vit_scaling.tar.gz "$node:vit_scaling.tar.gz" "${place[@]}" --worker=all || return
  done
  on_all "tar -xzf vit_scaling.tar.gz${flag[setup]:+ && ${flag[setup]}} && vit_scaling/run.sh install $extras"
}

# On every host; host.sh stops what an earlier start left running there.
start() {
  local command
  command="launch/host.sh $(quoted "${flag[workdir]}" "${train[@]}")"
  on_all "cd vit_scaling && { mv -f host.pid previous.pid; setsid nohup $command >host.log 2>&1 </dev/null & echo \"\$!\" >host.pid; }"
}

# Until the run on the first host ends, or the host goes away.
follow() { on_first 'tail --lines=+1 --follow --pid="$(cat vit_scaling/host.pid)" vit_scaling/host.log'; }
running() { on_first 'kill -0 "$(cat vit_scaling/host.pid)"' 2>/dev/null; }
ended_with() { on_first 'cat vit_scaling/host.code' 2>/dev/null || true; }

costs() {
  local costs="costs money" stop='kill -TERM -- "-$(cat vit_scaling/host.pid)"'
  [ -z "$price" ] || costs="costs $(awk "BEGIN { printf \"%.2f\", $price * $chips }") an hour ($chips chips)"
  say "the slice $name $costs until it is deleted; the same command goes on; stop a run on it, and delete it, with:"
  quoted gcloud compute tpus tpu-vm ssh "${nodes[0]}" "${place[@]}" --worker=all --command="$stop" >&2
  quoted gcloud compute tpus $kind delete "$name" "${place[@]}" ${queued:+--force} >&2
}

if [ -n "${flag[dry-run]:-}" ]; then
  echo '#!/usr/bin/env bash'
  echo '# shellcheck disable=SC1003,SC2016 # what is quoted is for the shells of the hosts'
  echo '# Unless the slice exists:'
  create
  [ -z "$queued" ] || echo '# Once the queued resource is ACTIVE:'
  echo '# Then, and again after each preemption:'
  install
  start
  follow
  echo '# Until this says 0 (finished) or 2 (the trainer refused what it was given):'
  ended_with
  echo '# The slice costs money until this:'
  delete
  exit 0
fi

or_wait="; with --queued the request waits until there is capacity"
[ -z "$queued" ] || or_wait=
there= # whether there are slices, which cost money
ended= # whether the run on them has ended, so that they may be deleted
at_end() {
  local code=$?
  [ -n "$there" ] || exit "$code"
  if [ -n "${flag[delete]:-}" ] && [ -n "$ended" ]; then
    if delete --quiet; then
      say "deleted $name"
      exit "$code"
    fi
    say "$name could not be deleted, as gcloud says above"
    [ "$code" -ne 0 ] || code=1
  fi
  costs
  exit "$code"
}
trap at_end EXIT

seen=
while true; do
  began=$SECONDS
  found=$(state)
  case $found in
  READY | ACTIVE)
    say "using $name"
    there=yes
    ;;
  "" | PREEMPTED | TERMINATED | STOPPED | SUSPENDED)
    if [ -n "$found" ]; then
      say "$name was preempted: creating it again"
      delete --quiet
      there='' seen=preempted
    else
      say "creating $name"
    fi
    if ! create; then
      [ -n "$seen" ] || fail "gcloud did not create $name, as it says above$or_wait"
      pause_after "$((SECONDS - began))" || fail "given up after 10 attempts in a row to create $name"
      continue
    fi
    there=yes seen=created
    [ -z "$queued" ] || continue
    ;;
  FAILED) fail "the request for $name failed; gcloud compute tpus $kind describe $name says why" ;;
  *)
    [ "$seen" = "$found" ] || say "$name is $found; looking again each minute"
    there=yes seen=$found
    sleep 60
    continue
    ;;
  esac
  if running || { install && start; }; then
    follow || true
    code=$(ended_with)
    [[ $code != [012] ]] || ended=yes
    case $code in
    0) break ;;
    1) fail "the trainer was given up after 10 short attempts in a row; its log is above" ;;
    2) fail "the trainer refused its flags, data or workdir, as its log says above; nothing is started again" ;;
    esac
  fi
  say "the run is not finished"
  pause_after "$((SECONDS - began))" || fail "given up after 10 attempts in a row of less than 10 minutes"
done
say "finished: ${flag[workdir]}"
