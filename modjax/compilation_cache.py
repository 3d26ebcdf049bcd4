"""Compiled programs kept on disk, so that the next run of the same job does not compile them again."""

import os
import pathlib
import sys
import tempfile
from collections.abc import Mapping

OFF = "off"
VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def folder(flag: str | None, environment: Mapping[str, str]) -> str | None:
    """Where programs are kept: as the flag says, else jax's own variable, else in the user's cache; None for nowhere.

    Args:
      flag: a folder, or "off".
      environment: JAX_COMPILATION_CACHE_DIR (empty or "off" for nowhere), XDG_CACHE_HOME, HOME.
    """
    given = environment.get(VARIABLE) if flag is None else flag
    if given is not None:
        return None if given in ("", OFF) else given
    home = environment.get("XDG_CACHE_HOME") or os.path.join(environment.get("HOME", "~"), ".cache")
    return os.path.join(os.path.expanduser(home), "modjax", "compiled")


def enable(flag: str | None = None) -> str | None:
    """Keeps what this process compiles, and reads what others have; returns the folder, None if there is none.

    Nothing is lost but time where the folder cannot be used, so that a run goes on, with a message.
    """
    import jax
    import jax.experimental.compilation_cache.compilation_cache

    # What the process has set in jax is what it wants; jax has read the variable itself.
    set_already = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    path = folder(flag or set_already or None, os.environ)
    if path is not None and "://" not in path:
        path = os.path.abspath(os.path.expanduser(path))
        reason = _unusable(path)
        if reason is not None:
            print(
                f"compiled programs are not kept: {path}: {reason}. Another folder is given by --compilation_cache, "
                f"or {VARIABLE}; {OFF!r} is none",
                file=sys.stderr,
            )
            path = None
    if path != set_already:
        # jax opens its folder once, and then uses it whatever it is told.
        jax.experimental.compilation_cache.compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", path)
    if path is not None and "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # A start compiles dozens of small programs; together they take as long as the step.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return path


def _unusable(path: str) -> str | None:
    """Why nothing can be written to a folder, which is made if need be; None if it can."""
    try:
        pathlib.Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return None
    except OSError as error:
        return error.strerror or str(error)
