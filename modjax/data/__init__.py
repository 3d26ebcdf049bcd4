"""Data: tasks with features, mixtures, and batches, on SeqIO and tf.data.

Importing this package imports tensorflow, which is kept quiet and off the accelerators: those
belong to jax, and tensorflow would otherwise take their memory.
"""

import contextlib
import os
import re
import sys

from modjax import quiet

# What tensorflow's C++ says about the machine while it starts, whatever its log level.
_NOISE = re.compile(rb"[IWE]\d{4} |WARNING: All log messages before absl|To enable the following")


if "tensorflow" not in sys.modules:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

with quiet.held_stderr(lambda line: not _NOISE.match(line)):
    import seqio  # noqa: F401
    import tensorflow as tf

    for _kind in ("GPU", "TPU"):
        # RuntimeError: somebody used tensorflow before us, and its devices are fixed.
        with contextlib.suppress(RuntimeError):
            tf.config.set_visible_devices([], _kind)
    tf.constant(0)  # the rest of what it says, it says at its first operation
