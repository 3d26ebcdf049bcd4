"""A training step against T5X, and against a bare loop in jax: time and memory.

    pip install -e '.[t5x]'
    python -m benchmarks.vs_t5x [--cores 1]

The setting is that of `setting.py`, with the same weights and the same padded batches for all. T5X's sides are its own
throughout: `Transformer` and `T5Config` of its examples/t5, `EncoderDecoderModel`, `PjitPartitioner`, `Trainer`, whose
`train` is called for a step at a time. It has no adapters, so LoRA is compared with what its users can do:

    lora   ours: LoRA on queries and values, AdamW
           t5x_frozen: everything but norms and position biases is frozen, by its MultiOptimizer; Adafactor
           t5x_adafactor: everything trains, by Adafactor, its default
           bare: LoRA without any framework
    full   ours, t5x_adamw and bare: everything trains, by optax's AdamW on each side

`bare` is what there is no getting below: our network's `apply`, the loss alone, and optax, in one `jax.jit`. What the
sides lose is compared before anything is timed, and at each step where they do the same thing.

Each side is a process of its own, and steps alternate. Memory is the peak of a process's resident set, from its start
on, and the same beyond what it held once everything was imported. T5X is handed the weights as arrays: what it would
take to restore a checkpoint is not counted. With one core the clock is the processor's time of the process.
"""

import importlib.util
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import measure, sides

CASES = {
    "lora": ("ours", "t5x_frozen", "t5x_adafactor", "bare"),
    "full": ("ours", "t5x_adamw", "bare"),
}
RATE = 1e-4
TOLERANCE = 1e-4  # of losses, relative
KEPT = r".*(scale|rel_embedding)"  # what trains in t5x_frozen
ROWS = "rows"


def prepare(folder: pathlib.Path) -> None:
    """Writes the weights, those that `setting.Step` draws when everything trains, and the batches."""
    from benchmarks import setting
    from modjax import hub, initialize
    from modjax.models import EncoderDecoderModel

    method = setting.METHODS["full"]
    model, rows = EncoderDecoderModel(method.module), setting.batch(method)
    wanted = initialize.layout(model, rows).trained
    hub.save_base(
        folder / "base", setting.CONFIG, initialize.host_init(model, rows, wanted, seed=0)
    )
    sides.write(folder / ROWS, setting.padded(4))


def our_side(folder: pathlib.Path, case: str) -> sides.Made:
    """A step of ours."""
    from benchmarks import setting
    from modjax import hub

    made: list[setting.Step] = []

    def start() -> None:
        first = sides.read(folder / ROWS)[0]
        base = None if case == "full" else hub.load_base(folder / "base")[1]
        made.append(setting.Step(setting.METHODS[case], base, first))

    def step(batch: Any) -> float:
        made[0].feed(batch)
        return made[0]()

    return step, start


def bare_side(folder: pathlib.Path, case: str) -> sides.Made:
    """A step without any framework around the network."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import optax

    from benchmarks import setting
    from modjax import hub
    from modjax.networks import t5

    network, optimizer = t5.Transformer(setting.CONFIG), optax.adamw(RATE, weight_decay=0.0)
    made: list[Any] = []

    def loss(own: Any, frozen: Any, batch: Any) -> jax.Array:
        adapters = own if frozen else {}

        def adapted(
            call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
        ) -> Any:
            y, name = call(*args, **kwargs), "/".join(context.module.path)
            if context.method_name != "__call__" or name not in adapters:
                return y
            return y + args[0] @ adapters[name]["a"] @ adapters[name]["b"]

        names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
        tokens = [batch[name] for name in names]
        with nn.intercept_methods(adapted):
            logits = network.apply({"params": frozen or own}, *tokens)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[-1])
        weights = tokens[-1] > 0
        return jnp.sum(each * weights) / jnp.sum(weights)

    def update(own: Any, state: Any, frozen: Any, batch: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(own, frozen, batch)
        updates, state = optimizer.update(grads, state, own)
        return value, optax.apply_updates(own, updates), state

    compiled = jax.jit(update, donate_argnums=(0, 1))

    def start() -> None:
        base = jax.device_put(hub.load_base(folder / "base")[1])
        # What trains is donated, so it must not be the arrays that were read.
        own, frozen = (lora(base), base) if case == "lora" else (jax.tree.map(jnp.copy, base), {})
        made.extend([own, jax.jit(optimizer.init)(own), frozen])

    def lora(base: Any) -> Any:
        paths = (path.removesuffix("/kernel") for path in flat(base) if path.endswith("/kernel"))
        sites = [path for path in paths if re.fullmatch(setting.SITES, path)]
        keys = jax.random.split(jax.random.key(0), len(sites))
        width, rank = setting.CONFIG.emb_dim, setting.RANK
        return {
            site: {
                "a": jax.random.normal(key, (width, rank)) / width**0.5,
                "b": jnp.zeros((rank, setting.CONFIG.num_heads * setting.CONFIG.head_dim)),
            }
            for site, key in zip(sites, keys, strict=True)
        }

    def step(batch: Any) -> float:
        value, made[0], made[1] = compiled(*made, batch)
        return float(value)

    return step, start


def t5x_side(folder: pathlib.Path, optimizer: str) -> sides.Made:
    """A step of T5X's trainer.

    Args:
      folder: of the weights and the batches.
      optimizer: "frozen", "adafactor" or "adamw".
    """
    import flax.core
    import jax
    import seqio
    from absl import logging
    from flax import traverse_util
    from t5x import adafactor, models, optimizers, partitioning, train_state, trainer, utils
    from t5x.examples.t5 import network

    from benchmarks import setting
    from modjax import hub

    logging.set_verbosity(logging.ERROR)  # it warns of each norm's factors
    definition: Any = optimizers.adamw(RATE, weight_decay=0.0)
    if optimizer != "adamw":
        rules = adafactor.standard_logical_factor_rules()
        definition = adafactor.Adafactor(decay_rate=0.8, step_offset=0, logical_factor_rules=rules)
    if optimizer == "frozen":
        kept = traverse_util.ModelParamTraversal(lambda path, _: re.fullmatch(KEPT, path))
        definition = optimizers.MultiOptimizer([(kept, definition)])
    names = ("vocab_size", "emb_dim", "num_heads", "head_dim", "mlp_dim", "mlp_activations")
    names += ("num_encoder_layers", "num_decoder_layers", "logits_via_embedding", "dropout_rate")
    config = network.T5Config(**{name: getattr(setting.CONFIG, name) for name in names})
    vocabulary = seqio.PassThroughVocabulary(setting.CONFIG.vocab_size)
    model = models.EncoderDecoderModel(
        network.Transformer(config),
        vocabulary,
        vocabulary,
        definition,
        loss_normalizing_factor="NUM_REAL_TARGET_TOKENS",
    )
    made: list[trainer.Trainer] = []

    def rows_of(batch: Any) -> dict[str, Any]:
        tokens = {name: rows for name, rows in batch.items() if name.endswith("tokens")}
        return tokens | {"decoder_loss_weights": (batch["decoder_target_tokens"] > 0).astype(int)}

    def start() -> None:
        first = rows_of(sides.read(folder / ROWS)[0])
        shapes, types = (
            {k: getattr(v, what) for k, v in first.items()} for what in ("shape", "dtype")
        )
        partitioner = partitioning.PjitPartitioner(num_partitions=1)
        initializer = utils.TrainStateInitializer(
            definition, model.get_initial_variables, shapes, partitioner, types
        )
        axes = initializer.train_state_axes

        def with_weights(params: Any) -> Any:
            variables = model.get_initial_variables(jax.random.key(0), shapes, types)
            return train_state.FlaxOptimTrainState.create(
                definition, variables.copy({"params": params})
            )

        base = flax.core.freeze(hub.load_base(folder / "base")[1])
        state = partitioner.partition(with_weights, (axes.params,), axes)(base)
        rate = utils.create_learning_rate_scheduler("constant", base_learning_rate=0.001)
        key = jax.random.key(0)
        made.append(trainer.Trainer(model, state, partitioner, [], None, axes, key, rate, None))

    def step(batch: Any) -> float:
        return float(made[0].train(iter([rows_of(batch)]), 1).result()["loss"].value)

    return step, start


def flat(tree: Any) -> dict[str, Any]:
    """A nested dict with paths for keys."""
    from flax import traverse_util

    return traverse_util.flatten_dict(tree, sep="/")


def serve(side: str, case: str, folder: pathlib.Path, cores: int) -> None:
    """A side's process."""

    def make() -> sides.Made:
        if side.startswith("t5x_"):
            return t5x_side(folder, side.removeprefix("t5x_"))
        return our_side(folder, case) if side == "ours" else bare_side(folder, case)

    sides.serve(make, folder / ROWS, cores)


def compare(case: str, folder: pathlib.Path, rounds: int, cores: int) -> list[dict[str, Any]]:
    """Times a case, prints what was found, and returns its goals."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CASES[case]}
    command = [sys.executable, "-m", "benchmarks.vs_t5x", "--cores", str(cores), "--serve"]
    commands = {name: [*command, name, case, str(folder)] for name in found}
    with sides.started(commands) as processes:
        for number in range(rounds + 1):
            for name, side in processes.items():
                found[name].append(side.step(number))
            # Beyond the first step, the sides of `lora` train different things.
            if number == 0 or case == "full":
                check({name: steps[-1]["loss"] for name, steps in found.items()}, number)
    seconds = {name: [step["seconds"] for step in steps[1:]] for name, steps in found.items()}
    last = {name: steps[-1] for name, steps in found.items()}
    for name, steps in found.items():
        print(
            f"{case}: {name:13}  {measure.spread(seconds[name])} s a step  "
            f"peak {last[name]['peak']:.0f} MB, {last[name]['beyond']:.0f} beyond imports  "
            f"loss {steps[0]['loss']:.5f} at first, {last[name]['loss']:.5f} at last"
        )
    goals = []
    for name in CASES[case][1:]:
        over = measure.ratio(seconds, "ours", name)
        peak, beyond = (last["ours"][what] / last[name][what] for what in ("peak", "beyond"))
        print(
            f"{case}: ours / {name}: time {over:.3f}, peak {peak:.3f}, beyond imports {beyond:.3f}"
        )
        if case == "lora" and name != "bare":
            goals.append(measure.goal(f"lora / {name}: time of a step", over, 0.75))
            goals.append(measure.goal(f"lora / {name}: peak memory beyond imports", beyond, 0.6))
    return goals


def check(losses: dict[str, float], number: int) -> None:
    """Ends the program where sides that do the same thing do not lose the same."""
    if max(losses.values()) - min(losses.values()) > TOLERANCE * min(losses.values()):
        raise SystemExit(f"The sides do not compute the same: in step {number} they lose {losses}.")


def main(argv: Sequence[str]) -> int:
    parser = sides.parser(__doc__, CASES, 9)
    args = parser.parse_args(argv)
    if args.serve:
        side, case, folder = args.serve
        serve(side, case, pathlib.Path(folder), args.cores)
        return 0
    if args.prepare:
        prepare(pathlib.Path(args.prepare))
        return 0
    if importlib.util.find_spec("t5x") is None:
        raise SystemExit(
            "benchmarks.vs_t5x needs T5X, which is not installed and not on the package index: "
            "pip install -e '.[t5x]' takes it from its repository."
        )
    began = time.monotonic()
    print(f"{measure.machine()}; {args.rounds} rounds on {args.cores or 'all'} core(s)")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "benchmarks.vs_t5x", "--prepare", folder], check=True)
        goals = []
        for case in args.cases:
            goals += compare(case, pathlib.Path(folder), args.rounds, args.cores)
    print(f"{(time.monotonic() - began) / 60:.1f} minutes")
    measure.report(goals)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
