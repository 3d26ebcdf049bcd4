"""Babel as SeqIO tasks and mixtures, with their features, registered under `babel` on import.

Tasks, each with metadata {"task": ..., "language": ...}:
  babel_parse_te, babel_tag_te, babel_translate_te, babel_qa_te, ...: see `tasks.babel_examples`
  babel_pretrain_translate_te, babel_pretrain_fill_te, ...: the base's text, by target language
Mixtures:
  babel_train                 what adapters train on, every dataset at the same rate
  babel_eval_seen             the same datasets
  babel_eval_unseen_pair      task and language are trained, but not together
  babel_eval_unseen_language  no adapter has seen the language; the base knows it from pretraining
  babel_eval                  all three
  babel_pretrain              translation among all pairs and span corruption, never a parse
  babel_pretrain_bytes        the same with a share of random ASCII to copy, see `copy_examples`
Datasets that are not trained have no train split, so that no mixture can train them by accident.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import seqio

from modjax.data import registry
from modjax.data.sources import ExamplesSource
from tasks.babel_examples import SPLITS, Babel
from tasks.babel_world import BabelConfig

FEW = "few"  # the training examples of datasets that are held out from training
VOCABULARY = seqio.ByteVocabulary()
# Copying, against all other text, in babel_pretrain_bytes.
COPY_SHARE = 0.25
METRICS = {
    "copy": ("exact_match",),
    "parse": ("exact_match", "inexact_match", "structure_match", "malformed"),
    "tag": ("exact_match", "span_f1"),
    "translate": ("exact_match", "chrf"),
    "qa": ("exact_match", "token_f1"),
    "fill": ("exact_match",),
}


def register(
    config: BabelConfig | None = None,
    prefix: str = "babel",
    vocabulary: seqio.Vocabulary = VOCABULARY,
    copy: Callable[[str], Iterator[Mapping[str, str]]] | None = None,
) -> Babel:
    """Registers a configuration's tasks, and those of the mixtures that are not empty.

    Args:
      config: the dials; the benchmark's own by default.
      prefix: of all names. Another configuration needs another prefix, or `unregister` first.
      vocabulary: of inputs and targets; bytes by default.
      copy: gives a split's texts to copy, see `Babel.copy_examples`, which it stands for.

    Raises:
      ValueError: the prefix is taken, or the configuration is inconsistent.
    """
    babel = Babel(config)
    add = partial(_add, vocabulary)
    settings: dict[str, list[str]] = {"seen": [], "unseen_pair": [], "unseen_language": []}
    for (task, code), setting in babel.datasets().items():
        name = f"{prefix}_{task}_{code}"
        # What is held out from training has its training examples under another name, to take shots from.
        sources = {"train" if setting == "seen" else FEW: "train"} | {s: s for s in SPLITS[1:]}
        examples = {s: partial(_rows, babel.examples, task, code, of) for s, of in sources.items()}
        add(name, task, code, examples)
        settings[setting].append(name)
    registry.add_mixture(f"{prefix}_train", settings["seen"])
    for setting, names in settings.items():
        if names:
            registry.add_mixture(f"{prefix}_eval_{setting}", names)
    registry.add_mixture(f"{prefix}_eval", [name for names in settings.values() for name in names])

    fill = babel.config.pretrain_fill
    rates = []
    for kind, rate in (("translate", 1 - fill), ("fill", fill)):
        for code in babel.pretrain_pairs() if rate else ():
            name = f"{prefix}_pretrain_{kind}_{code}"
            make = partial(_rows, babel.pretrain_examples, kind, code)
            add(name, kind, code, {s: partial(make, s) for s in SPLITS})
            rates.append((name, rate))
    registry.add_mixture(f"{prefix}_pretrain", rates)
    name = f"{prefix}_pretrain_copy"
    add(name, "copy", None, {s: partial(_rows, copy or babel.copy_examples, s) for s in SPLITS})
    whole = sum(rate for _, rate in rates)
    registry.add_mixture(f"{prefix}_pretrain_bytes", [*rates, (name, COPY_SHARE * whole)])
    return babel


def unregister(prefix: str) -> None:
    """Forgets every task and mixture that `register` made under the prefix."""
    for names in (seqio.MixtureRegistry.names(), seqio.TaskRegistry.names()):
        for name in [n for n in names if n.startswith(f"{prefix}_")]:
            registry.remove(name)


def _rows(examples, *key):
    return [
        {
            field: row[field]
            for field in ("inputs", "targets", "meaning_id", "source")
            if field in row
        }
        for row in examples(*key)
    ]


def _add(vocabulary, name, task, code, splits):
    feature = seqio.Feature(vocabulary, add_eos=True)
    registry.add_task(
        name,
        ExamplesSource(splits),
        [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
        {"inputs": feature, "targets": feature},
        metadata={"task": task, "language": code},
        metric_names=METRICS[task],
    )


BABEL = register()
