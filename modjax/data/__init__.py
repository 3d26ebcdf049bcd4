"""Data: tasks with features, mixtures, and batches, on SeqIO and tf.data.

Importing this package imports tensorflow, which is kept quiet and off the accelerators: those
belong to jax, and tensorflow would otherwise take their memory.
"""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator

# What tensorflow's C++ says about the machine while it starts, whatever its log level.
_NOISE = re.compile(rb"[IWE]\d{4} |WARNING: All log messages before absl|To enable the following")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Holds back the file descriptor of stderr, then passes on what is not tensorflow's chatter."""
    try:
        sys.stderr.flush()
        saved = os.dup(2)
    except (OSError, AttributeError):  # there is no stderr
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            held.seek(0)
            os.write(2, b"".join(line for line in held if not _NOISE.match(line)))


if "tensorflow" not in sys.modules:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

with _quiet():
    import seqio  # noqa: F401
    import tensorflow as tf

    for _kind in ("GPU", "TPU"):
        # RuntimeError: somebody used tensorflow before us, and its devices are fixed.
        with contextlib.suppress(RuntimeError):
            tf.config.set_visible_devices([], _kind)
    tf.constant(0)  # the rest of what it says, it says at its first operation
