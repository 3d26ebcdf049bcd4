"""Runs whose checkpoints were written on the spot: what a training would leave, with noise for what it would learn."""

import numpy as np
from flax import traverse_util

from modjax import adapters, checkpoints, hub, initialize, optimizers, provenance, trainer
from modjax.features import FeatureSpace
from modjax.hub.kinds import KINDS, name_of
from modjax.hub.run import MODELS

SPACE = FeatureSpace(
    (("task", ("parse", "tag")), ("language", ("en", "sw", "yo"))),
    datasets=("parse_en", "tag_sw", "parse_yo"),
)
STEP = 3
# Mean and deviation of what a leaf of an adapter has learned, by its name.
_LEARNED = {"scale": (1.0, 0.4), "logits": (0.0, 1.5)}
_OTHERS = (0.0, 0.2)


class _Nowhere:
    """An input without a position."""

    def save(self, directory):
        del directory


def write_run(folder, base, rules=(), *, groups=(), gin=None, seed=0, **changes):
    """Writes a checkpoint.

    Args:
      folder: the MODEL_DIR.
      base: the folder of the base.
      rules: the adapters; none to train the network itself.
      groups: of the optimizer, see `optimizers.select`.
      gin: the run's configuration; it names the base unless given.
      seed: of what it has learned.
      **changes: of the network's configuration.

    Returns:
      (model, params): bound to SPACE; of base and adapters.
    """
    config = hub.config_of(base, **changes)
    kind = name_of(config)
    network = KINDS[kind].network(config)
    model = MODELS[kind](adapters.Adapted(network, tuple(rules), SPACE) if rules else network)
    layout = initialize.layout(
        model, model.example_batch({"inputs": 1, "targets": 1}, SPACE), groups
    )
    _, weights = hub.load_base(base, scan_layers=config.scan_layers)
    names = model.adapted.names if model.adapted else ()
    frozen = initialize.take_base(layout.frozen, weights, names, "base")
    held = traverse_util.flatten_dict(weights, sep="/")
    rng = np.random.default_rng(seed)
    trained = {}
    for path, leaf in traverse_util.flatten_dict(layout.trained, sep="/").items():
        noise = rng.normal(size=leaf.shape)
        if set(path.split("/")) & set(names):
            mean, deviation = _LEARNED.get(path.rpartition("/")[2], _OTHERS)
            value = mean + deviation * noise
        elif initialize.is_head(path):
            value = noise
        else:
            value = held[path] + 0.1 * noise
        trained[path] = value.astype(np.float32)
    trained = traverse_util.unflatten_dict(trained, sep="/")
    metadata = {
        "method": adapters.describe_method(model.adapted) if model.adapted else "full",
        "space": SPACE.to_json(),
        "base": provenance.fingerprint(frozen),
        "mixture": [],
        "name": "written",
        "seed": seed,
        "gin": f"BASE = {str(base)!r}\n" if gin is None else gin,
    }
    state = trainer.TrainState(
        step=np.int32(STEP),
        trained=trained,
        opt_state={"count": np.int32(STEP)},
        rng=np.zeros(2, np.uint32),
    )
    checkpointer = checkpoints.Checkpointer(folder, metadata)
    checkpointer.save(STEP, state, _Nowhere())
    checkpointer.close()
    return model, optimizers.combine(trained, frozen)
