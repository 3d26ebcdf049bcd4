"""The vocabulary of tasks that are written in the tokens of a base: that of the base's own folder."""

import os

import gin
import seqio

from modjax.data import vocabularies

VARIABLE = "MODJAX_BASE"


@gin.configurable
def vocabulary(path: str | None = None) -> seqio.Vocabulary:
    """The vocabulary in a base's folder: in `path`, else in that of the environment variable MODJAX_BASE.

    In gin: `tasks.tokenizer.vocabulary.path = %BASE`, beside MIXTURE_OR_TASK_MODULE with the tasks that call this.

    Raises:
      ValueError: neither is set.
      HubError: the folder has no tokenizer that can be used.
    """
    path = path or os.environ.get(VARIABLE)
    if not path:
        raise ValueError(
            "No base whose tokens the tasks are in: bind `tasks.tokenizer.vocabulary.path = %BASE` in the run's gin "
            f"file, or set the environment variable {VARIABLE} to the base's folder."
        )
    return vocabularies.vocabulary_of(path)
