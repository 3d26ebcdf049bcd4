"""Gradients of looked up columns on meshes of eight devices: lookups.py DATAxFSDPxMODEL ...

Prints a line of JSON for each layout: by how much each gradient is off that of one device, relative to its largest
entry, how many entries are added up over devices at once, relative to the smaller bank, and how many a device is sent
by others of rows that they looked up for it, and of their gradients.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from modjax import partitioning
from modjax.adapters import lookup
from modjax.aot import hlo
from modjax.networks.configuration import REMAT_POLICIES

LAYERS, WIDTH, COLUMNS, FEATURES, ROWS, ACTIVE, LENGTH = 2, 16, 64, 32, 16, 6, 5
AXES = ("embed", "joined_kv")
RULES = (("joined_kv", ("model", "fsdp")), *partitioning.RULES)


def loss(banks, x, index, kernels, axes):
    """Of a scanned, rematerialised network of banks."""

    def layer(x, banks):
        a, b, kernel = banks
        down, up = lookup.columns(a, index, axes[0]), lookup.rows(b, index, axes[1])
        hidden = jnp.einsum("bld,dbn->bln", x, down)
        x = x + jnp.einsum("bln,bnk->blk", hidden, up) @ kernel
        return partitioning.constrain(x, ("batch", "length", "embed")), None

    layer = jax.checkpoint(layer, policy=REMAT_POLICIES["full"])
    return jnp.sum(jnp.sin(jax.lax.scan(layer, x, (*banks, kernels))[0]))


def main(layouts):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return 0.2 * rng.normal(size=shape).astype(np.float32)

    banks = draw(LAYERS, WIDTH, COLUMNS), draw(LAYERS, COLUMNS, FEATURES)
    x, kernels = draw(ROWS, LENGTH, WIDTH), draw(LAYERS, FEATURES, WIDTH)
    index = rng.integers(0, COLUMNS, (ROWS, ACTIVE)).astype(np.int32)
    expected = jax.grad(loss)(banks, x, index, kernels, (None, None))
    for layout in layouts:
        data, fsdp, model = map(int, layout.split("x"))
        mesh = partitioning.make_mesh(model, jax.devices()[: data * fsdp * model], fsdp)
        rows, whole = partitioning.rows(mesh), NamedSharding(mesh, PartitionSpec())
        homes = tuple(
            NamedSharding(mesh, partitioning.spec(names, bank.shape, mesh, RULES))
            for names, bank in zip(
                (("layers", AXES[0], "rank"), ("layers", "rank", AXES[1])), banks, strict=True
            )
        )

        def gradient(*args, mesh=mesh):
            with partitioning.in_force(mesh, RULES):
                return jax.grad(loss)(*args, AXES)

        step = jax.jit(gradient, in_shardings=(homes, rows, rows, whole), out_shardings=homes)
        compiled = step.lower(banks, x, index, kernels).compile()
        off = [
            float(np.abs(found - right).max() / np.abs(right).max())
            for found, right in zip(compiled(banks, x, index, kernels), expected, strict=True)
        ]
        computations, _ = hlo.read(compiled.as_text())
        entries = {"all-reduce": [0.0], "all-to-all": [0.0]}
        for instruction in (i for body in computations.values() for i in body.values()):
            if instruction.opcode in entries:
                entries[instruction.opcode].append(instruction.bytes / 4)
        added = max(entries["all-reduce"]) / (WIDTH * COLUMNS)
        print(
            json.dumps({"off": off, "added": added, "sent": sum(entries["all-to-all"])}), flush=True
        )


if __name__ == "__main__":
    main(sys.argv[1:])
