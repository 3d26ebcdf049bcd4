"""Trains the tower in a process of its own: worker.py FOLDER MODE [COORDINATOR INDEX COUNT]."""

import sys

import jax
import numpy as np
from flax import traverse_util
from tower import Batches, make

from modjax import checkpoints, loop

folder, mode, *job = sys.argv[1:]
if job:
    jax.distributed.initialize(job[0], num_processes=int(job[2]), process_id=int(job[1]))

AXES = {
    "base/kernel": ("embed", "mlp"),
    "adapter/kernel": ("mlp", "embed"),
    "adapter/bias": ("embed",),
}
results = {}


def keep(step, state):
    flat = traverse_util.flatten_dict(state.trained, sep="/")
    for path, leaf in flat.items():
        whole = leaf if leaf.is_fully_addressable else leaf.addressable_data(0)
        results[f"{step}/{path}"] = np.asarray(whole)


class Asked(loop.StopSignal):
    """Process 1 alone is asked to stop, when its third batch is read."""

    @property
    def received(self):
        return "SIGTERM" if jax.process_index() == 1 and batches.position >= 3 else None

    @received.setter
    def received(self, value):
        pass


options = {"devices": jax.devices()}
if mode == "model_parallel":
    options |= {"model_parallel": 2, "microbatches": 2, "axes": AXES}
made, state, frozen, _ = make(**options)
if mode == "model_parallel":
    assert frozen["base"]["kernel"].sharding.spec == jax.P("fsdp", "model")
    assert state.trained["adapter"]["kernel"].sharding.spec == jax.P("model", "fsdp")
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == (16, 4)]
    assert len(moments) == 2 and all(x.sharding.spec == jax.P("model", "fsdp") for x in moments)
batches = Batches()
name = folder
if mode == "asked_to_stop":
    name = f"{folder}_{jax.process_index()}"
    checkpointer = checkpoints.Checkpointer(folder, {"method": "tower"})

    def save(step, state):
        checkpointer.save(step, state, batches)

    state, stopped = loop.fit(made, state, frozen, batches, 100, save=save, stop=Asked())
    checkpointer.wait()
    results["stopped_at"], results["saved"] = stopped, checkpoints.steps(folder)[-1]
    batches = Batches()
    state = checkpointer.restore(stopped, make(**options)[1], batches)
    checkpointer.close()
    state, _ = loop.fit(made, state, frozen, batches, 9)
    keep(9, state)
else:
    loop.fit(made, state, frozen, batches, 9, save_every=3, save=keep)
    results = {k: v for k, v in results.items() if not k.startswith("6")}
np.savez(f"{name}.npz", **results)
