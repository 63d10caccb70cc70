#!/usr/bin/env bash
# shellcheck disable=SC1003,SC2016 # what is quoted is for the shells of the hosts
# Unless the slice exists:
gcloud compute tpus tpu-vm create my-slice --project=my-project --zone=my-zone --accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite --spot
# Then, and again after each preemption:
git archive --prefix=vit_scaling/ --output=/tmp/vit_scaling.tar.gz HEAD
gcloud compute tpus tpu-vm scp /tmp/vit_scaling.tar.gz my-slice:vit_scaling.tar.gz --project=my-project --zone=my-zone --worker=all
gcloud compute tpus tpu-vm ssh my-slice --project=my-project --zone=my-zone --worker=all '--command=tar -xzf vit_scaling.tar.gz && sudo ./mount.sh /mnt/runs && vit_scaling/run.sh install tpu'
gcloud compute tpus tpu-vm ssh my-slice --project=my-project --zone=my-zone --worker=all '--command=cd vit_scaling && { mv -f host.pid previous.pid; setsid nohup launch/host.sh /mnt/runs/s16 --config=configs/vit_imagenet.py:S/16 '\''--config.optim.decay_rules=(('\''\'\'''\''.*'\''\'\'''\'', '\''\'\'''\''body'\''\'\'''\''),)'\'' >host.log 2>&1 </dev/null & echo "$!" >host.pid; }'
gcloud compute tpus tpu-vm ssh my-slice --project=my-project --zone=my-zone --worker=0 '--command=tail --lines=+1 --follow --pid="$(cat vit_scaling/host.pid)" vit_scaling/host.log'
# Until this says 0 (finished) or 2 (the trainer refused what it was given):
gcloud compute tpus tpu-vm ssh my-slice --project=my-project --zone=my-zone --worker=0 '--command=cat vit_scaling/host.code'
# The slice costs money until this:
gcloud compute tpus tpu-vm delete my-slice --project=my-project --zone=my-zone
