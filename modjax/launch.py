"""What the entry points share: flags, gin files, and the processes of a multi-host job.

`train.py`, `eval.py` and `fewshot.py` import this module, and gin is imported when it is used: the
core does without.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import logging
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import modjax
from modjax import compilation_cache, mistakes, processes
from modjax.errors import ConfigError, nearest

# What a binding on the command line may name without an import of its own.
_IMPORTS = {
    "adapters": "from modjax import adapters",
    "fewshot": "from modjax import fewshot",
    "initialize": "from modjax import initialize",
    "decoder": "from modjax.networks import decoder",
    "encoder": "from modjax.networks import encoder",
    "launch": "from modjax import launch",
    "models": "from modjax import models",
    "optimizers": "from modjax import optimizers",
    "partitioning": "from modjax import partitioning",
    "t5": "from modjax.networks import t5",
}
_HINTS = {
    "MODEL": "bases",
    "NETWORK": "bases",
    "MODULE": "methods",
    "METHOD": "methods",
    "OPTIMIZER": "runs",
    "TRAIN_STEPS": "runs",
    "DROPOUT_RATE": "runs",
}
CONFIGS = pathlib.Path(modjax.__file__).resolve().parent.parent / "gin_configs"


@dataclasses.dataclass(frozen=True)
class Flags:
    """The command line.

    Attributes:
      gin_files: in the order given.
      bindings: "NAME = value", in the order given; they win over the files.
      search_paths: where gin files are looked for, after the current folder and before
        `gin_configs`.
      coordinator_address, process_count, process_index: of a multi-host job, None where they are
        to be found, see `modjax.processes`.
      compilation_cache: a folder for compiled programs, see `modjax.compilation_cache`.
      cache_dirs: where SeqIO looks for cached tasks, besides its usual places.
      tfds_data_dir: where TensorFlow Datasets lie.
    """

    gin_files: tuple[str, ...]
    bindings: tuple[str, ...]
    search_paths: tuple[str, ...]
    coordinator_address: str | None = None
    process_count: int | None = None
    process_index: int | None = None
    compilation_cache: str | None = None
    cache_dirs: tuple[str, ...] = ()
    tfds_data_dir: str | None = None


def parse_flags(argv: Sequence[str], description: str) -> Flags:
    """Reads --gin_file=F (repeated), --gin.NAME=VALUE, --gin_search_paths=A,B, --profile, --compilation_cache=F,
    --seqio_additional_cache_dirs=A,B, --tfds_data_dir=F and the flags of multi-host jobs.

    Raises:
      ConfigError: an unknown flag.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--gin_file", action="append", default=[], help="may be repeated")
    parser.add_argument("--gin_search_paths", default="", help="folders, separated by commas")
    parser.add_argument("--coordinator_address", help="HOST:PORT of process 0")
    parser.add_argument("--process_count", type=int, help="1: run alone")
    parser.add_argument("--process_index", type=int, help="from 0")
    parser.add_argument("--seqio_additional_cache_dirs", default="", help="folders, by commas")
    parser.add_argument("--tfds_data_dir", help="of TensorFlow Datasets")
    parser.add_argument("--compilation_cache", help="folder of compiled programs, or off")
    parser.add_argument("--profile", action="store_true", help="a trace in MODEL_DIR/profile")
    parser.add_argument("--traceback", action="store_true", help="where a mistake was found")
    parser.epilog = (
        "--gin.NAME=VALUE sets a macro or a parameter; VALUE is Python ('text' in quotes)."
    )
    args, rest = parser.parse_known_args(argv)
    bindings = []
    known = [action.option_strings[-1] for action in parser._actions] + ["--gin.NAME=VALUE"]
    for text in rest:
        match = re.fullmatch(r"--gin\.([^=\s]+)\s*=\s*(.*)", text, re.DOTALL)
        if match is None:
            raise ConfigError(f"unknown flag {text!r}.{nearest(text.split('=')[0], known)}")
        bindings.append(f"{match[1]} = {match[2]}")
    if args.profile:
        bindings.append("train.train.profile = True")
    return Flags(
        tuple(args.gin_file),
        tuple(bindings),
        tuple(path for path in args.gin_search_paths.split(",") if path),
        args.coordinator_address,
        args.process_count,
        args.process_index,
        args.compilation_cache,
        tuple(path for path in args.seqio_additional_cache_dirs.split(",") if path),
        args.tfds_data_dir,
    )


def run(
    argv: Sequence[str],
    description: str,
    entry: str,
    function: Callable[..., Any],
    instead: Sequence[Callable[..., Any]] = (),
) -> int:
    """What an entry point does: reads flags and gin files, joins the job, calls the function.

    A user's mistake and a loss that is not finite end in one message, not in a trace, unless
    --traceback asks for it.

    Args:
      argv: the command line.
      description: of the entry point.
      entry: its module, see `load_gin`.
      function: configured by gin; is given `operative_config`.
      instead: functions that are called instead if a gin file configures them.

    Returns:
      The exit status.
    """
    import gin

    bindings: list[mistakes.Binding] = []
    try:
        flags = parse_flags(argv, description)
        if "--profile" in argv and entry != "train":
            raise ConfigError("--profile is a flag of train.py, which traces steps of training")
        start_processes(flags)
        compilation_cache.enable(flags.compilation_cache)
        _find_data(flags)
        load_gin(flags, entry)
        bindings = list(_bindings(flags))
        for other in instead:
            if _is_configured(gin, f"{other.__module__.rpartition('.')[2]}.{other.__name__}"):
                function = other
        if function not in instead:
            _check_configured(gin, f"{entry}.{function.__name__}")
        # A few-shot job has made everything only at its end.
        last = function in instead
        config = partial(operative_config, flags, not last)
        if gin.get_configurable(function)(operative_config=config) and last:
            operative_config(flags)
    except Exception as error:
        if "--traceback" in argv or not mistakes.is_users(error):
            raise
        print(f"error: {mistakes.tell(error, bindings, function.__name__)}", file=sys.stderr)
        return 2
    return 0


def _find_data(flags: Flags) -> None:
    """Tells SeqIO where cached tasks and TensorFlow Datasets lie."""
    if not (flags.cache_dirs or flags.tfds_data_dir):
        return
    import seqio

    for folder in flags.cache_dirs:
        if not os.path.isdir(folder) and "://" not in folder:
            raise ConfigError(f"--seqio_additional_cache_dirs: there is no folder {folder!r}")
    if flags.cache_dirs:
        seqio.add_global_cache_dirs(list(flags.cache_dirs))
    if flags.tfds_data_dir:
        seqio.set_tfds_data_dir_override(flags.tfds_data_dir)


def start_processes(flags: Flags) -> None:
    """Joins the other processes of a multi-host job, as the flags or the cluster say, and says which
    of them said so; does nothing for a single process.

    Raises:
      ConfigError: as `processes.find` and `processes.join`.
    """
    job = processes.find(
        os.environ, flags.coordinator_address, flags.process_count, flags.process_index
    )
    if job is None:
        return
    # Said before, by each: where one waits in vain, this tells which ones are there.
    print(f"joining the other processes of this job, known by {job.origin}", file=sys.stderr)
    processes.join(job)
    import jax

    print(
        f"process {jax.process_index()} of {jax.process_count()}, with {jax.local_device_count()} of "
        f"{jax.device_count()} devices",
        file=sys.stderr,
    )


def load_gin(flags: Flags, entry: str) -> None:
    """Parses the gin files in order and then the bindings, and checks the whole before anything
    runs.

    Args:
      flags: the command line.
      entry: the entry point's module, "train" or "eval", which bindings may name.

    Raises:
      ConfigError: a missing file, a name or parameter that does not exist, a macro that is used and
        not set, required and not given, or set and not used. The message names it and the nearest
        known one. Also two methods, and a file that later ones leave without effect.
    """
    import gin

    gin.clear_config(clear_constants=True)
    folders = _folders(flags)
    for folder in folders[1:]:
        if folder not in gin.config._LOCATION_PREFIXES:
            gin.add_config_file_search_path(folder)
    files = [_find(name, folders) for name in flags.gin_files]
    imports = {entry: f"import {entry}", **_IMPORTS}
    if any("fewshot" in name for name in flags.gin_files):
        imports["eval"] = "import eval"  # a few-shot job does both
    bindings = ["from __gin__ import dynamic_registration", *imports.values(), *flags.bindings]
    # gin reports each folder in which an included file does not lie; whether it lies nowhere, the
    # exception says.
    root = logging.getLogger()
    root.addFilter(_is_not_path_miss)
    readers = gin.config._FILE_READERS
    before = list(readers)
    readers[:] = [(read, _quietly(exists)) for read, exists in before]
    try:
        gin.parse_config_files_and_bindings(files, bindings, finalize_config=False)
        _check_files(flags)
        _check_macros(gin, flags)
        gin.finalize()
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(mistakes.explain_parse(error, folders, imports)) from error
    finally:
        root.removeFilter(_is_not_path_miss)
        readers[:] = before


def _bindings(flags: Flags) -> Iterator[mistakes.Binding]:
    """Every binding that `load_gin` has read, in that order."""
    find = partial(_find, folders=_folders(flags))
    for name in flags.gin_files:
        yield from mistakes.read_bindings(find(name), find)
    for binding in flags.bindings:
        name, _, value = binding.partition(" = ")
        yield mistakes.Binding(name, value, "on the command line")


def _quietly(exists: Callable[[str], bool]) -> Callable[[str], bool]:
    """A gin file reader's check that says no where it would fail: gin takes the folder of 'runs/x.gin'
    for a Python package, and a folder `runs` of the user's is one without a file.
    """

    def check(path: str) -> bool:
        try:
            return exists(path)
        except TypeError:
            return False

    return check


def _is_not_path_miss(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Path not found")


def _folders(flags: Flags) -> list[str]:
    return [os.getcwd(), *flags.search_paths, str(CONFIGS)]


def _find(name: str, folders: Iterable[str]) -> str:
    for folder in folders:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            return path
    known = []
    for folder in folders:
        root = pathlib.Path(folder)
        if root.is_dir() and (root == CONFIGS or root != pathlib.Path.cwd()):
            known += [str(path.relative_to(root)) for path in sorted(root.rglob("*.gin"))]
    raise ConfigError(
        f"no gin file {name!r} in {', '.join(folders)}."
        + nearest(name, list(dict.fromkeys(known)), 40)
    )


def _is_configured(gin: Any, name: str) -> bool:
    return any(f".{selector}".endswith(f".{name}") for _, selector in gin.config._CONFIG)


def _check_configured(gin: Any, name: str) -> None:
    if not _is_configured(gin, name):
        raise ConfigError(
            f"no gin file is about {name}: a job is a base, a method and a run (--gin_file=F each)"
        )


def _check_files(flags: Flags) -> None:
    """Two methods would mix without a word, and so would a file be lost all of whose settings later ones set anew."""
    find = partial(_find, folders=_folders(flags))
    given = [(name, list(mistakes.read_bindings(find(name), find))) for name in flags.gin_files]
    before, known = "", set[str]()
    for name, bindings in given:
        places = (b.where.rpartition(", line ")[0] for b in bindings if b.name == "METHOD")
        methods = {os.path.realpath(place) for place in places}
        if methods and not known <= methods:  # a file may come after one that it includes
            raise ConfigError(
                f"{before} and {name} are two methods, whose settings would mix: give one of them"
            )
        before, known = (name, methods) if methods else (before, known)
    for i, (name, bindings) in enumerate(given):
        last = {b.name: b.value for b in bindings}
        later = {b.name: (b.value, other) for other, more in given[i + 1 :] for b in more}
        if last and all(key in later and later[key][0] != last[key] for key in last):
            key, other = next((key, later[key][1]) for key in last)
            raise ConfigError(
                f"{name} has no effect, as {other} sets {key}, too, and comes after it: give {name} last"
            )


def _check_macros(gin: Any, flags: Flags) -> None:
    """Macros that nothing refers to are misspelt; macros that nothing sets are missing.

    What `recipes/loss.gin` sets for all bases may be left unused: by a binding of what it is for, or by a base that has
    no such thing.
    """
    config = gin.config._CONFIG
    selector = "gin.macro"
    given = {scope: values for (scope, name), values in config.items() if name == selector}
    used = {
        reference.scoped_selector.rsplit("/", 1)[0]
        for reference in gin.config.iterate_references(config)
        if reference.selector == selector
    }
    # A whole file that is missing is told by a macro that every file of its kind sets.
    for name in sorted(used - set(given), key=lambda name: (name not in _HINTS, name)):
        hint = f" (a file of gin_configs/{_HINTS[name]} sets it)" if name in _HINTS else ""
        raise ConfigError(f"the macro {name} is used but not set{hint}.{nearest(name, given)}")
    if idle := set(given) - used:
        recipe = str(CONFIGS / "recipes" / "loss.gin")
        elsewhere = {b.name for b in _bindings(flags) if not b.where.startswith(recipe)}
        for name in sorted(idle & elsewhere):
            raise ConfigError(
                f"the macro {name} is set but nothing uses it.{nearest(name, sorted(used))}"
            )
    for name, values in sorted(given.items()):
        value = values.get("value")
        if isinstance(value, gin.config.ConfigurableReference) and "REQUIRED" in repr(value):
            raise ConfigError(f"{name} must be set: --gin.{name}=VALUE")


def operative_config(flags: Flags, check: bool = True) -> str:
    """The configuration as it was used, once all objects are made; may be given as a gin file again.

    Raises:
      ConfigError: a parameter set on the command line belongs to something that this run never
        made, so that the setting would have no effect.
    """
    import gin

    text = gin.operative_config_str()
    for binding in flags.bindings if check else ():
        name = binding.partition(" = ")[0].rpartition("/")[2]
        ending = ".".join(name.split(".")[-2:])
        if "." in name and not re.search(rf"(^|[./]){re.escape(ending)} =", text, re.MULTILINE):
            raise ConfigError(
                f"{name} is set but this run does not use {name.rpartition('.')[0]}, "
                "so it would have no effect"
            )
    return text


# What a run may do otherwise when it goes on: how long, where, and how it is watched and computed.
_OWN_OF_A_SITTING = re.compile(
    r"\w*_(DIR|PATH|PERIOD|STEPS|MODULE)|MICROBATCHES|FSDP|MODEL_PARALLEL|REMAT_POLICY"
    r"|(train\.train|partitioning|eval|fewshot)\..*"
)


def changed_settings(before: str, now: str) -> list[str]:
    """What two configurations of a run (as by `operative_config`) set otherwise, beyond what a sitting may choose.

    Returns:
      For each such parameter or macro that both set: "NAME = VALUE, was VALUE".
    """
    old, new = map(_values, (before, now))
    return [
        f"{name} = {value}, was {old[name]}"
        for name, value in new.items()
        if old.get(name, value) != value and not _OWN_OF_A_SITTING.fullmatch(name)
    ]


def _values(config: str) -> dict[str, str]:
    """The values in a configuration's text, which may go on in indented lines."""
    found = re.findall(r"^([\w./]+) = (.*(?:\n[ \t]+.*)*)", config, re.MULTILINE)
    return {name: " ".join(value.replace("\\", " ").split()) for name, value in found}


def import_tasks(modules: str | Sequence[str] | None) -> None:
    """Imports the modules that register tasks; the current folder is on the path.

    They may define what gin configures, though gin's configuration is complete by now.

    Raises:
      ConfigError: naming the module that does not exist.
    """
    import gin

    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for name in [modules] if isinstance(modules, str) else modules or ():
        try:
            with gin.unlock_config():
                importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name and not name.startswith(error.name):
                raise
            raise ConfigError(
                f"MIXTURE_OR_TASK_MODULE: no module {name!r} on the path ({error})"
            ) from error


def config_of(
    path: str | None,
    network: str | None = None,
    dropout_rate: float = 0.0,
    scan_layers: bool = False,
    remat_policy: str = "none",
    attention: str = "auto",
    dtype: str = "float32",
    head: str | None = None,
    num_outputs: int | None = None,
) -> Any:
    """The configuration of the network whose weights lie in a folder, and what a run chooses beside
    it.

    Args:
      path: a folder as `modjax.hub.load_base` reads it.
      network: the kind that it must be: "t5", "decoder" or "encoder".
      dropout_rate, scan_layers, remat_policy, attention, dtype: see the kind's configuration.
      head, num_outputs: of an encoder, see `networks.encoder.EncoderConfig`; the folder's own if None.

    Raises:
      ConfigError: no path.
      HubError: the folder holds another kind of network, or none.
    """
    from modjax import hub, initialize

    if path == initialize.RANDOM:
        raise ConfigError(
            "bases/folder.gin and its like read sizes from the folder BASE, and 'random' is none: take the file of a "
            "size, as bases/t5_small.gin"
        )
    run = {
        "dropout_rate": dropout_rate,
        "scan_layers": scan_layers,
        "remat_policy": remat_policy,
        "attention": attention,
        "dtype": dtype,
    }
    config = hub.config_of(_base(path), network, **run)
    if head is None and num_outputs is None:
        return config
    if head is None:
        # RoBERTa and XLM-R, whose positions begin later, have two layers.
        usual = "pooled" if config.pooler and not config.position_offset else "dense"
        head = usual if config.head == "none" else config.head
    return dataclasses.replace(config, head=head, num_outputs=num_outputs or config.num_outputs)


def token_id(path: str | None, name: str) -> int | None:
    """The id of a special token of the base in a folder, counted as in our batches; None if it has no such token.

    Args:
      path: the folder, with its tokenizer.
      name: "bos", "eos" or "sep".

    Raises:
      ConfigError: no path, or no tokenizer in the folder.
    """
    from modjax.hub import tokenizers

    found = tokenizers.describe(_base(path))
    if found is None:
        raise ConfigError(
            f"{path} has no tokenizer, so its {name} token is not known: put the tokenizer's files beside the weights, "
            "or set the token's id on the model."
        )
    return found.get(f"{name}_id")


def same_folder(one: str, other: str) -> bool:
    """Whether two paths name the same folder."""
    return pathlib.Path(one).resolve() == pathlib.Path(other).resolve()


def _base(path: str | None) -> str:
    if path is None:
        raise ConfigError("BASE must be set: --gin.BASE=VALUE, the folder of the base's weights")
    return path
