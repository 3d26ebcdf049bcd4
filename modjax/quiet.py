"""Libraries that write to the file descriptor of stderr, past Python's, and how they are kept from it."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def held_stderr(passes: Callable[[bytes], bool] = lambda line: False) -> Iterator[None]:
    """Holds back the file descriptor of stderr, and then writes those of the held lines that pass: none by default."""
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
            os.write(2, b"".join(line for line in held if passes(line)))
