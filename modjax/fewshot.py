"""Few-shot adaptation: the protocol that turns some shots, steps and seeds into scores.

A run of it trains on a few examples of a new task or language, starting from a multi-task checkpoint or from the base,
keeps checkpoints on the way, selects one of them by the validation split, and scores that one on the test split, which
the selection never saw. It trains by the model's loss alone: the choices that T0's protocol trains against each other
beside it (a softmax over them, and unlikelihood, arXiv 2205.05638) serve evaluation.
"""

import dataclasses
import json
import os
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from modjax import checkpoints, errors, launch


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a few-shot score is made.

    Attributes:
      shots: training examples of each dataset.
      steps: training steps.
      seeds: each draws its own shots, starts its own new parameters, and gives one score.
      validate_every: steps between the checkpoints that are candidates; the start (step 0) is one, too.
      train_split: where the shots are drawn from.
      validation_split, test_split: of the datasets.
      validation_examples: the first so many are used for the selection, all if None.
      metric: what is selected by, of those the datasets have; the mean over datasets where there are several.
    """

    shots: int = 32
    steps: int = 1000
    seeds: Sequence[int] = (0, 1, 2)
    validate_every: int = 100
    train_split: str = "train"
    validation_split: str = "validation"
    test_split: str = "test"
    validation_examples: int | None = None
    metric: str = "exact_match"

    def __post_init__(self) -> None:
        for name in ("shots", "steps", "validate_every"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"Protocol.{name} must be an integer of at least 1, got {value!r}."
                )
        if not isinstance(self.seeds, Sequence) or not self.seeds:
            raise ValueError(
                f"Protocol.seeds must list at least one seed, as (0, 1, 2), got {self.seeds!r}."
            )
        for seed in self.seeds:
            errors.check_integer("Protocol.seeds: each", seed, least=0)
        if self.validation_examples is not None:
            errors.check_integer("Protocol.validation_examples", self.validation_examples)
        if len(set(self.splits())) != 3:
            raise ValueError(
                f"Protocol: training, selection and test need three splits, got {self.splits()}."
            )

    def splits(self) -> tuple[str, str, str]:
        """The splits that every dataset needs."""
        return self.train_split, self.validation_split, self.test_split

    def candidates(self) -> list[int]:
        """The steps among which validation selects."""
        return sorted({0, *range(self.validate_every, self.steps, self.validate_every), self.steps})


def adapt(
    protocol: Protocol,
    train: Callable[..., Any],
    evaluate: Callable[..., list[dict[str, Any]]],
    mixture_or_task_name: str,
    model_dir: str,
    method: str,
    mixture_or_task_module: str | Sequence[str] | None = None,
    initial_checkpoint_path: str | None = None,
    operative_config: Callable[[], str] = str,
) -> list[dict[str, Any]]:
    """Adapts to the datasets of a mixture, together, with each seed of the protocol.

    Args:
      protocol: see there.
      train: `train.train` with everything bound that is the same for all seeds.
      evaluate: `eval.evaluate`, likewise.
      mixture_or_task_name: the new datasets.
      model_dir: gets a folder `seed_<n>` for each seed, with the run, its evaluations and `selection.json`; and
        `results.json`, with rows of the methods `<method>_0shots` (the start) and `<method>_<n>shots`.
      method: the name that results are reported under.
      mixture_or_task_module: registers the datasets.
      initial_checkpoint_path: what `train` starts from; its mixture says what the start has seen. A base has seen
        none.
      operative_config: gives the text that is kept with the checkpoints.

    Returns:
      The rows of results.json; those of the seeds that are done, if it was asked to stop. The same call goes on.

    Raises:
      ValueError: more shots than a dataset has examples, or a metric that the datasets do not have.
    """
    from modjax import hub
    from modjax.data import registry, shots
    from modjax.evaluation import report, results

    launch.import_tasks(mixture_or_task_module)
    checkpoints.check_writable(model_dir)
    tasks = registry.tasks_of(mixture_or_task_name)
    for task in tasks:
        registry.check_has(task, protocol.splits(), protocol.metric)
    # What was seen when nothing had been trained here yet.
    before: Any = ""
    if initial_checkpoint_path and not hub.is_base(initial_checkpoint_path):
        stored = checkpoints.read_metadata(initial_checkpoint_path)
        before = stored.get("trained_on", stored["mixture"])
    _keep(protocol, initial_checkpoint_path, pathlib.Path(model_dir))
    rows: list[dict[str, Any]] = []
    for seed in protocol.seeds:
        copies = {
            task: shots.few_shot_task(task, protocol.shots, seed, protocol.train_split)
            for task in tasks
        }
        folder = pathlib.Path(model_dir) / f"seed_{seed}"
        state = train(
            mixture_or_task_name=_mixture(registry, mixture_or_task_name, copies),
            operative_config=operative_config,
            model_dir=str(folder),
            train_steps=protocol.steps,
            random_seed=seed,
            checkpoint_period=protocol.validate_every,
            checkpoint_start=True,
            keep_checkpoints=None,
        )

        if int(jax.device_get(state.step)) < protocol.steps:
            return rows  # asked to stop; the run has said how to go on
        shared = {
            "mixture_or_task_name": mixture_or_task_name,
            "operative_config": operative_config,
            "seed": seed,
            "write_report": False,
        }
        curve = {}
        for step in protocol.candidates():
            found = evaluate(
                **shared,
                **_place(folder, step, protocol.validation_split),
                method=method,
                max_examples=protocol.validation_examples,
            )
            curve[step] = statistics.mean(
                row["value"] for row in found if row["metric"] == protocol.metric
            )
        chosen = _best(curve, protocol.metric)
        selection = {"metric": protocol.metric, "validation": curve, "selected": chosen}
        if jax.process_index() == 0:
            results.write_text(folder / "selection.json", json.dumps(selection, indent=1) + "\n")
        start = {"method": f"{method}_0shots", "train_mixture": before}
        place = _place(folder, 0, protocol.test_split)
        place["eval_output_dir"] += "_before"  # step 0 may be selected, too
        rows += evaluate(**shared, **place, **start)
        end = {"method": f"{method}_{protocol.shots}shots"}
        rows += evaluate(**shared, **_place(folder, chosen, protocol.test_split), **end)
    if jax.process_index() == 0:
        results.write(os.path.join(model_dir, "results.json"), rows)
        print(report.table(rows, [protocol.metric]))
    return rows


def _best(curve: Mapping[int, float], metric: str) -> int:
    """The step with the best value; of equals the first, for it is the fewest steps."""
    from modjax.evaluation import metrics

    sign = -1 if metric in metrics.LOWER_IS_BETTER else 1
    return max(curve, key=lambda step: (sign * curve[step], -step))


def _place(folder: pathlib.Path, step: int, split: str) -> dict[str, str]:
    """Which checkpoint is scored on which split, and where that is written."""
    return {
        "checkpoint_path": str(checkpoints.locate(folder, step)),
        "eval_output_dir": str(folder / "eval" / f"{split}_{step}"),
        "split": split,
    }


def _mixture(registry: Any, name: str, copies: Mapping[str, str]) -> str:
    """The task or mixture of the copies of all tasks of one."""
    if list(copies) == [name]:
        return copies[name]
    task, copy = next(iter(copies.items()))
    own = name + copy.removeprefix(task)  # what tells one draw of shots from another
    if registry.origin_of(own) == own:
        registry.add_mixture_copy(name, own, copies)
    return own


def _keep(protocol: Protocol, initial: str | None, folder: pathlib.Path) -> None:
    """Writes protocol and start into the folder, or refuses to go on there with others."""
    from modjax.evaluation import results

    mine = {k: v for k, v in dataclasses.asdict(protocol).items() if k != "seeds"}
    mine["initial_checkpoint_path"] = initial and str(pathlib.Path(initial).resolve())
    path = folder / "protocol.json"
    if path.exists():
        theirs = json.loads(path.read_text())
        for name, value in mine.items():
            if theirs.get(name, value) != value:
                told = f"Protocol.{name}" if hasattr(protocol, name) else name.upper()
                raise ValueError(
                    f"{folder} was begun with {told} = {theirs[name]!r}, not {value!r}: take "
                    "another MODEL_DIR"
                )
    elif jax.process_index() == 0:
        results.write_text(path, json.dumps(mine, indent=1) + "\n")
