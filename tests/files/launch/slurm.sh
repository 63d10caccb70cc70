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
srun --kill-on-bad-exit=1 .venv/bin/python -m vit_scaling.train --workdir=/scratch/s16 --config=configs/vit_imagenet.py:S/16 '--config.optim.decay_rules=(('\''.*'\'', '\''body'\''),)'
code=$?
[ ! -e /scratch/s16/result.json ] || exit 0
# 2: the trainer has said what is wrong with its flags, its data or its workdir; it would say so again.
[ "$code" -ne 2 ] || exit 2
[ "${SLURM_RESTART_COUNT:-0}" -lt 100 ] || exit 1
scontrol requeue "$SLURM_JOB_ID"
