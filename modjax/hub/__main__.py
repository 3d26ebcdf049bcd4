"""Models in and out, on the command line: `python -m modjax.hub COMMAND --help`."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from modjax import mistakes
from modjax.hub import hf_import
from modjax.hub.errors import HubError


def main(argv: Sequence[str]) -> int:
    """Runs a command; returns the exit status."""
    parser = argparse.ArgumentParser("python -m modjax.hub", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _import_hf(commands)
    _verify(commands)
    _export_peft(commands)
    _export_hf(commands)
    _import_t5x(commands)
    _export_t5x(commands)
    args = vars(parser.parse_args(argv))
    run = args.pop("run")
    try:
        run(**args)
    except Exception as error:
        if not (isinstance(error, OSError) or mistakes.is_users(error)):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _import_hf(commands: argparse._SubParsersAction) -> None:
    def run(source: str, destination: str, **options: Any) -> None:
        base = hf_import.import_hf(source, destination, **options)
        print(f"{destination}: {base.network}, {len(base.shapes)} arrays; BASE for {base.kind.gin}")

    text = "A Hugging Face model as a base directory of ours."
    command = _copy(commands, "import_hf", text, "a folder, or a name on the hub")
    command.add_argument("--revision", help="of a model on the hub")
    command.set_defaults(run=run)


def _import_t5x(commands: argparse._SubParsersAction) -> None:
    def run(source: str, destination: str, **options: Any) -> None:
        from modjax.hub.t5x import import_t5x

        given = {name: value for name, value in options.items() if value is not None}
        base = import_t5x(source, destination, **given)
        far, units = base.fields["relpos_max_distance"], base.fields["mlp_activations"]
        print(
            f"{destination}: {len(base.shapes)} arrays; BASE for {base.kind.gin}. Taken for what the checkpoint does "
            f"not say: relpos_max_distance {far}, mlp_activations {', '.join(units)}."
        )

    text = "A T5X checkpoint as a base directory of ours."
    command = _copy(commands, "import_t5x", text, "a checkpoint, or the folder that it lies in")
    command.add_argument("--step", type=int, help="which checkpoint; the last if absent")
    command.add_argument("--relpos_max_distance", type=int, help="128 if absent, as published")
    command.set_defaults(run=run)


def _export_t5x(commands: argparse._SubParsersAction) -> None:
    def run(source: str, destination: str, **options: Any) -> None:
        from modjax.hub.t5x import export_t5x

        print(export_t5x(source, destination, **options))

    text = "A base, or a run with its base, as an Orbax checkpoint for T5X."
    command = _copy(commands, "export_t5x", text, "a base, a MODEL_DIR or a checkpoint of train.py")
    command.add_argument("--base", help="the folder of a run's base, if it has moved")
    command.add_argument("--step", type=int, help="the number to write; the run's own if absent")
    command.add_argument("--scan_layers", action="store_true", help="stack a base's layers")
    command.set_defaults(run=run)


def _copy(
    commands: argparse._SubParsersAction, name: str, text: str, source: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text)
    command.add_argument("source", help=source)
    command.add_argument("destination", help="the folder to write")
    command.add_argument("--dtype", help="float32, bfloat16 or float16; the files' own if absent")
    command.add_argument("--force", action="store_true", help="write over what is there")
    return command


def _verify(commands: argparse._SubParsersAction) -> None:
    def run(path: str) -> None:
        print(f"{path}: {hf_import.verify(path)} arrays are as they were written")

    text = "Compares a base directory with its fingerprint."
    command = commands.add_parser("verify", help=text, description=text)
    command.add_argument("path")
    command.set_defaults(run=run)


def _export_peft(commands: argparse._SubParsersAction) -> None:
    def run(trained: str, destination: str, features: str, **options: Any) -> None:
        from modjax.hub.peft import export_peft

        config = export_peft(trained, destination, _features(features), **options)
        print(f"{destination}: {config['peft_type']} for {', '.join(config['target_modules'])}")

    _export(commands, "export_peft", "One dataset's adapter for PEFT.").set_defaults(run=run)


def _export_hf(commands: argparse._SubParsersAction) -> None:
    def run(trained: str, destination: str, features: str, **options: Any) -> None:
        from modjax.hub.export import export_hf

        written = export_hf(trained, destination, _features(features), **options)
        print(f"{destination}: {written['architectures'][0]} in {written['dtype']}")

    command = _export(commands, "export_hf", "The model for transformers, adapters merged in.")
    command.add_argument("--dtype", help="float32, bfloat16 or float16; the base's if absent")
    command.set_defaults(run=run)


def _export(commands: argparse._SubParsersAction, name: str, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text)
    command.add_argument("trained", metavar="RUN", help="a checkpoint, or a MODEL_DIR")
    command.add_argument("destination", help="the folder to write")
    command.add_argument(
        "--features",
        default="",
        help="the dataset's, as task=parse,language=sw, or a JSON object; see docs/export.md",
    )
    command.add_argument("--base", help="the folder of the run's base, if it has moved")
    command.add_argument("--force", action="store_true", help="write over what is there")
    return command


def _features(text: str) -> dict[str, Any]:
    """`task=parse,language=sw` as a dictionary; a feature that is named twice has both values. Or a JSON object."""
    if text.startswith("{"):
        try:
            given = json.loads(text)
        except json.JSONDecodeError as error:
            raise HubError(f"--features {text}: not a JSON object ({error}).") from error
        for name, value in given.items():
            if not isinstance(value, str | list | dict):
                raise HubError(
                    f"--features {text}: {name!r} is {value!r}, and not a name, a list of names or weights by name."
                )
        return given
    found: dict[str, tuple[str, ...]] = {}
    for part in filter(None, text.split(",")):
        name, sign, value = part.partition("=")
        if not (name and sign and value):
            raise HubError(
                f"--features {text}: {part!r} is not of the form NAME=VALUE. A value with a comma is written in "
                """JSON, as '{"language": "Chinese, Hakka"}'."""
            )
        found[name] = (*found.get(name, ()), value)
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
