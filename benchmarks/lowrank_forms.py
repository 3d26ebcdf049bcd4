"""Dense against gathered: when does copying the active columns of a low-rank bank pay?

    python benchmarks/lowrank_forms.py                        # times this machine's device
    python benchmarks/lowrank_forms.py --topology v5e:2x2     # compiles for a TPU (extra `tpu`), its own estimate

One adapted layer, forward and backward (gradients of the adapters and of the layer's input). Prints, for each size of a
bank, the time of each form over that of the plain layer, measured in turn in one run, and what `choose_form` picks.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from modjax.adapters import Features, LowRank, Mix
from modjax.adapters.low_rank import LowRankBank, choose_form
from modjax.features import FeatureSpace

FORMS = ("plain", "dense", "gathered")


def step(form: str, values: int, rank: int, batch: int, length: int, width: int, segments: int):
    """(gradient function of one layer, its arguments as shapes, R, N)."""
    space = FeatureSpace((("language", tuple(f"l{i}" for i in range(values))),))
    module, router = LowRank(rank), Features()
    modules = router.modules(space)
    total = sum(module.ranks(modules))

    def loss(train: Any, base: Any, ids: Any, segment_ids: Any) -> Any:
        x = train["x"]
        y = x @ base
        if form != "plain":
            mix = Mix(features=ids)
            routing = router.route(mix, space, lambda: jax.random.key(0))
            gates = module.prepare(routing, modules, segment_ids if segments > 1 else None, "sum")
            bank = LowRankBank(total, total, form=form)
            params = {"a": train["a"], "b": train["b"]}
            y = bank.apply({"params": params}, x, y, gates, False)
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    f = jnp.bfloat16 if jax.default_backend() == "tpu" else jnp.float32
    shapes = (
        {
            "x": jax.ShapeDtypeStruct((batch, length, width), f),
            "a": jax.ShapeDtypeStruct((width, total), jnp.float32),
            "b": jax.ShapeDtypeStruct((total, width), jnp.float32),
        },
        jax.ShapeDtypeStruct((width, width), f),
        jax.ShapeDtypeStruct((batch, segments, 1), jnp.int32),
        jax.ShapeDtypeStruct((batch, length), jnp.int32),
    )
    return jax.jit(jax.grad(loss)), shapes, total, segments * rank


def concrete(shapes: Any, values: int, segments: int) -> Any:
    rng = np.random.RandomState(0)
    train, base, ids, seg = shapes
    train = {k: jnp.asarray(rng.randn(*s.shape), s.dtype) for k, s in train.items()}
    per = -(-seg.shape[1] // segments)
    rows = np.tile(np.arange(seg.shape[1]) // per + 1, (seg.shape[0], 1))
    return (
        train,
        jnp.asarray(rng.randn(*base.shape), base.dtype),
        jnp.asarray(rng.randint(1, values + 1, ids.shape), jnp.int32),
        jnp.asarray(rows, jnp.int32),
    )


def interleaved(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each, run in turn."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        jax.block_until_ready(function())
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(t)) for name, t in times.items()}


def estimated(compiled: Any) -> float:
    """Seconds by the compiler's own estimate; it counts -1 for each operation that it cannot price."""
    cost = compiled.cost_analysis()
    seconds = float(cost["optimal_seconds"])
    return seconds + np.ceil(max(0.0, -seconds)) if seconds < 0 else seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--topology", help="of a TPU, to compile for; else this machine is timed")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--segments", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--values", type=int, nargs="+", default=[8, 32, 64, 128, 256, 512])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    print(f"batch {args.batch}, length {args.length}, width {args.width}, rank {args.rank}")
    print("segments  columns R  active N  dense/plain  gathered/plain  choose_form")
    for segments in args.segments:
        for values in args.values:
            seconds = {}
            functions: dict[str, Callable[[], Any]] = {}
            for form in FORMS:
                function, shapes, total, active = step(
                    form, values, args.rank, args.batch, args.length, args.width, segments
                )
                if args.topology:
                    seconds[form] = compile_for(args.topology, function, shapes)
                else:
                    inputs = concrete(shapes, values, segments)
                    functions[form] = lambda function=function, inputs=inputs: function(*inputs)
            if functions:
                seconds = interleaved(functions, args.rounds)
            plain = seconds["plain"]
            platform = "tpu" if args.topology else jax.default_backend()
            picked = choose_form(total, active, args.batch, args.length, platform)
            print(
                f"{segments:8d}  {total:9d}  {active:8d}  {seconds['dense'] / plain:11.2f}  "
                f"{seconds['gathered'] / plain:14.2f}  {picked}",
                flush=True,
            )


def compile_for(topology: str, function: Any, shapes: Any) -> float:
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    place = SingleDeviceSharding(device)
    shapes = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(
            s.shape,
            jnp.bfloat16 if s.dtype == jnp.float32 and s.ndim == 3 else s.dtype,
            sharding=place,
        ),
        shapes,
    )
    return estimated(function.lower(*shapes).compile())


if __name__ == "__main__":
    main()
