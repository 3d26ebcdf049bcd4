"""The generated benchmark in words: the bases, trainings and scores that studies are made of.

A base is a T5 of 0.87 million parameters that learnt to translate between invented languages, and to copy; how much of
translation is a dial. One training of an adapter takes a minute of a core. See `tasks.babel_words` for the texts.
"""

import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import study, trainings
from benchmarks.trainings import Settings

HERE = pathlib.Path(__file__).resolve().parent
# The base's cross-lingual strength: the share of the directed language pairs that it learnt to translate.
BASES = {"all": 1.0, "some": 0.15, "none": 0.0}
EXAMPLES = {"validation": 30, "test": 50}


@functools.cache
def register(output: pathlib.Path, prefix: str, dials: tuple[tuple[str, Any], ...]) -> None:
    """Registers a world of words, see `tasks.babel.register`.

    Args:
      output: a folder; its tokenizer is written there.
      prefix: of all its names.
      dials: fields of its BabelConfig that are not the benchmark's own.
    """
    from tasks import babel, babel_words
    from tasks.babel_examples import Babel
    from tasks.babel_world import BabelConfig

    config = BabelConfig(**dict(dials))
    world = Babel(config)
    output.mkdir(parents=True, exist_ok=True)
    # Every process of a study writes it, the same, and none may read half of it.
    file, partial = output / f"{prefix}.json", output / f"{prefix}.{os.getpid()}"
    babel_words.write_tokenizer(world, partial)
    os.replace(partial, file)
    copied = functools.partial(babel_words.copy_examples, world)
    babel.register(config, prefix, babel_words.vocabulary(file), copied)


def pretrain(base: str, settings: Settings) -> study.Found:
    """Makes a base; gives `validation`, how well it translates from other languages."""
    prefix, folder = f"pretrain_{base}", settings.base(base)
    register(settings.output, prefix, (("pretrain_pairs", BASES[base]),))
    macros = {
        "MIXTURE_OR_TASK_NAME": f"{prefix}_pretrain_bytes",
        "MODEL_DIR": folder + "_training",
        "EXPORT_DIR": folder,
        "train.train.tensorboard": False,
    }
    trainings.train(("methods/full.gin", str(HERE / "pretrain.gin")), macros, (), settings)
    macros = {"MIXTURE_OR_TASK_NAME": f"{prefix}_pretrain", "BASE": folder, "CHECKPOINT_PATH": None}
    macros["EVAL_OUTPUT_DIR"] = folder + "_eval"
    found = _score(("bases/folder.gin", "methods/full.gin"), macros, settings, "validation")
    return {"validation": {name: v for name, v in found.items() if name.startswith("translate")}}


def by_dataset(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Exact match of an evaluation's rows, by dataset."""
    rows = [row for row in rows if row["metric"] == "exact_match"]
    return {f"{row['task']} {row['language']}": round(row["value"], 2) for row in rows}


def adapt(
    files: Sequence[str],
    bindings: Sequence[str],
    world: str,
    base: str,
    folder: pathlib.Path,
    rate: float,
    seed: int,
    settings: Settings,
    off: Sequence[str] = (),
) -> study.Found:
    """Trains a method on the datasets of a world that are seen, and scores it.

    Args:
      files, bindings: gin files and bindings of the method.
      world: the prefix that it is registered under.
      base: of BASES.
      folder: of the training and its evaluations.
      rate, seed: of the training.
      settings: the study's.
      off: features that are switched off, one at a time, for a further test each.

    Returns:
      What `trainings.train` gives; `validation` of the seen datasets; `test` of all; and `<feature>_off`, the test with
      a feature off on seen datasets and unseen pairs.
    """
    macros = {"MIXTURE_OR_TASK_NAME": f"{world}_train", "BASE": settings.base(base)}
    macros |= {"MODEL_DIR": str(folder), "RANDOM_SEED": seed, "LEARNING_RATE": rate}
    files = ("bases/folder.gin", *files)
    found = trainings.train((*files, str(HERE / "adapt.gin")), macros, bindings, settings)

    def scored(name: str, mixture: str, split: str, **more: Any) -> None:
        to = {"MIXTURE_OR_TASK_NAME": mixture, "EVAL_OUTPUT_DIR": str(folder / name)}
        to |= {"BASE": settings.base(base), "CHECKPOINT_PATH": str(folder)}
        found[name] = _score(files, to | more, settings, split, bindings)

    scored("validation", f"{world}_eval_seen", "validation")
    scored("test", f"{world}_eval", "test")
    for feature in off:
        where = dict.fromkeys(("seen", "unseen_pair"), (feature,))
        scored(f"{feature}_off", f"{world}_eval", "test", **{"eval.evaluate.switch_off": where})
    return found


def _score(
    files: Sequence[str],
    macros: Mapping[str, Any],
    settings: Settings,
    split: str,
    bindings: Sequence[str] = (),
) -> dict[str, float]:
    files, number = (*files, str(HERE / "eval.gin")), EXAMPLES[split]
    return by_dataset(trainings.score(files, macros, settings, split, number, bindings))
