#!/usr/bin/env bash
#SBATCH --job-name=s16
#SBATCH --nodes=4
#SBATCH --time=12:00:00
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --partition=big
#SBATCH --account=me
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=s16.log

cd /home/me/vit_scaling || exit 1
module load cuda
# srun does not take the number of CPUs from the job by itself.
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}" \
  .venv/bin/python -m vit_scaling.train --workdir=/scratch/s16 --config=configs/vit_imagenet.py:S/16 '--config.optim.decay_rules=(('\''.*'\'', '\''body'\''),)'
code=$?
if checkpoint=$(sed -n 's/^ *"checkpoint": "\(.*\)",\{0,1\}$/\1/p' /scratch/s16/result.json 2>/dev/null) && test -n "$checkpoint" && test -d "$checkpoint"; then
  rm -f s16.tries
  exit 0
fi
if [ "$code" -eq 2 ]; then
  echo "the trainer refused its flags, data or workdir, as it says above; the job is not queued again" >&2
  exit 2
fi
if [ "$SECONDS" -ge 600 ]; then
  rm -f s16.tries
else
  echo >>s16.tries
  count=$(wc -l <s16.tries)
  if [ "$count" -ge 10 ]; then
    rm -f s16.tries
    echo "given up after 10 attempts in a row of less than 10 minutes" >&2
    exit 1
  fi
  sleep "$((count * 10))"
fi
scontrol requeue "$SLURM_JOB_ID"
