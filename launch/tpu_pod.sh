#!/usr/bin/env bash
# Trains on a TPU pod slice whose VMs you create and own, by gcloud, from your own machine:
#
#     PROJECT=my-project TPU=flix NFS=10.0.0.2:/share launch/tpu_pod.sh create
#     PROJECT=my-project TPU=flix NFS=10.0.0.2:/share launch/tpu_pod.sh train --gin.TRAIN_STEPS=20000
#     PROJECT=my-project TPU=flix NFS=10.0.0.2:/share launch/tpu_pod.sh stop      # saves; `train` resumes
#     PROJECT=my-project TPU=flix NFS=10.0.0.2:/share launch/tpu_pod.sh delete
set -euo pipefail

# The Google Cloud project, a name for the slice, and the zone that has such chips.
PROJECT="${PROJECT:?the Google Cloud project}"
TPU="${TPU:?a name for the slice}"
ZONE="${ZONE:-us-west4-a}"
# The slice: v5litepod-16 is 16 chips of v5e on 4 hosts. VERSION is the image of its VMs.
TYPE="${TYPE:-v5litepod-16}"
VERSION="${VERSION:-v2-alpha-tpuv5-lite}"
# A share that all hosts mount at /share (a Filestore instance in their network): checkpoints and the base lie there.
NFS="${NFS:?HOST:/PATH of the share, such as that of a Filestore instance}"
BASE="${BASE:-/share/bases/byt5-xl}"
MODEL_DIR="${MODEL_DIR:-/share/runs/$TPU}"

place=(--project="$PROJECT" --zone="$ZONE")

# Runs one command on all hosts of the slice at once; ends when it has ended on all.
on_all_hosts() {
    gcloud compute tpus tpu-vm ssh "$TPU" "${place[@]}" --worker=all --command="$1"
}

# The first word says what to do; what follows `train` are flags of train.py.
action="${1:?create, train, stop or delete}"
shift
case "$action" in
create)
    # The VMs. They cost money until `delete`.
    gcloud compute tpus tpu-vm create "$TPU" "${place[@]}" --accelerator-type="$TYPE" --version="$VERSION"
    # The share, on every host, writable by you.
    on_all_hosts "sudo apt-get install -y nfs-common && sudo mkdir -p /share && sudo mount $NFS /share && sudo chmod a+rwx /share"
    # The code of the last commit, packed here and unpacked on every host.
    git archive --format=tar.gz --output=/tmp/modjax.tar.gz HEAD
    gcloud compute tpus tpu-vm scp /tmp/modjax.tar.gz "$TPU:" "${place[@]}" --worker=all
    on_all_hosts "mkdir -p modjax && tar -xzf modjax.tar.gz -C modjax"
    # Python 3.11 where the image has an older one, and modjax with jax for TPUs.
    on_all_hosts "pip install --user uv && ~/.local/bin/uv venv --python 3.11 venv && cd modjax && VIRTUAL_ENV=~/venv ~/.local/bin/uv pip install -c constraints.txt -e '.[tpu]'"
    ;;
train)
    # Quoted once more, because the hosts' shells read them again.
    flags="$(printf '%q ' "$@")"
    # One process for each host; they find each other by the metadata of their VM. The same command resumes.
    on_all_hosts "cd modjax && BASE=$BASE MODEL_DIR=$MODEL_DIR PYTHON=~/venv/bin/python launch/job.sh $flags"
    ;;
stop)
    # SIGTERM: all processes agree on a step, save it and end.
    on_all_hosts "pkill -TERM -f train.py"
    ;;
delete)
    gcloud compute tpus tpu-vm delete "$TPU" "${place[@]}" --quiet
    ;;
*)
    echo "unknown action $action: create, train, stop or delete" >&2
    exit 2
    ;;
esac
