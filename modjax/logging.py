"""What a run says while it trains: JSON lines, TensorBoard, and a line of progress on the terminal.

Only process 0 writes. The JSON lines are the record that reports read; a resumed run cuts off the
lines after the step it resumes from, so that each step is there once.
"""

import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO


def summarize(sums: Mapping[str, float]) -> dict[str, float]:
    """Turns sums over steps, as `trainer.fit` logs them, into figures per token, per step and per
    second.

    Returns:
      loss (nats per target token), accuracy (share of target tokens, 0-1), learning_rate, grad_norm
      (mean), tokens_per_second (non-padding, encoder and decoder), steps_per_second, padding (share
      of positions, 0-1), seconds (since the last line), and z_loss and consistency where there are such. A figure
      whose sums are missing is left out.
    """
    figures = {name: value for name, value in sums.items() if name.startswith("learning_rate")}
    weight = max(sums.get("weight", 0.0), 1e-9)
    for name, source in (
        ("loss", "loss"),
        ("z_loss", "z_loss"),
        ("consistency", "consistency"),
        ("accuracy", "correct"),
    ):
        if source in sums:
            figures[name] = sums[source] / weight
    if "grad_norm" in sums and sums.get("steps"):
        figures["grad_norm"] = sums["grad_norm"] / sums["steps"]
    if sums.get("positions"):
        figures["padding"] = 1.0 - sums["tokens"] / sums["positions"]
    seconds = sums.get("seconds", 0.0)
    if seconds > 0:
        figures["seconds"] = seconds
        figures["steps_per_second"] = sums["steps"] / seconds
        if "tokens" in sums:
            figures["tokens_per_second"] = sums["tokens"] / seconds
    return figures


class MetricWriter:
    """Appends figures to `<folder>/metrics.jsonl` and to TensorBoard's event files beside it.

    Args:
      folder: created if needed.
      enabled: False in all processes but the first: then nothing is written.
      tensorboard: whether event files are written (needs the package tensorboardX).
      resume_step: lines after this step, left by a run that ended later than its last checkpoint,
        are dropped; with 0 all, of a run that ended before its first.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        enabled: bool = True,
        tensorboard: bool = True,
        resume_step: int = 0,
    ):
        self._file: TextIO | None = None
        self._board: Any = None
        if not enabled:
            return
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        known = path.exists()
        if known:
            _keep_until(path, resume_step)
        self._file = path.open("a", encoding="utf-8")
        if tensorboard:
            import tensorboardX

            # Purging makes the viewer, too, forget what came after the step resumed from.
            purge = resume_step + 1 if known else None
            self._board = tensorboardX.SummaryWriter(str(folder), purge_step=purge)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **figures}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def _keep_until(path: pathlib.Path, step: int) -> None:
    """Drops the lines after a step, and a last line that was cut short."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            continue
    # Whole or not at all, for a run may be stopped here, too.
    partial = path.with_suffix(".partial")
    partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(partial, path)


class Progress:
    """Shows step, loss, speed and time left: a bar on a terminal, else one plain line per call.

    Args:
      total: the step at which the run ends.
      start: the step at which it starts (it may have been resumed).
      enabled: False in all processes but the first.
      stream: where it is written.
    """

    def __init__(
        self, total: int, start: int = 0, enabled: bool = True, stream: TextIO | None = None
    ):
        self._total, self._step = total, start
        self._stream = stream if stream is not None else sys.stderr
        self._enabled = enabled
        self._clock = time.monotonic()
        self._bar: Any = None
        if enabled and self._stream.isatty():
            import tqdm

            self._bar = tqdm.tqdm(
                total=total, initial=start, unit="step", file=self._stream, dynamic_ncols=True
            )

    def update(self, step: int, figures: Mapping[str, float]) -> None:
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.update(step - self._step)
            self._bar.set_postfix({k: f"{figures[k]:.4g}" for k in _SHOWN if k in figures})
        else:
            # From the last line alone: the first one also holds the compilation.
            per_step = (time.monotonic() - self._clock) / max(step - self._step, 1)
            shown = "  ".join(f"{k} {figures[k]:.4g}" for k in _SHOWN if k in figures)
            left = duration(per_step * (self._total - step))
            print(f"step {step}/{self._total}  {shown}  ETA {left}", file=self._stream, flush=True)
        self._step, self._clock = step, time.monotonic()

    def say(self, text: str) -> None:
        """A message between the lines or above the bar."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


_SHOWN = ("loss", "accuracy", "steps_per_second", "tokens_per_second")


def duration(seconds: float) -> str:
    """Seconds as "42s", "3m05s" or "2h07m"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def parameter_table(trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> str:
    """The text of model-info.txt: one line per parameter (path, shape, dtype, trained or frozen),
    then the totals.

    Args:
      trained: {path: array or shape}.
      frozen: {path: array or shape}.
    """
    rows = [(path, leaf, "trained") for path, leaf in trained.items()]
    rows += [(path, leaf, "frozen") for path, leaf in frozen.items()]
    rows.sort(key=lambda row: row[0])
    width = max(len(row[0]) for row in rows)
    lines = [
        f"{path:<{width}}  {str(tuple(leaf.shape)):<16} {str(leaf.dtype):<9} {kind}"
        for path, leaf, kind in rows
    ]
    counts = {
        kind: sum(leaf.size for _, leaf, k in rows if k == kind) for kind in ("trained", "frozen")
    }
    total = counts["trained"] + counts["frozen"]
    share = 100 * counts["trained"] / total
    lines.append(
        f"trained {counts['trained']:,} of {total:,} parameters ({share:.3g} %), "
        f"frozen {counts['frozen']:,}"
    )
    return "\n".join(lines) + "\n"
