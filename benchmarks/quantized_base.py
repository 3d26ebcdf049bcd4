"""What a training step holds beside its arguments when the base is in int8: no float copy of it.

    python benchmarks/quantized_base.py                      # compiles for this machine's device
    python benchmarks/quantized_base.py --topology v5e:2x2   # for a TPU (extra `tpu`)

LoRA on a decoder-only network of Llama's shape, one step compiled and not run. Prints, for each way to run the layers
and each precision of the base, the bytes of the base and of the program's temporary buffers (jax's memory analysis),
both over those of the base in float32.
"""

import argparse
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from modjax import adapters, initialize, models, optimizers, partitioning  # noqa: E402
from modjax.networks import decoder  # noqa: E402
from modjax.trainer import Trainer, TrainState  # noqa: E402

LAYERS = (
    ("scanned", True, "none"),
    ("scanned, remat", True, "full"),
    ("unrolled", False, "none"),
    ("unrolled, remat", False, "full"),
)


class Held(NamedTuple):
    """Bytes of the frozen base, and of the temporary buffers of a step."""

    base: int
    temporary: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", help="a TPU's name, as v5e:2x2; else this machine's device")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--activations", default="bfloat16")
    args = parser.parse_args()
    devices = jax.devices()[:1]
    if args.topology:
        from jax.experimental import topologies

        found = topologies.get_topology_desc(platform="tpu", topology_name=args.topology)
        devices = found.devices[:1]
    print(f"{devices[0].device_kind}, jax {jax.__version__}")
    print(f"{'layers':20s}{'base':10s}   bytes  temporary")
    for name, scan, remat in LAYERS:
        model = model_of(args.width, args.layers, scan, remat, args.activations)
        whole = 0
        for dtype in ("float32", "bfloat16", "int8"):
            held = measure(model, args.rows, args.length, devices, dtype)
            whole = whole or held.base
            shares = f"{held.base / whole:8.3f}{held.temporary / whole:11.3f}"
            print(f"{name:20s}{dtype:10s}{shares}", flush=True)


def model_of(width: int, layers: int, scan: bool, remat: str, dtype: str) -> Any:
    network = decoder.Transformer(
        decoder.DecoderConfig(
            vocab_size=256,
            emb_dim=width,
            num_heads=width // 128,
            num_kv_heads=width // 128,
            head_dim=128,
            mlp_dim=3 * width,
            num_layers=layers,
            scan_layers=scan,
            remat_policy=remat,
            dtype=dtype,
        )
    )
    lora = adapters.Mixture("lora", adapters.LowRank(8))
    rule = adapters.Rule(r".*/self_attention/(query|value)", lora)
    return models.DecoderOnlyModel(adapters.Adapted(network, (rule,)))


def measure(model: Any, rows: int, length: int, devices: Any, dtype: str) -> Held:
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    batch = {"decoder_input_tokens": ids, "decoder_target_tokens": ids}
    params = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
    trained, shapes = adapters.split(params, model.adapted)
    base = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
    base = initialize.to_dtype(base, dtype)
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), base)
    trainer = Trainer(
        model, optimizers.Optimizer(), partitioning.make_mesh(1, devices), trained, frozen
    )
    state = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32),
        trained=trained,
        opt_state=jax.eval_shape(trainer.transform.init, trained),
        rng=jax.ShapeDtypeStruct((2,), jnp.uint32),
    )
    flag = jax.ShapeDtypeStruct((1,), jnp.int32)
    compiled = trainer.train_step.lower(state, frozen, batch, flag).compile()
    size = sum(x.nbytes for x in jax.tree.leaves(base))
    return Held(size, compiled.memory_analysis().temp_size_in_bytes)


if __name__ == "__main__":
    main()
