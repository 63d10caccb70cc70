#!/usr/bin/env bash
# Trains on a Slurm cluster: prints an sbatch script and submits it. Every node runs one process with all its GPUs.
# Before the time limit, and when it is preempted, the run saves; it is queued again until it is finished or the trainer
# refuses what it was given.
#
#   ./run.sh slurm --nodes=N --time=TIME --workdir=DIR [--name=NAME]
#       [--gpus-per-node=G] [--setup=COMMAND] [--dry-run]
#       [any option of sbatch, such as --partition=P, --account=A, --exclusive]
#       -- --config=FILE.py:VARIANT [flags of the trainer]
#
#   --workdir        a folder that all nodes see
#   --setup          run on the first node before the trainer, such as:
#                    module load cuda
#   --cpus-per-task  CPUs of each node (default: 8 for each GPU, or 8)
#   --dry-run        print the script and submit nothing
#
# Watch it with squeue --me and in the log, stop it with scancel JOB; the same command continues it.

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
read_flags "nodes time workdir name setup gpus-per-node cpus-per-task *" "$@"
need nodes time workdir
need_config
[[ ${flag[nodes]} =~ ^[1-9][0-9]*$ ]] || fail "--nodes is ${flag[nodes]}; it must be a number of nodes, 1 or more"
for name in ntasks ntasks-per-node signal requeue no-requeue open-mode array; do
  [ -z "${flag[$name]:-}" ] || fail "--$name is set by this launcher; leave it out"
done

script() {
  local name log tries
  log=$(basename "${flag[workdir]}").log
  tries=$(quoted "${log%.log}.tries")
  echo '#!/usr/bin/env bash'
  echo "#SBATCH --job-name=${flag[name]:-vit_scaling}"
  for name in "${given[@]}"; do
    case $name in
    name | workdir | setup | dry-run | output) ;;
    *) if [ "${flag[$name]}" = yes ]; then echo "#SBATCH --$name"; else echo "#SBATCH --$name=${flag[$name]}"; fi ;;
    esac
  done
  if [ -z "${flag[cpus-per-task]:-}${flag[cpus-per-gpu]:-}${flag[exclusive]:-}" ]; then
    [[ ${flag[gpus-per-node]:-1} =~ ([0-9]+)$ ]] || fail "--gpus-per-node is ${flag[gpus-per-node]}; it must end in a number"
    echo "#SBATCH --cpus-per-task=$((8 * BASH_REMATCH[1]))"
  fi
  cat <<TEXT
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=${flag[output]:-$log}

cd $(quoted "$PWD") || exit 1${flag[setup]:+
${flag[setup]}}
# srun does not take the number of CPUs from the job by itself.
srun --kill-on-bad-exit=1 --cpus-per-task="\${SLURM_CPUS_PER_TASK:-\$SLURM_CPUS_ON_NODE}" \\
  .venv/bin/python -m vit_scaling.train $(quoted "--workdir=${flag[workdir]}" "${train[@]}")
code=\$?
if $(finished "${flag[workdir]}"); then
  rm -f $tries
  exit 0
fi
if [ "\$code" -eq 2 ]; then
  echo "the trainer refused its flags, data or workdir, as it says above; the job is not queued again" >&2
  exit 2
fi
if [ "\$SECONDS" -ge 600 ]; then
  rm -f $tries
else
  echo >>$tries
  count=\$(wc -l <$tries)
  if [ "\$count" -ge 10 ]; then
    rm -f $tries
    echo "given up after 10 attempts in a row of less than 10 minutes" >&2
    exit 1
  fi
  sleep "\$((count * 10))"
fi
scontrol requeue "\$SLURM_JOB_ID"
TEXT
}

script=$(script)
printf '%s\n' "$script"
if [ -z "${flag[dry-run]:-}" ]; then
  command -v sbatch >/dev/null || fail "there is no sbatch here; call this on a login node, or with --dry-run"
  printf '%s\n' "$script" | sbatch
  say "watch it with squeue --me and in the log; stop it with scancel JOB; the same command continues it"
fi
