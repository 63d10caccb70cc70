#!/usr/bin/env bash
# Trains on a slice of Cloud TPU VMs: creates it or uses it, installs this commit on all of its hosts, starts, follows
# the log, and starts again after a preemption, until there is a result.
#
#   ./run.sh pod --name=SLICE --project=PROJECT --zone=ZONE --accelerator=TYPE --version=RUNTIME --workdir=DIR
#       [--spot] [--setup=COMMAND] [--dry-run] -- --config=FILE.py:VARIANT [flags of the trainer]
#
#   --accelerator  such as v5litepod-16; --version is the runtime that it needs
#   --workdir      a folder that all hosts see: a mounted bucket or file store
#   --setup        run on each host before installing, such as mounting that folder or installing Python 3.11
#   --spot         may be preempted, and costs less
#   --dry-run      print the commands and run none

# shellcheck disable=SC2016 # what is quoted is for the shells of the hosts
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
read_flags "name project zone accelerator version workdir spot setup" "$@"
need name project zone accelerator version workdir
need_config

tpu() { # tpu VERB ARGUMENTS
  local verb=$1
  shift
  run gcloud compute tpus tpu-vm "$verb" "${flag[name]}" --project="${flag[project]}" --zone="${flag[zone]}" "$@"
}
on() { tpu ssh --worker="$1" --command="$2"; } # on WORKER|all COMMAND

state() {
  gcloud compute tpus tpu-vm describe "${flag[name]}" --project="${flag[project]}" --zone="${flag[zone]}" \
    --format='value(state)' 2>/dev/null || true
}

create() {
  tpu create --accelerator-type="${flag[accelerator]}" --version="${flag[version]}" ${flag[spot]:+--spot}
}

install() {
  run git archive --prefix=vit_scaling/ --output=/tmp/vit_scaling.tar.gz HEAD
  run gcloud compute tpus tpu-vm scp /tmp/vit_scaling.tar.gz "${flag[name]}:vit_scaling.tar.gz" \
    --project="${flag[project]}" --zone="${flag[zone]}" --worker=all
  on all "tar -xzf vit_scaling.tar.gz${flag[setup]:+ && ${flag[setup]}} && vit_scaling/run.sh install tpu"
}

# On every host; what still runs there from an earlier start is stopped by host.sh.
start() {
  local command
  command="launch/host.sh $(quoted "${flag[workdir]}" "${train[@]}")"
  on all "cd vit_scaling && { mv -f host.pid previous.pid; setsid nohup $command >host.log 2>&1 </dev/null & echo \"\$!\" >host.pid; }"
}

# Until the run on the first host ends, or the host goes away.
follow() { on 0 'tail --lines=+1 --follow --pid="$(cat vit_scaling/host.pid)" vit_scaling/host.log'; }
running() { on 0 'kill -0 "$(cat vit_scaling/host.pid)"' 2>/dev/null; }
finished() { on 0 "test -e $(quoted "${flag[workdir]}/result.json")"; }

if [ -n "${flag[dry-run]:-}" ]; then
  echo '#!/usr/bin/env bash'
  echo '# shellcheck disable=SC1003,SC2016 # what is quoted is for the shells of the hosts'
  echo '# Unless the slice exists:'
  create
  echo '# Then, and again after each preemption:'
  install
  start
  follow
  echo '# Until this succeeds:'
  finished
  exit 0
fi

while true; do
  case $(state) in
  READY) say "using ${flag[name]}" ;;
  "")
    say "creating ${flag[name]}"
    create
    ;;
  PREEMPTED | TERMINATED | STOPPED)
    say "${flag[name]} was preempted: making it anew"
    tpu delete --quiet
    create
    ;;
  *)
    say "${flag[name]} is $(state); looking again in a minute"
    sleep 60
    continue
    ;;
  esac
  if running || { install && start; }; then
    follow || true
    if finished; then break; fi
  fi
  say "no result yet; going on in a minute"
  sleep 60
done
say "finished: ${flag[workdir]}"
