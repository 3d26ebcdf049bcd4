"""Trains a model on a SeqIO mixture: pretraining, full fine-tuning, or adapters on a frozen base.

    python train.py --gin_file=bases/t5_small.gin --gin_file=methods/flix.gin \\
        --gin_file=runs/finetune.gin \\
        --gin.MIXTURE_OR_TASK_NAME="'my_mixture'" --gin.MIXTURE_OR_TASK_MODULE="'my.tasks'" \\
        --gin.TASK_FEATURE_LENGTHS="{'inputs': 128, 'targets': 64}" --gin.TRAIN_STEPS=1000 \\
        --gin.BASE="'weights/t5_small'" --gin.MODEL_DIR="'runs/first'"

The same command again resumes from the latest checkpoint of MODEL_DIR. The gin files may come in
any order.
"""

import contextlib
import dataclasses
import importlib
import itertools
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from modjax import (
    adapters,
    checkpoints,
    errors,
    initialize,
    launch,
    logging,
    optimizers,
    partitioning,
    profiling,
    provenance,
)
from modjax.features import FeatureSpace
from modjax.loop import StopSignal, fit
from modjax.trainer import Trainer, TrainState


def train(
    model: Any,
    mixture_or_task_name: str,
    task_feature_lengths: Mapping[str, int],
    batch_size: int,
    train_steps: int,
    model_dir: str,
    optimizer: optimizers.Optimizer,
    base: str | None,
    *,
    method: str = "",
    mixture_or_task_module: str | Sequence[str] | None = None,
    initial_checkpoint_path: str | None = None,
    start: initialize.Start = initialize.Start(),  # noqa: B008
    random_seed: int = 0,
    use_cached_tasks: bool = False,
    features: Sequence[str] | None = None,
    pack: bool | None = None,
    max_segments: int | None = None,
    data_shards: int = 1,
    on_too_long: str = "count",
    base_dtype: str | None = None,
    microbatches: int = 1,
    partitioner: partitioning.Partitioner = partitioning.Partitioner(),  # noqa: B008
    log_period: int = 100,
    checkpoint_period: int = 1000,
    checkpoint_start: bool = False,
    keep_checkpoints: int | None = 3,
    eval_period: int = 0,
    eval_steps: int = 0,
    eval_mixture: str | None = None,
    eval_split: str = "validation",
    tensorboard: bool = True,
    profile: bool = False,
    profile_steps: tuple[int, int] = (10, 5),
    export_dir: str | None = None,
    operative_config: Callable[[], str] = str,
) -> TrainState:
    """Trains, and returns the last state. gin_configs/runs gives most arguments their defaults.

    Args:
      model: see `modjax.models`.
      mixture_or_task_name: what is trained on, registered by a module in `mixture_or_task_module`.
      task_feature_lengths: {"inputs": L, "targets": L} in tokens.
      batch_size: rows of the global batch.
      train_steps: steps in all; a resumed run does what is left of them.
      model_dir: checkpoints, logs and configuration are written here.
      optimizer: what trains, by which algorithm.
      method: the name that results are reported under, as that of its gin file.
      base: a folder of weights (see `modjax.hub`), or "random" to start from random weights.
      initial_checkpoint_path: a checkpoint, or a MODEL_DIR, of the same method, whose trained
        parameters this run starts from (at step 0), unless MODEL_DIR has a checkpoint of its own;
        or the same folder as `base`.
      start: how it starts from there.
      features: which of the tasks' features the feature space has; all of them if None.
      pack: several examples to a row, at most `max_segments` (a bound from the lengths if None); None for what the
        model can.
      data_shards: streams that the examples are divided into, for the whole of a run; see `modjax.data.iterator`.
      on_too_long: "count" cuts and counts examples longer than the limit, "error" refuses them.
      base_dtype: precision that the frozen base is kept in: "float32", "bfloat16" or "int8" (see
        `modjax.quantization`); None for that of its files.
      microbatches: parts that a batch is computed in, one after the other.
      partitioner: how the devices are used; a resumed run may use others, and otherwise.
      checkpoint_start: save the start of the run, too, as step 0.
      eval_period, eval_steps: every so many steps, loss and accuracy on so many batches of each
        task of `eval_mixture` (default: the mixture trained on) and `eval_split`; 0 for never.
      profile, profile_steps: whether a trace is written to MODEL_DIR/profile, and after how many steps of this run, of
        how many.
      export_dir: where the base, with the vocabulary of the tasks, is written at the end, in float32, if all of it was
        trained.
      operative_config: gives the text that is kept with the checkpoints and as
        MODEL_DIR/config.gin.
    """
    from modjax.data import checks, converters, pipeline, registry, vocabularies

    if base is None:
        raise launch.ConfigError(
            "BASE must be set: --gin.BASE=VALUE, the folder of the base's weights"
        )
    if export_dir is not None and base_dtype == "int8":
        raise launch.ConfigError(
            "EXPORT_DIR would get weights that int8 has rounded: set one of them"
        )
    if export_dir is not None and model.adapted is not None:
        raise launch.ConfigError(
            "export_dir gets a base that was trained itself (methods/full.gin); adapters are exported "
            "afterwards, merged or by themselves (docs/export.md)"
        )
    if initial_checkpoint_path and launch.same_folder(initial_checkpoint_path, base):
        initial_checkpoint_path = None  # it was the base that was meant
    errors.check_integer("train.train_steps", train_steps)
    switches = {"use_cached_tasks": use_cached_tasks, "checkpoint_start": checkpoint_start}
    switches |= {"tensorboard": tensorboard, "profile": profile, "pack": pack or False}
    for name, value in switches.items():
        errors.check_bool(f"train.{name}", value)
    errors.check_integer("train.random_seed", random_seed, least=0)
    first = jax.process_index() == 0
    launch.import_tasks(mixture_or_task_module)
    mesh = partitioner.mesh()
    partitioning.check_batch(batch_size, mesh, microbatches)
    checkpoints.check_writable(model_dir)
    start.check(initial_checkpoint_path, model.adapted is not None)

    # The checkpoint to continue, the run's own first, decides the ids of the feature space.
    own = checkpoints.steps(model_dir)
    if export_dir is not None and (
        launch.same_folder(export_dir, base) or not own and any(pathlib.Path(export_dir).glob("*"))
    ):
        raise launch.ConfigError(
            f"EXPORT_DIR {export_dir} holds something that is not this run's and would be replaced: name another folder"
        )
    source = model_dir if own else initial_checkpoint_path
    stored = checkpoints.read_metadata(source) if source else None
    space = registry.feature_space(mixture_or_task_name, features, model.looks_up_features)
    if stored is not None:
        known = FeatureSpace.from_json(stored["space"])
        space = initialize.resolve_space(space, known, bool(own), checkpoints.locate(source))
    trained_on = registry.trained_by(mixture_or_task_name)
    if stored is not None:
        where = str(checkpoints.locate(source))
        trained_on = registry.also_trained(stored.get("trained_on", {}), trained_on, where)
    model = model.with_space(space)
    described = filter(registry.has_metadata, registry.tasks_of(mixture_or_task_name))
    initialize.check_routed(
        model, {registry.origin_of(name): registry.metadata_of(name) for name in described}
    )

    # Shapes first: what does not fit is found before anything is read or computed.
    checks.check_lengths(task_feature_lengths)
    pack = model.PACKS if pack is None else pack
    if pack and max_segments is None:
        max_segments = converters.default_max_segments(task_feature_lengths)
    batch = model.example_batch(task_feature_lengths, space, max_segments if pack else None)
    layout = initialize.layout(model, batch, optimizer.groups, partitioner)
    tokenizer = vocabularies.of_base(base)
    for task in registry.tasks_of(mixture_or_task_name):
        checks.check_vocabularies(task, model, tokenizer)
    errors.check_integer("train.eval_steps", eval_steps, least=0)
    errors.check_integer("train.eval_period", eval_period, least=0)
    eval_space, eval_tasks = space, []
    if eval_steps:
        eval_tasks = registry.tasks_of(eval_mixture or mixture_or_task_name)
        for task in eval_tasks:
            registry.check_has(task, (eval_split,))
            checks.check_splits([task], eval_split, use_cached=use_cached_tasks)
            checks.check_vocabularies(task, model, tokenizer)
        eval_space = registry.with_room(space, eval_tasks)
        converters.KeyTable(eval_tasks, eval_space, "none")  # whose features cannot be used
    names = () if model.adapted is None else model.adapted.names

    # The frozen part comes from the base and is identified by its values; the trained part is fresh
    # where the base has nothing, from the base where it has, and from the initial checkpoint where
    # that has.
    if base == initialize.RANDOM:
        frozen = initialize.host_init(model, batch, layout.frozen, random_seed)
        trained = initialize.host_init(model, batch, layout.trained, random_seed)
    else:
        from modjax import hub

        scan = bool(getattr(getattr(model.network, "config", None), "scan_layers", False))
        _, weights = hub.load_base(base, scan_layers=scan)
        frozen = initialize.take_base(layout.frozen, weights, names, base)
        known = initialize.take_base(layout.trained, weights, names, base)
        known = initialize.to_float32(known)
        new = initialize.without(initialize.added(layout.trained, names), known)
        trained = optimizers.combine(known, initialize.host_init(model, batch, new, random_seed))
        del weights  # which the frozen part may soon be a smaller copy of
    metadata = {
        "method": adapters.describe_method(model.adapted) if model.adapted else "full",
        "space": space.to_json(),
        "base": provenance.fingerprint(frozen),
        "mixture": registry.origin_of(mixture_or_task_name),
        "trained_on": trained_on,
        "name": method,
        "seed": random_seed,
        "gin": operative_config(),
    }
    frozen = initialize.to_dtype(frozen, base_dtype)
    if stored is not None and not own:
        trained = initialize.start_from(
            initial_checkpoint_path, metadata, trained, stored, model, start
        )
    before = None
    if own and stored is not None and "before" in stored:
        before = stored["before"]  # the checkpoint that this run started from may be gone
    elif initial_checkpoint_path and not start.collapse:
        earlier = checkpoints.read_metadata(initial_checkpoint_path)
        before = {name: earlier[name] for name in ("method", "trained")}
    metadata["before"] = before
    rates = initialize.factors(layout, start, metadata["method"], before)
    layout = dataclasses.replace(layout, rates=rates)

    trainer = Trainer(
        model,
        optimizer,
        mesh,
        trained,
        frozen,
        layout.axes,
        microbatches,
        layout.rates,
        layout.lazy,
        partitioner.all_rules,
        model.with_space(eval_space),
    )
    state = trainer.init_state(trained, random_seed)
    frozen = partitioning.place(frozen, trainer.frozen_sharding)
    size = sum(x.nbytes for x in jax.tree.leaves((state.trained, state.opt_state)))
    checkpoints.check_writable(model_dir, 2 * size)
    shares = partitioning.shares(batch_size, mesh)
    iterator = pipeline.train_iterator(
        mixture_or_task_name,
        "train",
        space,
        task_feature_lengths=task_feature_lengths,
        batch_size=batch_size,
        converter=model.converter,
        pack=pack,
        max_segments=max_segments,
        data_shards=data_shards,
        shares=shares,
        process=jax.process_index(),
        seed=random_seed,
        use_cached=use_cached_tasks,
        on_too_long=on_too_long,
    )
    checkpointer = checkpoints.Checkpointer(model_dir, metadata, keep_checkpoints)
    begin = 0
    if own:
        begin = own[-1]
        state = checkpointer.restore(begin, state, iterator)
    elif checkpoint_start:
        checkpointer.save(0, state, iterator)
    if first and begin < train_steps:
        _write_info(model_dir, model, layout, metadata["gin"])

    writer = logging.MetricWriter(os.path.join(model_dir, "train"), first, tensorboard, begin)
    trace = None
    if profile:
        folder = os.path.join(model_dir, "profile")
        trace = profiling.Trace(folder, *profile_steps, train_steps - begin)
    progress = logging.Progress(train_steps, begin, first)
    origin = f"resuming at step {begin}" if begin else f"from {source}" if source else "fresh"
    progress.say(
        f"{_describe(model, layout)}\ntraining on {mixture_or_task_name}, {origin}, to step "
        f"{train_steps}, on {profiling.describe_job(mesh, state, frozen)}"
    )
    if own and stored is not None:
        changed = launch.changed_settings(stored["gin"], metadata["gin"])
        if changed:
            progress.say(
                f"settings are not those that the run was begun with: {'; '.join(changed)}"
            )
        if begin >= train_steps:
            progress.say(f"nothing is left to do: {model_dir} has step {begin}")
    spent = profiling.Spent()
    steps: list[profiling.Program] = []

    def begun(program: profiling.Program) -> None:
        steps.append(program)
        progress.say(f"{program.describe()}, compiled in {spent.seconds['compilation']:.1f}s")

    eval_writers: dict[str, logging.MetricWriter] = {}
    told: list[int] = []

    def log(step: int, sums: dict[str, float]) -> None:
        trimmed = iterator.stats["too_long"]
        figures = logging.summarize(sums)
        figures["too_long"] = sum(sum(counts.values()) for counts in trimmed.values())
        writer.write(step, figures)
        progress.update(step, figures)
        if trimmed and not told:
            told.append(step)
            progress.say(
                f"examples longer than {dict(task_feature_lengths)} tokens are cut, so far: {trimmed}; "
                "raise TASK_FEATURE_LENGTHS, or refuse them by on_too_long = 'error'"
            )

    def save(step: int, state: TrainState) -> None:
        checkpointer.save(step, state, iterator)

    def evaluate(step: int, state: TrainState) -> None:
        for task in eval_tasks:
            batches = _eval_batches(
                pipeline,
                task,
                eval_split,
                model,
                eval_space,
                task_feature_lengths,
                batch_size,
                shares[jax.process_index()],
                use_cached_tasks,
            )
            sums = trainer.evaluate(state, frozen, itertools.islice(batches, eval_steps))
            if task not in eval_writers:
                folder = os.path.join(model_dir, "training_eval", task)
                eval_writers[task] = logging.MetricWriter(folder, first, tensorboard, begin)
            eval_writers[task].write(step, logging.summarize(sums))

    def batches() -> Iterator[Any]:
        for batch in iterator:
            checks.check_ids(batch, getattr(model.network, "config", None), space)
            yield batch

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        for closing in (progress, writer, checkpointer, *([trace] if trace else [])):
            stack.callback(closing.close)
        state, step = fit(
            trainer,
            state,
            frozen,
            batches(),
            train_steps,
            log_every=log_period,
            log=log,
            save_every=checkpoint_period,
            save=save,
            eval_every=eval_period if eval_steps else 0,
            evaluate=evaluate,
            stop=stop,
            begin=begun,
            spent=spent,
            trace=trace,
        )
        if steps:
            progress.say(spent.describe(steps[0].flops, mesh.devices.flatten()))
    for eval_writer in eval_writers.values():
        eval_writer.close()
    if step < train_steps:
        progress.say(
            f"stopped by {stop.received or 'another process'} and saved at step {step} of "
            f"{train_steps}; run the same command again to resume"
        )
    elif export_dir is not None:
        params = partitioning.whole(optimizers.combine(state.trained, frozen))
        if first:  # the vocabularies of all tasks fit the base
            _export(export_dir, model, params, registry.tasks_of(mixture_or_task_name)[0])
    return state


def _describe(model: Any, layout: initialize.Layout) -> str:
    """What trains: the adapted layers, or just the numbers of parameters."""
    if model.adapted is not None:
        params = optimizers.combine(layout.trained, layout.frozen)
        added, base = adapters.split(params, model.adapted)
        _, others = adapters.split(layout.trained, model.adapted)
        return adapters.table(added, model.adapted, base, layout.rates, others)
    trained, frozen = (
        sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
        for tree in (layout.trained, layout.frozen)
    )
    return f"no adapters; trained {trained:,}  frozen {frozen:,}"


def _write_info(model_dir: str, model: Any, layout: initialize.Layout, config: str) -> None:
    flat = [traverse_util.flatten_dict(t, sep="/") for t in (layout.trained, layout.frozen)]
    parts = (_describe(model, layout), logging.parameter_table(*flat), str(model))
    folder = pathlib.Path(model_dir)
    (folder / "model-info.txt").write_text("\n\n".join(parts) + "\n")
    (folder / "config.gin").write_text(config)


def _eval_batches(
    pipeline: Any,
    task: str,
    split: str,
    model: Any,
    space: FeatureSpace,
    lengths: Any,
    batch_size: int,
    rows: Sequence[int],
    use_cached: bool,
) -> Iterator[Any]:
    from modjax.data import checks

    batches = pipeline.eval_batches(
        task,
        split,
        space,
        task_feature_lengths=lengths,
        batch_size=batch_size,
        rows=rows,
        converter=model.converter,
        use_cached=use_cached,
    )
    for batch, _ in batches:
        checks.check_ids(batch, getattr(model.network, "config", None), space)
        yield {name: rows for name, rows in batch.items() if name != "valid"}


def _export(folder: str, model: Any, params: Any, task: str) -> None:
    import seqio

    from modjax import hub
    from modjax.data import vocabularies

    hub.save_base(folder, model.network.config, params)
    vocabularies.save(seqio.TaskRegistry.get(task).output_features["inputs"].vocabulary, folder)


def main(argv: Sequence[str]) -> int:
    """Runs `train` as flags and gin files say; returns the exit status."""
    from modjax import fewshot

    description = "Trains a model; see gin_configs/runs."
    return launch.run(argv, description, "train", train, instead=[fewshot.adapt])


if __name__ == "__main__":
    # The gin files bind train.train: the module of that name, not this script's __main__.
    sys.exit(importlib.import_module("train").main(sys.argv[1:]))
