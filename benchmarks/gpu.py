"""Large bases on one GPU, in bfloat16: time of a training step and MFU, beside torch and peft.

    python -m benchmarks.gpu [--cases llama_7b t5_xl] [--sides lora flix peft] [--rounds 2]

Needs jax for CUDA, torch, transformers and peft. The bases have the sizes of Llama 7B (arXiv 2302.13971) and of T5 1.1
XL, and random weights; rows are full, so that nobody packs or pads. Adapters of rank 8 on queries and values, trained
in float32 by AdamW, on a base in bfloat16; FLix has 200 feature values of rank 4, two of which are active. Each side is
a process of its own with the whole card, for one cannot hold two bases; they take turns, so often as --rounds says.

Ours keeps products with weights and makes the rest again in the backward pass (remat "minimal"). Theirs is transformers
(Llama with its fused attention, sdpa) and peft under bfloat16 autocast, as `Trainer(bf16=True)` runs them, with and
without gradient checkpointing, and once with adapters in bfloat16 as well, each with the most rows that fit; what of
these is fastest is what ours is compared with. The layers of Llama are unrolled, those of T5 a loop (see `Case`).

MFU is by the operations that the base needs at least: forward, and backward to its activations, attention over all
pairs of tokens included, adapters and whatever is made again left out (`modjax.aot.job.model_flops`).
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import measure

RANK, FEATURES = 8, {"task": 10, "language": 190}
STEPS = 6
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "OutOfMemory")


@dataclasses.dataclass(frozen=True)
class Case:
    """A base, and the tokens of a row.

    Attributes:
      kind: "decoder" or "t5".
      sizes: of our configuration.
      lengths: {"inputs": L, "targets": L}; a decoder-only network's row has both.
      rows: {side: the rows of a batch to try, the most first}.
      scan_layers: a loop over layers, which compiles sooner and copies each layer's kernels out of the stack.
    """

    kind: str
    sizes: Mapping[str, Any]
    lengths: Mapping[str, int]
    rows: Mapping[str, Sequence[int]]
    scan_layers: bool = False

    @property
    def tokens(self) -> int:
        """Of a row."""
        return sum(self.lengths.values())


CASES = {
    "llama_7b": Case(
        "decoder",
        dict(
            vocab_size=32000,
            emb_dim=4096,
            num_heads=32,
            num_kv_heads=32,
            head_dim=128,
            mlp_dim=11008,
            num_layers=32,
            norm_epsilon=1e-5,
            logits_via_embedding=False,
        ),
        {"inputs": 768, "targets": 256},
        {
            "ours": (16, 14, 12),
            "flix": (14, 12),
            "peft": (10, 8, 6),
            "peft_checkpointing": (24, 16, 8),
        },
    ),
    "t5_xl": Case(
        "t5",
        dict(
            vocab_size=32128,
            emb_dim=2048,
            num_heads=32,
            head_dim=64,
            mlp_dim=5120,
            num_encoder_layers=24,
            num_decoder_layers=24,
        ),
        {"inputs": 512, "targets": 128},
        {"ours": (48, 32, 16), "peft": (12, 8, 4), "peft_checkpointing": (64, 48, 24)},
        scan_layers=True,
    ),
    # For tests, on a CPU.
    "tiny": Case(
        "decoder",
        dict(
            vocab_size=96,
            emb_dim=32,
            num_heads=4,
            num_kv_heads=4,
            head_dim=8,
            mlp_dim=48,
            num_layers=2,
            logits_via_embedding=False,
        ),
        {"inputs": 12, "targets": 4},
        {"ours": (2,), "peft": (2,), "peft_checkpointing": (2,)},
    ),
}
OURS = ("lora", "lora_plain", "flix")
THEIRS = ("peft", "peft_bfloat16", "peft_checkpointing")


# Ours.


def model_of(case: Case, side: str) -> Any:
    """The model of a side: "lora_plain" writes attention out."""
    from modjax import adapters
    from modjax.aot import job
    from modjax.models import DecoderOnlyModel, EncoderDecoderModel
    from modjax.networks import decoder, t5

    run = dict(
        dtype="bfloat16",
        scan_layers=case.scan_layers,
        remat_policy="minimal",
        attention="plain" if side.endswith("_plain") else "auto",
    )
    network: Any
    if case.kind == "t5":
        network = t5.Transformer(t5.T5Config(**case.sizes, **run))
    else:
        network = decoder.Transformer(decoder.DecoderConfig(**case.sizes, **run))
    flix = side.startswith("flix")
    router = adapters.Features() if flix else adapters.Single()
    mixture = adapters.Mixture("adapter", adapters.LowRank(RANK // 2 if flix else RANK), router)
    made = EncoderDecoderModel if case.kind == "t5" else DecoderOnlyModel
    model = made(
        adapters.Adapted(network, (adapters.Rule(r".*/(query|value)", mixture),)),
        loss_normalizing_factor="num_real_target_tokens",
        loss_chunk=128,
    )
    return model.with_space(job.generated_space(FEATURES))


def useful_flops(model: Any, lengths: Mapping[str, int], rows: int) -> float:
    """See the top of this file."""
    from modjax import optimizers, partitioning
    from modjax.aot import job

    made = job.Job(
        model, optimizers.Optimizer(), partitioning.Partitioner(), lengths, rows, 1, None, None
    )
    return job.model_flops(made)


def batch_of(model: Any, lengths: Mapping[str, int], rows: int) -> dict[str, np.ndarray]:
    """Random tokens without padding, every row of another dataset."""
    draw = np.random.default_rng(0)
    shapes = model.example_batch(lengths, model.adapted.space, rows=rows)
    batch = {}
    for name, shape in shapes.items():
        if name.endswith("_tokens"):
            top = model.network.config.vocab_size
            batch[name] = draw.integers(2, top, shape.shape).astype(shape.dtype)
        elif name == "features":
            values = [draw.integers(1, count + 1, (rows, 1)) for count in FEATURES.values()]
            batch[name] = np.stack(values, axis=-1).astype(shape.dtype)
        else:
            batch[name] = np.ones(shape.shape, shape.dtype)
    return batch


def our_side(case: Case, side: str, rows: int, profile: bool = False) -> dict[str, Any]:
    """Trains a few steps; what `main` prints of them."""
    import jax
    import jax.numpy as jnp
    from flax import traverse_util

    from modjax import initialize, optimizers, partitioning, profiling, trainer
    from modjax.aot import job

    model = model_of(case, side)
    batch = batch_of(model, case.lengths, rows)
    optimizer = optimizers.Optimizer(learning_rate=1e-4)
    layout = initialize.layout(model, batch, optimizer.groups)
    shapes = job.to_dtype(layout.frozen, "bfloat16")
    mesh = partitioning.make_mesh(1, jax.devices()[:1])
    made = trainer.Trainer(
        model, optimizer, mesh, layout.trained, shapes, layout.axes, rates=layout.rates
    )

    def draw(key: Any, shape: tuple[int, ...], scale: float) -> Any:
        return (jax.random.normal(key, shape, jnp.float32) * scale).astype(jnp.bfloat16)

    drawn = jax.jit(draw, static_argnums=(1, 2))
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(shapes))))
    frozen = {}
    for path, leaf in traverse_util.flatten_dict(shapes, sep="/").items():
        scale = 1.0 if path.endswith("scale") else 0.02
        key = next(keys)
        frozen[path] = (
            jnp.ones(leaf.shape, leaf.dtype) if scale == 1.0 else drawn(key, leaf.shape, scale)
        )
    base = partitioning.place(traverse_util.unflatten_dict(frozen, sep="/"), made.frozen_sharding)
    state = made.init_state(initialize.host_init(model, batch, layout.trained, 0), 0)
    flag = jnp.zeros((1,), jnp.int32)
    fed = jax.tree.map(jnp.asarray, batch)
    began = time.perf_counter()
    program = profiling.compile_program(made.train_step, state, base, fed, flag)
    compiling = time.perf_counter() - began
    losses, seconds = [], []
    for _ in range(STEPS + 2):
        began = time.perf_counter()
        state, sums = program.call(state, base, fed, flag)
        losses.append(float(sums["loss"] / sums["weight"]))
        seconds.append(time.perf_counter() - began)
    if profile:
        kernels(lambda: float(program.call(state, base, fed, flag)[1]["loss"]))
    device = jax.devices()[0]
    used = device.memory_stats() or {}
    return {
        "device": device.device_kind,
        "seconds": seconds[2:],
        "losses": losses,
        "peak": used.get("peak_bytes_in_use", 0),
        "compiling": compiling,
        "flops": useful_flops(model, case.lengths, rows),
        "version": f"jax {jax.__version__}",
    }


def kernels(step: Callable[[], Any], count: int = 30) -> None:
    """Prints which kernels of the device a step spends its time in, by a trace."""
    import collections
    import gzip
    import pathlib
    import tempfile

    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            step()
        (path,) = pathlib.Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    gpus = {e["pid"] for e in events if e.get("name") == "process_name" and "GPU" in str(e["args"])}
    streams = {
        (e["pid"], e["tid"])
        for e in events
        if e.get("name") == "thread_name" and e["pid"] in gpus and "Stream" in str(e["args"])
    }
    taken: dict[str, float] = collections.Counter()
    times: dict[str, int] = collections.Counter()
    for event in events:
        if event.get("ph") == "X" and (event["pid"], event["tid"]) in streams:
            taken[event["name"]] += event["dur"] / 1e3
            times[event["name"]] += 1
    print(f"kernels: {sum(taken.values()):.1f} ms in all", file=sys.stderr)
    for name, milliseconds in sorted(taken.items(), key=lambda pair: -pair[1])[:count]:
        print(f"{milliseconds:9.2f} ms {times[name]:5} x {name[:100]}", file=sys.stderr)


# Theirs.


def their_side(case: Case, side: str, rows: int) -> dict[str, Any]:
    """The same for torch and peft."""
    import peft
    import torch
    import transformers

    sizes, where = case.sizes, "cuda" if torch.cuda.is_available() else "cpu"
    config: Any
    if case.kind == "t5":
        config = transformers.T5Config(
            vocab_size=sizes["vocab_size"],
            d_model=sizes["emb_dim"],
            d_kv=sizes["head_dim"],
            d_ff=sizes["mlp_dim"],
            num_layers=sizes["num_encoder_layers"],
            num_heads=sizes["num_heads"],
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=0,
            dropout_rate=0.0,
        )
        made, targets, task = transformers.T5ForConditionalGeneration, ["q", "v"], "SEQ_2_SEQ_LM"
    else:
        config = transformers.LlamaConfig(
            vocab_size=sizes["vocab_size"],
            hidden_size=sizes["emb_dim"],
            intermediate_size=sizes["mlp_dim"],
            num_hidden_layers=sizes["num_layers"],
            num_attention_heads=sizes["num_heads"],
            num_key_value_heads=sizes["num_kv_heads"],
            head_dim=sizes["head_dim"],
            attn_implementation="sdpa",
        )
        made, targets, task = transformers.LlamaForCausalLM, ["q_proj", "v_proj"], "CAUSAL_LM"
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(where):
        base = made(config)
    torch.set_default_dtype(torch.float32)
    if side.endswith("_checkpointing"):
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.config.use_cache = False
    small = side.endswith("_bfloat16")
    lora = peft.LoraConfig(target_modules=targets, task_type=task, r=RANK, lora_alpha=RANK)
    model = peft.get_peft_model(base, lora, autocast_adapter_dtype=not small).train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=where == "cuda")
    draw = np.random.default_rng(0)

    def tokens(length: int) -> Any:
        found = draw.integers(2, sizes["vocab_size"], (rows, length))
        return torch.from_numpy(found).to(where)

    if case.kind == "t5":
        batch = {"input_ids": tokens(case.lengths["inputs"])}
        batch["labels"] = tokens(case.lengths["targets"])
    else:
        batch = {"input_ids": tokens(case.tokens)}
        batch["labels"] = batch["input_ids"]
    losses, seconds = [], []
    for _ in range(STEPS + 2):
        began = time.perf_counter()
        with torch.autocast(where, torch.bfloat16, enabled=not small):
            loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() if where == "cuda" else 0
    name = torch.cuda.get_device_name() if where == "cuda" else where
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    return {
        "device": name,
        "seconds": seconds[2:],
        "losses": losses,
        "peak": peak,
        "version": versions,
    }


def measured(name: str, side: str, profile: bool = False) -> dict[str, Any]:
    """A side's steps with the most rows that fit, in this process."""
    case = CASES[name]
    tries = case.rows.get(side) or case.rows["ours" if side in OURS else "peft"]
    for rows in tries:
        try:
            if side in OURS:
                found = our_side(case, side, rows, profile)
            else:
                found = their_side(case, side, rows)
        except Exception as error:
            if rows == tries[-1] or not any(word in repr(error) for word in OUT_OF_MEMORY):
                raise
            print(f"{name} {side}: {rows} rows do not fit", file=sys.stderr, flush=True)
            _forget(error)
            continue
        return {"rows": rows, "tokens": rows * case.tokens, **found}
    raise AssertionError("the last try raises")


def _forget(error: BaseException) -> None:
    """Lets go of what a failed try holds, and gives torch's memory back."""
    import gc
    import traceback

    traceback.clear_frames(error.__traceback__)
    error.__traceback__ = None
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def in_process(name: str, side: str, profile: bool = False) -> dict[str, Any] | None:
    """`measured` in a process of its own; None, and what it said, where it failed."""
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", "HF_HUB_OFFLINE": "1"} | os.environ
    began = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.gpu", "--serve", name, side]
    command += ["--profile"] if profile else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        print(f"{name} {side} failed with status {done.returncode}", flush=True)
        return None
    found: dict[str, Any] = json.loads(lines[-1])
    seconds = statistics.median(found["seconds"])
    print(
        f"{name} {side}: {found['rows']} rows, {seconds:.3f} s, {found['tokens'] / seconds:.0f} tokens/s, peak "
        f"{found['peak'] / 1e9:.1f} GB, loss {found['losses'][0]:.3f} to {found['losses'][-1]:.3f}, "
        f"{found['version']}; {time.monotonic() - began:.0f} s in all, {found.get('compiling', 0):.0f} compiling",
        flush=True,
    )
    return found


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=["llama_7b", "t5_xl"])
    parser.add_argument(
        "--sides", nargs="+", choices=[*OURS, *THEIRS], default=["lora", "flix", *THEIRS]
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="also print our longest kernels")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        print(json.dumps(measured(*args.serve, args.profile)))
        return 0
    from modjax.profiling import peak_flops

    goals = []
    for name in args.cases:
        found: dict[str, list[dict[str, Any]]] = {}
        for _ in range(args.rounds):
            for side in args.sides:
                one = in_process(name, side, args.profile)
                if one is not None:
                    found.setdefault(side, []).append(one)
        goals += _summary(name, found, peak_flops)
    measure.report(goals)
    return 0


def _summary(name: str, found: Mapping[str, Sequence[Any]], peak_flops: Any) -> list[Any]:
    """Prints a case's table; its goals."""
    speeds = {
        side: [one["tokens"] / second for one in runs for second in one["seconds"]]
        for side, runs in found.items()
    }
    theirs = [side for side in speeds if side in THEIRS]
    best = max(theirs, key=lambda side: statistics.median(speeds[side]), default=None)
    print("\n| side | rows | tokens/s (quartiles) | MFU | peak GB |")
    print("|---|---|---|---|---|")
    goals = []
    for side, runs in found.items():
        peak, mfu = peak_flops(runs[0]["device"]), None
        middle = statistics.median(speeds[side])
        if "flops" in runs[0] and peak:
            mfu = runs[0]["flops"] / runs[0]["tokens"] * middle / peak
            goals.append(measure.goal(f"{name} {side}: MFU", mfu, 0.5, at_least=True))
        if best is not None and side in OURS:
            over = middle / statistics.median(speeds[best])
            goals.append(measure.goal(f"{name} {side} / {best}: speed", over, 1.5, at_least=True))
        print(
            f"| {side} | {runs[0]['rows']} | {measure.spread(speeds[side])} "
            f"| {'' if mfu is None else f'{mfu:.3f}'} | {max(run['peak'] for run in runs) / 1e9:.1f} |"
        )
    print(flush=True)
    return goals


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
