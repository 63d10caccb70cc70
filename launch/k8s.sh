#!/usr/bin/env bash
# Trains on Kubernetes, on one slice of a TPU node pool or on nodes with GPUs: prints a manifest and applies it. Pods
# that end are started again, after a growing pause, until the run is finished or the trainer refuses what it was given.
#
#   ./run.sh k8s --name=NAME --image=IMAGE --hosts=N --chips=RESOURCE=COUNT
#       --select=LABEL=VALUE [--select=...] [--claim=CLAIM] --workdir=DIR
#       [--namespace=SPACE] [--dry-run]
#       -- --config=FILE.py:VARIANT [flags of the trainer]
#
#   --image    has this project installed
#   --hosts    hosts of the slice; --chips is what each has, such as
#              google.com/tpu=4 or nvidia.com/gpu=8
#   --select   labels of the nodes, such as
#              cloud.google.com/gke-tpu-accelerator=tpu-v5-lite-podslice and
#              cloud.google.com/gke-tpu-topology=4x4
#   --claim    a PersistentVolumeClaim that all pods may write; it is mounted
#              at /run/vit_scaling
#   --workdir  a folder in it, such as /run/vit_scaling/s16; or gs://BUCKET/PATH,
#              which needs no claim, and the extra gcs in the image
#   --dry-run  print the manifest and apply nothing
#
# Watch it with kubectl logs --follow job/NAME, stop it with kubectl delete job NAME; the same command continues it.
# The nodes of the pool cost money until the pool is scaled down.

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
read_flags "name image hosts chips select claim workdir namespace" "$@"
need name image hosts chips select workdir
[[ ${flag[workdir]} == gs://* ]] || need claim
need_config
[[ ${flag[name]} =~ ^[a-z0-9]([a-z0-9-]*[a-z0-9])?$ ]] || fail "--name is ${flag[name]}; Kubernetes wants a-z, 0-9 and -"
[[ ${flag[hosts]} =~ ^[1-9][0-9]*$ ]] || fail "--hosts is ${flag[hosts]}; it must be a number of hosts, 1 or more"
[[ ${flag[chips]} =~ ^[^=]+=[1-9][0-9]*$ ]] || fail "--chips is ${flag[chips]}; it must be RESOURCE=COUNT"
[[ ${flag[workdir]} == gs://* || ${flag[workdir]} == /run/vit_scaling/* ]] ||
  fail "--workdir is ${flag[workdir]}; it must lie in /run/vit_scaling, where --claim is mounted, or in a bucket, gs://..."

mapfile -t labels <<<"${flag[select]}"
for label in "${labels[@]}"; do
  [[ $label == *=* ]] || fail "--select is $label; it must be LABEL=VALUE"
done

manifest() {
  local name=${flag[name]} chips=${flag[chips]}
  cat <<TEXT
apiVersion: v1
kind: Service
metadata:
  name: $name${flag[namespace]:+
  namespace: ${flag[namespace]}}
spec:
  clusterIP: None
  publishNotReadyAddresses: true
  selector:
    job-name: $name
---
apiVersion: batch/v1
kind: Job
metadata:
  name: $name${flag[namespace]:+
  namespace: ${flag[namespace]}}
spec:
  completionMode: Indexed
  completions: ${flag[hosts]}
  parallelism: ${flag[hosts]}
  # Pods that fail are replaced after 10 s, 20 s, 40 s ... 6 minutes; 100 for each host end the job.
  backoffLimit: $((100 * flag[hosts]))
  podFailurePolicy:
    rules:
    - action: FailJob # the trainer refused its flags, data or workdir, and would again
      onExitCodes:
        containerName: train
        operator: In
        values: [2]
    - action: Ignore # a preempted or drained node is no failure of the run
      onPodConditions:
      - type: DisruptionTarget
  template:
    spec:
      subdomain: $name
      restartPolicy: Never
      terminationGracePeriodSeconds: 180
      nodeSelector:
$(for label in "${labels[@]}"; do echo "        ${label%%=*}: \"${label#*=}\""; done)
${flag[claim]:+      volumes:
      - name: runs
        persistentVolumeClaim:
          claimName: ${flag[claim]}
}      containers:
      - name: train
        image: ${flag[image]}
        ports:
        - containerPort: 8476
        resources:
          limits:
            ${chips%%=*}: ${chips#*=}
${flag[claim]:+        volumeMounts:
        - name: runs
          mountPath: /run/vit_scaling
}        command:
        - bash
        - -c
        - |
          # A run that was stopped exits with 0 and is not finished, so the exit code alone does not tell.
          trap 'kill -TERM "\$trainer"' TERM
          python -m vit_scaling.train $(quoted "--workdir=${flag[workdir]}" "${train[@]}") \\
            --coordinator=$name-0.$name:8476 --num_processes=${flag[hosts]} --process_id="\$JOB_COMPLETION_INDEX" &
          trainer=\$!
          wait "\$trainer"
          code=\$?
          if [ "\$code" -gt 128 ]; then # a signal ended the wait, and the trainer saves
            wait "\$trainer"
            code=\$?
          fi
          if $(finished "${flag[workdir]}"); then exit 0; fi
          if [ "\$code" -eq 2 ]; then exit 2; fi
          exit 1
TEXT
}

manifest
if [ -z "${flag[dry-run]:-}" ]; then
  command -v kubectl >/dev/null || fail "there is no kubectl here; install it, or call this with --dry-run"
  manifest | kubectl apply --filename=-
  space=${flag[namespace]:+ --namespace=${flag[namespace]}}
  say "watch it with kubectl logs --follow job/${flag[name]}$space; stop it with kubectl delete job ${flag[name]}$space"
fi
