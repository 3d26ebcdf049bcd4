"""What one point of an axis costs: training steps that take turns, their memory and the size of their programs.

A quarter of setting S in width and a third in depth, so that 10,000 values with their moments fit in 4 GB: a T5 of
width 256, 2 + 2 layers, 4 heads, relu feed-forward of 1024, 8192 tokens; float32, no dropout. Adapters on queries and
values, trained by AdamW: FLix with two active features of rank 4, or one module of rank 8 for each dataset; Polytropon
with 8 skills of rank 8, Poly-S with 8 heads; LoRA of rank 8, which does not grow, beside them.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure, setting
from benchmarks.growth.stored import FORMS
from modjax import adapters
from modjax.adapters.low_rank import choose_form
from modjax.aot import hlo

CONFIG = dataclasses.replace(
    setting.CONFIG,
    vocab_size=8192,
    emb_dim=256,
    num_heads=4,
    mlp_dim=1024,
    num_encoder_layers=2,
    num_decoder_layers=2,
)
TASKS = 4  # values of the first feature, see `setting.Method`
SIZES = {
    "values": (10, 30, 100, 300, 1000, 3000, 10000),
    "datasets": (10, 30, 100, 300, 1000),
    "segments": (1, 2, 4, 8, 16, 32),
    "sequence": (64, 128, 256, 512, 1024, 2048, 4096),
}


@dataclasses.dataclass(frozen=True)
class Point:
    """Where on the axes a step is measured.

    Attributes:
      axis: the one that it is a point of.
      size: its place there.
      values: of both features together.
      datasets: None where adapters go by the features.
      rows, length: of the batch, in each of the two streams.
      segments: of a packed row; None if rows are examples.
    """

    axis: str
    size: int
    values: int = 300
    datasets: int | None = None
    rows: int = 8
    length: int = 64
    segments: int | None = None

    @property
    def columns(self) -> int:
        """R, of a bank."""
        return setting.RANK * self.datasets if self.datasets else setting.RANK // 2 * self.values

    @property
    def chosen(self) -> str:
        """The form that `choose_form` takes."""
        active = setting.RANK * (self.segments or 1)
        return choose_form(self.columns, active, self.rows, self.length, jax.default_backend())


def point(axis: str, size: int) -> Point:
    """The point of an axis: 8 rows of 64 + 64 tokens along values and datasets, 4 of 256 + 256 along packed segments,
    4096 + 4096 tokens in rows that become fewer as they become longer along the sequence."""
    if axis == "values":
        return Point(axis, size, values=size)
    if axis == "datasets":
        return Point(axis, size, datasets=size)
    if axis == "segments":
        return Point(axis, size, rows=4, length=256, segments=size)
    return Point(axis, size, rows=4096 // size, length=size)


def methods(point: Point, config: Any = CONFIG) -> dict[str, setting.Method]:
    """What is trained at a point, by name."""

    def method(bank: Any, router: Any) -> setting.Method:
        languages = point.datasets or point.values - TASKS
        return setting.Method(bank, router, languages=languages, config=config)

    rank = setting.RANK
    found = {"lora": method(adapters.LowRank(rank), adapters.Single())}
    for form in (*FORMS, "auto"):
        if point.datasets:
            router = adapters.Features(features=("dataset",))
            found[form] = method(adapters.LowRank(rank, form=form), router)
        else:
            found[form] = method(adapters.LowRank(rank // 2, form=form), adapters.Features())
    if point.datasets:
        bank = adapters.LowRank(rank, alpha=1.0)
        found["polytropon"] = method(bank, adapters.Skills(setting.SKILLS))
        found["poly_s"] = method(bank, adapters.Skills(setting.SKILLS, heads=8))
    return found


def batch(point: Point, method: setting.Method, seed: int = 0) -> dict[str, jax.Array]:
    """Random tokens without padding; each example of another dataset, as long as there are so many."""
    draw = np.random.default_rng(seed)
    shape = (point.rows, point.length)
    found = {
        name: draw.integers(2, method.config.vocab_size, shape, np.int32)
        for name in ("encoder_input_tokens", "decoder_target_tokens")
    }
    targets = found["decoder_target_tokens"]
    found["decoder_input_tokens"] = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    segments = point.segments or 1
    places = np.arange(point.rows * segments).reshape(point.rows, segments)
    language = places * 7 % method.languages + 1
    found["features"] = np.stack([places % TASKS + 1, language], axis=-1)
    found["tasks"] = language
    if point.segments:
        each = point.length // segments
        within = np.arange(point.length)
        for stream in ("encoder", "decoder"):
            found[f"{stream}_segment_ids"] = np.broadcast_to(within // each + 1, shape)
            found[f"{stream}_positions"] = np.broadcast_to(within % each, shape)
    return {name: jnp.asarray(value, jnp.int32) for name, value in found.items()}


def operations(lowered: Any) -> int:
    """Operations of a traced program before it is compiled, in StableHLO."""
    return len(re.findall(r"^ +%[\w:#, ]+ = ", lowered.as_text(), re.MULTILINE))


def instructions(compiled: Any) -> int:
    """Instructions of a compiled program, in HLO, those inside of fusions included."""
    computations, _ = hlo.read(compiled.as_text())
    return sum(len(body) for body in computations.values())


def peak(compiled: Any) -> int:
    """Bytes that a program needs at once, arguments included, by XLA's analysis."""
    used = compiled.memory_analysis()
    made = used.output_size_in_bytes - used.alias_size_in_bytes
    return int(used.argument_size_in_bytes + made + used.temp_size_in_bytes)


def measure_point(
    point: Point, rounds: int, clock: Callable[[], float], config: Any = CONFIG
) -> dict[str, Any]:
    """Seconds of each step, round by round, and what is known of its program.

    The step with form "auto" is not run: it is compared with the other two, one of which is the same program.

    Raises:
      RuntimeError: it is none of them.
    """
    steps: dict[str, setting.Step] = {}
    auto, base = "", None
    for name, method in methods(point, config).items():
        like = steps.get("dense") if name in (*FORMS, "auto") else None
        step = setting.Step(method, base, batch(point, method), like)
        base = step.frozen
        if name == "auto":
            text = step.lowered.as_text()
            same = [form for form in FORMS if steps[form].lowered.as_text() == text]
            if len(same) != 1:
                raise RuntimeError(f"{point}: the step with form 'auto' is of neither form")
            auto = same[0]
        else:
            steps[name] = step
    seconds = measure.in_turn(steps, rounds, clock=clock)
    jax.clear_caches()  # the next point has programs of its own
    return {
        "auto": auto,
        "sides": {
            name: {
                "seconds": [round(s, 4) for s in seconds[name]],
                "peak": peak(step.compiled),
                "state": sum(x.nbytes for x in jax.tree.leaves(step.state)),
                "operations": operations(step.lowered),
                "instructions": instructions(step.compiled),
                "tracing": round(step.tracing, 3),
            }
            for name, step in steps.items()
        },
    }


def chosen_from(axis: str) -> int | None:
    """The smallest size of an axis at which `choose_form` gathers; None if there is none."""
    sizes = SIZES[axis]
    between = range(sizes[0], sizes[-1] + 1)
    return next((size for size in between if point(axis, size).chosen == "gathered"), None)
