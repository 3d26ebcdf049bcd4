"""One process of a job that does several things: job.py ENTRY FLAG... [--then ENTRY FLAG...]..."""

import importlib
import os
import pathlib
import sys

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]
words = sys.argv[1:]
while words:
    end = words.index("--then") if "--then" in words else len(words)
    (entry, *flags), words = words[:end], words[end + 1 :]
    if status := importlib.import_module(entry).main(flags):
        sys.exit(status)
    os.environ.pop("JAX_PROCESS_COUNT", None)  # it has joined
