#!/usr/bin/env bash
# Trains on a Slurm cluster: prints an sbatch script and submits it. Every node runs one process with all its GPUs.
# Before the time limit, and when it is preempted, the run saves; it is queued again until there is a result.
#
#   ./run.sh slurm --nodes=N --time=TIME --workdir=DIR [--gpus-per-node=G] [--cpus-per-task=C] [--partition=P]
#       [--account=A] [--name=NAME] [--setup=COMMAND] [--dry-run] -- --config=FILE.py:VARIANT [flags of the trainer]
#
#   --workdir   a folder that all nodes see
#   --setup     run on the first node before the trainer, such as: module load cuda
#   --dry-run   print the script and submit nothing

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
read_flags "nodes time workdir gpus-per-node cpus-per-task partition account name setup" "$@"
need nodes time workdir
need_config
[[ ${flag[nodes]} =~ ^[1-9][0-9]*$ ]] || fail "--nodes is ${flag[nodes]}; it must be a number of nodes, 1 or more"

script() {
  local name
  echo '#!/usr/bin/env bash'
  echo "#SBATCH --job-name=${flag[name]:-vit_scaling}"
  for name in nodes time gpus-per-node cpus-per-task partition account; do
    [ -z "${flag[$name]:-}" ] || echo "#SBATCH --$name=${flag[$name]}"
  done
  cat <<TEXT
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=$(basename "${flag[workdir]}").log

cd $(quoted "$PWD") || exit 1${flag[setup]:+
${flag[setup]}}
srun --kill-on-bad-exit=1 .venv/bin/python -m vit_scaling.train $(quoted "--workdir=${flag[workdir]}" "${train[@]}")
code=\$?
[ ! -e $(quoted "${flag[workdir]}/result.json") ] || exit 0
# 2: the trainer has said what is wrong with its flags, its data or its workdir; it would say so again.
[ "\$code" -ne 2 ] || exit 2
[ "\${SLURM_RESTART_COUNT:-0}" -lt 100 ] || exit 1
scontrol requeue "\$SLURM_JOB_ID"
TEXT
}

script
if [ -z "${flag[dry-run]:-}" ]; then
  command -v sbatch >/dev/null || fail "there is no sbatch here; call this on a login node, or with --dry-run"
  script | sbatch
fi
