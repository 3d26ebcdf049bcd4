#!/usr/bin/env bash
# Trains on a GKE cluster by a JobSet (https://jobset.sigs.k8s.io, installed in the cluster), from your own machine:
#
#     IMAGE=gcr.io/my-project/modjax launch/gke.sh tpu flix-1
#     IMAGE=gcr.io/my-project/modjax launch/gke.sh gpu flix-1 --gin.TRAIN_STEPS=20000
#
# `kubectl delete jobset flix-1` stops and saves; the same command resumes. It fills in launch/gke_tpu.yaml or
# launch/gke_gpu.yaml, which say what each line is for; KUBECTL=cat prints the result.
set -euo pipefail

# Which of the two, the name of the job, and flags of train.py.
kind="${1:?tpu or gpu}"
NAME="${2:?a name for the job: small letters, digits and dashes}"
shift 2
# Flags as the items of a YAML list, each in single quotes, which are doubled inside.
ARGS=""
for flag in "$@"; do
    ARGS+="${ARGS:+, }'${flag//\'/\'\'}'"
done
# What runs: docker build -f launch/Dockerfile --build-arg EXTRA=tpu (or cuda) -t $IMAGE . && docker push $IMAGE
IMAGE="${IMAGE:?the image of launch/Dockerfile}"
# A claim on a share that many nodes may write (ReadWriteMany: Filestore), mounted at /share.
CLAIM="${CLAIM:-share}"
BASE="${BASE:-/share/bases/byt5-xl}"
MODEL_DIR="${MODEL_DIR:-/share/runs/$NAME}"
# Pods, which are hosts, and the accelerators of each. A v5e slice of 4x4 chips has 4 hosts of 4 chips.
case "$kind" in
tpu) HOSTS="${HOSTS:-4}" CHIPS="${CHIPS:-4}" ACCELERATOR="${ACCELERATOR:-tpu-v5-lite-podslice}" ;;
gpu) HOSTS="${HOSTS:-2}" CHIPS="${CHIPS:-8}" ACCELERATOR="${ACCELERATOR:-nvidia-h100-80gb}" ;;
*) echo "unknown kind $kind: tpu or gpu" >&2 && exit 2 ;;
esac
# How the chips of a slice are laid out: the product is HOSTS times CHIPS.
TOPOLOGY="${TOPOLOGY:-4x4}"

# The file with its names in ${} filled in.
text="$(<"$(dirname "${BASH_SOURCE[0]}")/gke_$kind.yaml")"
for name in NAME ARGS IMAGE CLAIM BASE MODEL_DIR HOSTS CHIPS ACCELERATOR TOPOLOGY; do
    text="${text//"\${$name}"/"${!name}"}"
done
${KUBECTL:-kubectl apply -f -} <<<"$text"
