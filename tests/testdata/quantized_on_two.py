"""Steps on an int8 base: on one device, on two that share the work, on two that share the base; prints what came."""

import json

import jax
import numpy as np

from modjax import adapters, initialize, models, optimizers, partitioning, quantization
from modjax.networks import decoder
from modjax.trainer import Trainer

config = decoder.DecoderConfig(
    40,
    emb_dim=16,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=32,
    num_layers=2,
    scan_layers=True,
)
network = decoder.Transformer(config)
rule = adapters.Rule(".*/(query|wi_0|wo)", adapters.Mixture("lora", adapters.LowRank(2)))
model = models.DecoderOnlyModel(adapters.Adapted(network, (rule,)))
tokens = np.random.default_rng(0).integers(1, 40, (4, 6)).astype(np.int32)
batch = {"decoder_input_tokens": np.roll(tokens, 1, 1), "decoder_target_tokens": tokens}
layout = initialize.layout(model, batch)
params = jax.jit(model.init)(jax.random.key(0), batch)["params"]
trained, base = jax.device_get(adapters.split(params, model.adapted))
frozen = quantization.quantize(base)

for fsdp, share in ((1, 1), (1, 2), (2, 1)):
    mesh = partitioning.make_mesh(share, jax.devices()[: fsdp * share], fsdp)
    optimizer = optimizers.Optimizer(learning_rate=0.01)
    trainer = Trainer(model, optimizer, mesh, trained, frozen, layout.axes)
    placed = partitioning.place(frozen, trainer.frozen_sharding)
    state = trainer.init_state(trained, 0)
    losses = []
    for _ in range(3):
        rows = partitioning.place_batch(batch, mesh)
        state, scalars = trainer.train_step(state, placed, rows, np.zeros(mesh.size, np.int32))
        losses.append(float(scalars["loss"]))
    kernel = placed["decoder"]["layers"]["mlp"]["wi_0"]["kernel"]
    parts = {
        "values": kernel.values.addressable_shards[0].data.shape,
        "rest": kernel.rest.addressable_shards[0].data.shape,
        "scale": kernel.scale.addressable_shards[0].data.shape,
        "rows": placed["token_embedder"]["embedding"].scale.addressable_shards[0].data.shape,
    }
    print(json.dumps({"losses": losses, **parts}), flush=True)
