"""Where downloaded data lies, and how its text is read: gzip or plain, UTF-8 or a clear error."""

import gzip
import os
from collections.abc import Iterator

import gin
from etils import epath

VARIABLE = "MODJAX_DATA"


class MissingDataError(FileNotFoundError, ValueError):
    """A data file that is not there; the message names the file and where its data can be got."""


class RowError(ValueError):
    """A row that cannot be read; the message names the file and the line (or the entry)."""


@gin.configurable
def data_dir(path: str | None = None) -> str:
    """The folder of downloaded data: `path`, else the environment variable MODJAX_DATA.

    In gin: `tasks.files.data_dir.path = %DATA_DIR`, and on the command line
    `--gin.DATA_DIR="'/data'"`. It is looked up when data is read, not when tasks are registered,
    so tasks can be registered and listed without any data.

    Raises:
      MissingDataError: neither is set.
    """
    path = path or os.environ.get(VARIABLE)
    if not path:
        raise MissingDataError(
            "No data folder: set the gin macro DATA_DIR (a run's gin file binds it with "
            f"`tasks.files.data_dir.path = %DATA_DIR`) or the environment variable {VARIABLE}."
        )
    return path


def find(folder: str, *names: str, source: str) -> str:
    """The path of the first of `names` under `folder` that exists, as it is or with `.gz` added.

    Args:
      folder: the folder.
      *names: relative paths, in the order of preference.
      source: where the data can be got, for the error.

    Raises:
      MissingDataError: none of them exists.
    """
    for name in names:
        for path in (os.path.join(folder, name), os.path.join(folder, name + ".gz")):
            if epath.Path(path).exists():
                return path
    path = os.path.join(folder, names[0])
    others = "".join(f", {name}" for name in names[1:])
    raise MissingDataError(
        f"No data file {path} (nor {os.path.basename(path)}.gz{others}). Get it from {source}."
    )


def read_text(path: str) -> str:
    """The text of a UTF-8 file; a file whose name ends in `.gz` is decompressed.

    Raises:
      RowError: bytes that are not UTF-8, or a damaged gzip file, with the line and the offset.
    """
    data = epath.Path(path).read_bytes()
    if path.endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError) as error:
            raise RowError(f"{path}: not a whole gzip file: {error}") from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RowError(
            f"{path}:{line}: invalid UTF-8: byte 0x{data[error.start]:02x} at offset {error.start} "
            "of the text. Convert the file to UTF-8."
        ) from error


def read_lines(path: str) -> Iterator[tuple[str, str]]:
    """Yields ("path:line", text of the line) for each line, without its end, empty lines too.

    Only a line feed ends a line: utterances do contain other characters that Unicode counts as
    line ends, and `str.splitlines` would break them apart.
    """
    lines = read_text(path).split("\n")
    if lines[-1] == "":
        lines.pop()
    for number, line in enumerate(lines, start=1):
        yield f"{path}:{number}", line.removesuffix("\r")


def squeeze(text: str) -> str:
    """`text` with single spaces, none at its ends, and without byte order marks."""
    return " ".join(text.replace("\ufeff", "").split())
