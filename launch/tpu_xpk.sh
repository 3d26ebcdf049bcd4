#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster that xpk manages (pip install xpk), from your own machine:
#
#     PROJECT=my-project CLUSTER=pods IMAGE=gcr.io/my-project/modjax STORAGE=share launch/tpu_xpk.sh flix-1
#
# The image is that of launch/Dockerfile; flags of train.py may follow the job's name.
set -euo pipefail

# The project, its zone, and a cluster made by `xpk cluster create`.
PROJECT="${PROJECT:?the Google Cloud project}"
ZONE="${ZONE:-us-west4-a}"
CLUSTER="${CLUSTER:?a cluster made by xpk}"
# What runs: docker build -f launch/Dockerfile --build-arg EXTRA=tpu -t $IMAGE . && docker push $IMAGE
IMAGE="${IMAGE:?the image of launch/Dockerfile}"
# A share known to xpk (`xpk storage attach`), mounted in every pod where it says; here at /share.
STORAGE="${STORAGE:?the name of a storage attached by xpk, mounted at /share}"
# The slices, and how many: with several, the processes of all of them are one job.
TYPE="${TYPE:-v5litepod-16}"
SLICES="${SLICES:-1}"
# The name of the job comes first; resubmitting a job with the same MODEL_DIR resumes it.
name="${1:?a name for the job}"
shift
BASE="${BASE:-/share/bases/byt5-xl}"
MODEL_DIR="${MODEL_DIR:-/share/runs/$name}"

# One pod for each host. GKE tells each its number and the others' names, and jax reads them.
# --max-restarts: what a failed host takes down is started again, and resumes from the last checkpoint.
# --termination-grace-period-seconds: between SIGTERM, on which the job saves, and SIGKILL.
xpk workload create \
    --project="$PROJECT" \
    --zone="$ZONE" \
    --cluster="$CLUSTER" \
    --workload="$name" \
    --docker-image="$IMAGE" \
    --tpu-type="$TYPE" \
    --num-slices="$SLICES" \
    --storage="$STORAGE" \
    --max-restarts=3 \
    --termination-grace-period-seconds=120 \
    --env="BASE=$BASE" \
    --env="MODEL_DIR=$MODEL_DIR" \
    --command="launch/job.sh $(printf '%q ' "$@")"
