"""A training step against torch and peft: time, useful tokens per second, memory.

    pip install -c constraints.txt -e '.[parity]'
    python -m benchmarks.vs_peft [--data_dir /data] [--cores 1]

The setting is that of `setting.py`, with the same weights and the same batches on both sides; what they lose on the
first batch is compared before anything is timed. Cases: `lora` and `poly` (8 skills, relaxed, 22 tasks) on equal
batches of 32 to 64 tokens, padded to 64; `mtop`, LoRA on the training mixture of `benchmarks/mtop6`, which our side
packs into 8 rows of 160 + 128 bytes, and theirs pads to the longest of each batch of examples sorted by length, as its
Trainer's `group_by_length` does, with as many positions to a batch as ours has; it needs the data folder.

Each side of each case is a process of its own, and steps alternate: one works while the other waits. Memory is the peak
of a process's resident set, and the same beyond what it held once everything was imported. With one core the clock is
the processor's time of the process.
"""

import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import measure, sides

CASES = ("lora", "poly", "mtop")
LENGTHS = {"inputs": 160, "targets": 128}
TOKENS = ("encoder_input_tokens", "decoder_target_tokens")
MEGABATCH = 50  # batches that are sorted together, as in transformers


# What both sides compute. The parent makes it, in a process of its own, and leaves it in a folder.


def prepare(folder: pathlib.Path, cases: Sequence[str], data_dir: str | None) -> None:
    """Writes the weights, in transformers' format, and each case's batches."""
    import torch
    import transformers

    from benchmarks import setting

    torch.manual_seed(0)
    transformers.T5ForConditionalGeneration(setting.in_transformers()).save_pretrained(
        folder / "base"
    )
    rows = setting.padded(4)
    for name in ("ours_lora", "theirs_lora", "ours_poly", "theirs_poly"):
        sides.write(folder / name, rows)
    if "mtop" in cases:
        prepare_mtop(folder, data_dir, setting.BATCH)


def prepare_mtop(folder: pathlib.Path, data_dir: str | None, rows: int) -> None:
    """Writes packed batches, and others of about as many positions with the longest example's padding."""
    import gin

    from modjax.data import pipeline, registry
    from tasks import files, mtop6  # noqa: F401

    with gin.unlock_config():
        gin.bind_parameter("tasks.files.data_dir.path", data_dir)
        for name, size in (
            ("input_bytes", LENGTHS["inputs"]),
            ("target_bytes", LENGTHS["targets"]),
        ):
            gin.bind_parameter(f"tasks.mtop6.limits.{name}", size - 1)
    space = registry.feature_space("mtop6_train")
    settings = dict(task_feature_lengths=LENGTHS, seed=0)
    packed = pipeline.train_iterator(
        "mtop6_train", "train", space, batch_size=rows, pack=True, **settings
    )
    ours = [next(packed) for _ in range(12)]
    sides.write(folder / "ours_mtop", ours)
    single = pipeline.train_iterator(
        "mtop6_train", "train", space, batch_size=1, pack=False, **settings
    )
    examples = [next(single) for _ in range(MEGABATCH * 32)]
    lengths = [[int((e[name] > 0).sum()) for name in TOKENS] for e in examples]
    positions = rows * sum(LENGTHS.values())

    def grouped(size: int) -> list[list[int]]:
        order = sorted(range(MEGABATCH * size), key=lambda i: -lengths[i][0])
        return [order[i : i + size] for i in range(0, len(order), size)]

    def padded(size: int) -> float:
        longest = [np.max([lengths[i] for i in group], axis=0).sum() for group in grouped(size)]
        return float(np.mean(longest)) * size

    size = max(n for n in range(1, 33) if padded(n) <= positions)
    found = []
    for group in grouped(size):
        longest = np.max([lengths[i] for i in group], axis=0)
        found.append(
            {
                name: np.concatenate([examples[i][name][:, :most] for i in group])
                for name, most in zip(TOKENS, longest, strict=True)
            }
        )
    order = np.random.default_rng(0).permutation(len(found))
    sides.write(folder / "theirs_mtop", [found[i] for i in order])


# The two sides. Each gives a function that does a step on a batch and returns its loss.


def our_side(folder: pathlib.Path, case: str) -> sides.Made:
    """A step of ours. Returns (step, what is to be called once everything is imported)."""
    from benchmarks import setting
    from modjax import hub

    name = "polytropon" if case == "poly" else "lora"
    made: list[Any] = []

    def start() -> None:
        first = sides.read(folder / f"ours_{case}")[0]
        _, base = hub.load_base(folder / "base")
        made.append(setting.Step(setting.METHODS[name], base, first))

    def step(batch: Any) -> float:
        made[0].feed(batch)
        return made[0]()

    return step, start


def their_side(folder: pathlib.Path, case: str, threads: int) -> sides.Made:
    """A step of torch and peft. Returns (step, what is to be called once everything is imported)."""
    import peft
    import torch
    import transformers

    from benchmarks import setting

    torch.set_num_threads(threads)
    made: list[Any] = []

    def start() -> None:
        model = transformers.T5ForConditionalGeneration.from_pretrained(folder / "base")
        shared = {"target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM", "r": setting.RANK}
        if case == "poly":
            config: Any = peft.PolyConfig(
                poly_type="poly", n_tasks=22, n_skills=setting.SKILLS, n_splits=1, **shared
            )
        else:
            config = peft.LoraConfig(lora_alpha=setting.RANK, **shared)
        made.append(peft.get_peft_model(model, config).train())
        trained = [weight for weight in made[0].parameters() if weight.requires_grad]
        made.append(torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0))

    def step(batch: Any) -> float:
        model, optimizer = made
        tokens, targets = (torch.from_numpy(batch[name]).long() for name in TOKENS)
        extra = {}
        if case == "poly":
            extra["task_ids"] = torch.from_numpy(batch["tasks"][:, 0]).long() - 1
        loss = model(
            input_ids=tokens,
            attention_mask=(tokens > 0).long(),
            labels=targets.masked_fill(targets == 0, -100),
            **extra,
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss)

    return step, start


def serve(side: str, case: str, folder: pathlib.Path, cores: int) -> None:
    """A side's process."""

    def make() -> sides.Made:
        if side == "ours":
            return our_side(folder, case)
        return their_side(folder, case, len(os.sched_getaffinity(0)))

    sides.serve(make, folder / f"{side}_{case}", cores)


def compare(case: str, folder: pathlib.Path, rounds: int, cores: int) -> list[dict[str, Any]]:
    """Times a case, prints what was found, and returns its goals."""
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
    command = [sys.executable, "-m", "benchmarks.vs_peft", "--cores", str(cores), "--serve"]
    commands = {name: [*command, name, case, str(folder)] for name in found}
    with sides.started(commands) as processes:
        first = {name: side.step(0)["loss"] for name, side in processes.items()}
        if case == "lora" and abs(first["ours"] - first["theirs"]) > 1e-4 * first["theirs"]:
            raise SystemExit(f"The sides do not compute the same: they lose {first}.")
        print(f"{case}: loss on the first batch {first['ours']:.5f} and {first['theirs']:.5f}")
        for number in range(1, rounds + 1):
            for name, side in processes.items():
                answer = side.step(number)
                answer["targets"] = side.known["targets"][number % side.known["batches"]]
                found[name].append(answer)
    seconds = {name: [step["seconds"] for step in steps] for name, steps in found.items()}
    for name, steps in found.items():
        speed = sum(step["targets"] for step in steps) / sum(seconds[name])
        print(
            f"{case}: {name:6}  {measure.spread(seconds[name])} s a step  {speed:.0f} targets/s  "
            f"peak {steps[-1]['peak']:.0f} MB, {steps[-1]['beyond']:.0f} beyond imports"
        )
    goals = []
    if case == "mtop":
        speeds = {
            name: sum(step["targets"] for step in steps) / sum(seconds[name])
            for name, steps in found.items()
        }
        faster = speeds["ours"] / speeds["theirs"]
        goals.append(measure.goal("mtop: useful targets per second", faster, 1.5, at_least=True))
    else:
        over = measure.ratio(seconds, "ours", "theirs")
        goals.append(measure.goal(f"{case}: time of a step", over, 1.0))
    ours, theirs = (found[name][-1] for name in ("ours", "theirs"))
    for what, label in (("peak", "peak memory"), ("beyond", "peak memory beyond imports")):
        goals.append(measure.goal(f"{case}: {label}", ours[what] / theirs[what], 0.8))
    return goals


def main(argv: Sequence[str]) -> int:
    parser = sides.parser(__doc__, CASES, 11)
    parser.add_argument("--data_dir", help="by default the environment variable MODJAX_DATA")
    args = parser.parse_args(argv)
    if args.serve:
        side, case, folder = args.serve
        serve(side, case, pathlib.Path(folder), args.cores)
        return 0
    if args.prepare:
        prepare(pathlib.Path(args.prepare), args.cases, args.data_dir)
        return 0
    began = time.monotonic()
    print(f"{measure.machine()}; {args.rounds} rounds on {args.cores or 'all'} core(s)")
    with tempfile.TemporaryDirectory() as folder:
        data = ["--data_dir", args.data_dir] if args.data_dir else []
        command = [sys.executable, "-m", "benchmarks.vs_peft", "--prepare", folder]
        subprocess.run([*command, "--cases", *args.cases, *data], check=True)
        goals = []
        for case in args.cases:
            goals += compare(case, pathlib.Path(folder), args.rounds, args.cores)
    print(f"{(time.monotonic() - began) / 60:.1f} minutes")
    measure.report(goals)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
