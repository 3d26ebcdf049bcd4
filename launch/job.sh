#!/usr/bin/env bash
# The command that every process of a job runs, the same in all: which process it is, train.py finds out by itself.
# Whoever starts it sets BASE and MODEL_DIR; more flags may follow. Change the rest to your job.
set -euo pipefail

# The folder of the repository, wherever this is started from.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# A base, a method and a run, and what they are about.
# MODEL_DIR is one folder that all hosts see: each writes its part of the checkpoints there.
# The batch is that of the whole job: a multiple of its devices.
# DATA_SHARDS stays the same for the whole of a run; 1 has every process read all examples (docs/multihost.md).
# Flags given to this script come last and win.
exec "${PYTHON:-python3}" train.py \
    --gin_file=bases/byt5_xl.gin \
    --gin_file=methods/flix.gin \
    --gin_file=runs/finetune.gin \
    --gin.BASE="'${BASE:?the folder of the weights of the base}'" \
    --gin.MODEL_DIR="'${MODEL_DIR:?a folder that all hosts see}'" \
    --gin.MIXTURE_OR_TASK_NAME="'mtop6_train'" \
    --gin.MIXTURE_OR_TASK_MODULE="'tasks.mtop6'" \
    --gin.TASK_FEATURE_LENGTHS="{'inputs': 256, 'targets': 192}" \
    --gin.BATCH_SIZE="${BATCH_SIZE:-256}" \
    --gin.TRAIN_STEPS="${TRAIN_STEPS:-10000}" \
    --gin.DATA_SHARDS="${DATA_SHARDS:-1}" \
    "$@"
