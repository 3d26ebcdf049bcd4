"""Training and prediction on meshes of many layouts: layouts.py [FAMILY:DATAxFSDPxMODEL[:OPTION...] ...].

All methods at once, several to a layer. Prints a line of JSON for each layout. Without arguments every family on every
layout of up to 8 devices, in half an hour of a core with the flags that tests/conftest.py adds; each line then says how
far its losses and norms of gradients are from those on one device, and the program fails where that is more than 1e-5,
relatively:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/testdata/layouts.py

Options: "decode" predicts, too; "save" leaves a checkpoint after the steps and "resume" does their last step from it
alone; "lazy" optimizer; "replicated" adapters; "sequence" divides the length of activations over "model"; "full" trains
the base, too; "chunk" makes the loss a few positions at a time.
"""

import dataclasses
import itertools
import json
import sys
import tempfile

import jax
import numpy as np
from flax import traverse_util

from modjax import adapters, checkpoints, initialize, models, optimizers, partitioning, trainer
from modjax.adapters import Mixture, Rule
from modjax.evaluation import predict
from modjax.features import FeatureSpace
from modjax.networks import decoder, encoder, t5

ROWS, STEPS = 16, 3
TOLERANCE = 1e-5
SPACE = FeatureSpace(
    (("task", ("parse", "tag")), ("language", ("en", "sw", "yo"))),
    datasets=("parse_en", "tag_sw", "parse_yo"),
)
LOW_RANK = adapters.LowRank(2)
RULES = tuple(
    Rule(layers, Mixture(name, module, router))
    for layers, name, module, router in (
        (".*attention/query", "lora", LOW_RANK, adapters.Single()),
        (".*attention/value", "flix", LOW_RANK, adapters.Features(dropout=0.2)),
        (
            ".*mlp/wi(_0)?",
            "gathered",
            adapters.LowRank(2, form="gathered"),
            adapters.Features(),
        ),
        (".*attention/out", "poly", LOW_RANK, adapters.Skills(3)),
        (".*mlp/wo", "poly_s", LOW_RANK, adapters.Skills(3, heads=4)),
        (
            ".*attention/query",
            "adamix",
            adapters.LowRank(2, share_up=True),
            adapters.Stochastic(3),
        ),
        (".*mlp/wo", "bottleneck", adapters.Bottleneck(3), adapters.Single()),
        (".*attention/key", "ia3", adapters.Scale(), adapters.Single()),
        (".*mlp/wo", "ia3_in", adapters.Scale("input"), adapters.Single()),
    )
)
# A vocabulary that no layout divides, and one that all do; layers unrolled, scanned, rematerialised.
SIZES = dict(emb_dim=16, num_heads=8, head_dim=4, mlp_dim=32, dropout_rate=0.1)
FAMILIES = {
    "t5": (
        models.EncoderDecoderModel,
        t5.Transformer(t5.T5Config(51, num_encoder_layers=1, num_decoder_layers=1, **SIZES)),
    ),
    "decoder": (
        models.DecoderOnlyModel,
        decoder.Transformer(
            decoder.DecoderConfig(48, num_kv_heads=2, num_layers=2, scan_layers=True, **SIZES)
        ),
    ),
    "encoder": (
        models.EncoderModel,
        encoder.Transformer(
            encoder.EncoderConfig(
                48,
                num_layers=1,
                max_positions=20,
                head="pooled",
                num_outputs=3,
                remat_policy="full",
                **SIZES,
            )
        ),
    ),
}


class Nowhere:
    """An input without a position."""

    def save(self, directory):
        del directory

    restore = save


class Job:
    """One family's model, parameters and batches."""

    def __init__(self, family):
        kind, network = FAMILIES[family]
        self.family, self.folder = family, tempfile.mkdtemp()
        self.model = kind(adapters.Adapted(network, RULES, SPACE))
        rng = np.random.default_rng(0)

        def ids(least, most, *shape):
            return rng.integers(least, most, (ROWS, *shape)).astype(np.int32)

        self.batch = {"features": ids(0, 3, 1, 2), "tasks": ids(0, 4, 1)}
        self.asked = dict(self.batch)
        tokens = ids(2, 48, 6)
        if family == "encoder":
            self.batch |= {"encoder_input_tokens": tokens, "labels": ids(1, 4, 1)}
            self.asked = self.batch
        else:
            shifted = np.roll(tokens, 1, 1)
            self.batch |= {"decoder_input_tokens": shifted, "decoder_target_tokens": tokens}
        if family == "t5":
            inputs = {"encoder_input_tokens": ids(2, 48, 5)}
            self.batch |= inputs
            self.asked |= inputs | {"decoder_input_tokens": shifted}
        if family == "decoder":
            self.asked |= {
                "decoder_prompt_tokens": ids(2, 48, 4),
                "decoder_answer_tokens": ids(2, 48, 4),
            }
        drawn = jax.jit(self.model.init)(jax.random.key(0, impl="unsafe_rbg"), self.batch)["params"]
        trained, base = jax.device_get(adapters.split(drawn, self.model.adapted))
        noise = np.random.default_rng(1)  # for adapters that do something
        self.trained = jax.tree.map(
            lambda x: x + 0.1 * noise.normal(size=x.shape).astype(np.float32), trained
        )
        self.frozen = base

    def run(self, sizes, options):
        """What comes of a layout, as printed."""
        data, fsdp, shared = map(int, sizes.split("x"))
        partitioner = partitioning.Partitioner(
            fsdp,
            shared,
            "replicated" if "replicated" in options else "sharded",
            [("length", "model")] if "sequence" in options else (),
        )
        mesh = partitioner.mesh(jax.devices()[: data * fsdp * shared])
        groups = (optimizers.Group(".*"),) if "full" in options else ()
        layout = initialize.layout(self.model, self.batch, groups, partitioner)
        optimizer = optimizers.Optimizer(learning_rate=0.01, groups=groups, lazy="lazy" in options)
        rules = partitioner.all_rules
        trained, frozen = self.trained, self.frozen
        if groups:
            trained, frozen = optimizers.combine(trained, frozen), {}
        model = dataclasses.replace(self.model, loss_chunk=4 if "chunk" in options else None)
        made = trainer.Trainer(model, optimizer, mesh, trained, frozen, layout.axes, rules=rules)
        frozen = partitioning.place(frozen, made.frozen_sharding)
        state = made.init_state(trained, 0)
        rows = partitioning.place_batch(self.batch, mesh)
        stop = np.zeros(mesh.size, np.int32)
        done = 0
        if "resume" in options:
            done = STEPS - 1
            state = self._checkpoint(lambda keeper: keeper.restore(done, state, Nowhere()))
        losses = []
        for step in range(done, STEPS):
            if step == STEPS - 1 and "save" in options:
                self._checkpoint(lambda keeper, s=state: keeper.save(STEPS - 1, s, Nowhere()))
            state, scalars = made.train_step(state, frozen, rows, stop)
            losses.append([float(scalars[name]) for name in ("loss", "grad_norm")])
        found = {"losses": losses}
        if not groups:
            found |= self._parts(made, state, frozen)
        if "decode" in options:
            whole = optimizers.combine(self.trained, self.frozen)
            params = initialize.place(self.model, whole, mesh, partitioner)
            beam = {} if self.family == "encoder" else {"decoder": "beam", "num_decodes": 2}
            predict_fn = predict.predictor(self.model, params, mesh, rules=rules, **beam)
            found["decoded"] = np.asarray(predict_fn(self.asked)).tolist()
        return found

    def _checkpoint(self, act):
        keeper = checkpoints.Checkpointer(self.folder, {"method": "all"})
        result = act(keeper)
        keeper.close()
        return result

    @staticmethod
    def _parts(made, state, frozen):
        """In how many parts a kernel lies on the devices, and how the adapters' matrices are divided."""
        flat = traverse_util.flatten_dict(frozen, sep="/")
        kernel = next(x for path, x in flat.items() if path.endswith("attention/out/kernel"))
        homes = traverse_util.flatten_dict(made.state_sharding.trained, sep="/")
        lora = {p[-1]: list(x.spec)[-2:] for p, x in homes.items() if "/lora/" in p}
        moments = [str(x.sharding.spec) for x in jax.tree.leaves(state.opt_state) if x.ndim]
        assert sorted(moments) == sorted([str(x.spec) for x in homes.values()] * 2)
        return {"kernel": kernel.size // kernel.addressable_shards[0].data.size, **lora}


def main(asked):
    every = not asked
    if every:
        sizes = [s for s in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(s) <= 8]
        asked = [f"{family}:{d}x{f}x{m}" for family in FAMILIES for d, f, m in sizes]
    jobs, first, gaps = {}, {}, []
    for text in asked:
        family, sizes, *options = text.split(":")
        if family not in jobs:
            jobs[family] = Job(family)
        found = jobs[family].run(sizes, options)
        if every:
            one = first.setdefault(family, found)
            found["differs"] = float(np.abs(np.divide(found["losses"], one["losses"]) - 1).max())
            gaps.append(found["differs"])
        print(json.dumps({"layout": text, **found}), flush=True)
    # Not a number is no agreement.
    if not np.all(np.array(gaps) <= TOLERANCE):
        sys.exit(f"losses differ by up to {np.max(gaps):.1e} from those of one device, relatively")


if __name__ == "__main__":
    main(sys.argv[1:])
