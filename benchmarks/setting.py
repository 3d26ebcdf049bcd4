"""The reference setting of the speed benchmarks: a T5 of 60.5 million random weights, and a step of each method.

Width 512, 6 + 6 layers, 8 heads, relu feed-forward of 2048, vocabulary of 32128 with tied output layer; 8 examples of
64 input and 64 target tokens, float32, no dropout. Adapters of rank 8 on queries and values, trained by AdamW. FLix
gives each feature value a rank of 4, two of which are active.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from modjax import adapters, initialize, optimizers, partitioning, profiling, trainer
from modjax.adapters.low_rank import choose_form
from modjax.features import FeatureSpace
from modjax.models import EncoderDecoderModel
from modjax.networks import t5

CONFIG = t5.T5Config(
    vocab_size=32128,
    emb_dim=512,
    num_heads=8,
    head_dim=64,
    mlp_dim=2048,
    num_encoder_layers=6,
    num_decoder_layers=6,
    mlp_activations=("relu",),
    logits_via_embedding=True,
)
BATCH, LENGTH, RANK, SKILLS = 8, 64, 8, 8
# Positions that have logits at a time, where two passes' logits are not compared (see `models.Model.loss_chunk`).
CHUNK = 16
SITES = r".*attention/(query|value)"


@dataclasses.dataclass(frozen=True)
class Method:
    """What is trained.

    Attributes:
      bank: what is attached, or None for the network alone.
      router: who uses it.
      languages: values of the second feature; the first one has four.
      consistency: see `models.Model`.
      lazy: see `optimizers.Optimizer`.
      config: of the network.
    """

    bank: Any = None
    router: Any = None
    languages: int = 22
    consistency: float = 0.0
    lazy: bool = False
    config: t5.T5Config = CONFIG

    @property
    def module(self) -> Any:
        """The network with the adapters."""
        network = t5.Transformer(self.config)
        if self.bank is None:
            return network
        rule = adapters.Rule(SITES, adapters.Mixture("adapter", self.bank, self.router))
        return adapters.Adapted(network, (rule,))

    @property
    def space(self) -> FeatureSpace:
        """Two features, and as many datasets as languages."""
        languages = tuple(f"language{i}" for i in range(self.languages))
        tasks = tuple(f"task{i}" for i in range(4))
        datasets = tuple(f"dataset{i}" for i in range(self.languages))
        return FeatureSpace((("task", tasks), ("language", languages)), datasets)


_HALF = adapters.LowRank(RANK // 2)
_SKILL = adapters.LowRank(RANK, alpha=1.0)
METHODS: Mapping[str, Method] = {
    "full": Method(),
    "lora": Method(adapters.LowRank(RANK), adapters.Single()),
    "flix_26": Method(_HALF, adapters.Features()),
    "flix_500": Method(_HALF, adapters.Features(), languages=496),
    "flix_26_lazy": Method(_HALF, adapters.Features(), lazy=True),
    "flix_500_lazy": Method(_HALF, adapters.Features(), languages=496, lazy=True),
    "polytropon": Method(_SKILL, adapters.Skills(SKILLS)),
    "poly_s": Method(_SKILL, adapters.Skills(SKILLS, heads=8)),
    "adamix": Method(adapters.LowRank(RANK, share_up=True), adapters.Stochastic(SKILLS)),
    "adamix_consistency": Method(
        adapters.LowRank(RANK, share_up=True), adapters.Stochastic(SKILLS), consistency=1.0
    ),
}


def batch(method: Method, seed: int = 0) -> dict[str, jax.Array]:
    """Random tokens without padding, every row of another dataset."""
    draw = np.random.default_rng(seed)
    tokens = {
        name: draw.integers(2, CONFIG.vocab_size, (BATCH, LENGTH), np.int32)
        for name in ("encoder_input_tokens", "decoder_target_tokens")
    }
    targets = tokens["decoder_target_tokens"]
    tokens["decoder_input_tokens"] = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    places = np.arange(BATCH)
    features = np.stack([places % 4, places * 7 % method.languages], axis=1) + 1
    tokens["features"] = features[:, None].astype(np.int32)
    tokens["tasks"] = (places * 7 % method.languages + 1)[:, None].astype(np.int32)
    return jax.tree.map(jnp.asarray, tokens)


def padded(count: int) -> list[dict[str, np.ndarray]]:
    """Batches of random tokens, the second half of a row's places partly padding; rows are of random datasets."""
    draw = np.random.default_rng(0)
    found = []
    for _ in range(count):
        rows = {"tasks": draw.integers(1, 23, (BATCH, 1), np.int32)}
        for name in ("encoder_input_tokens", "decoder_target_tokens"):
            tokens = draw.integers(2, CONFIG.vocab_size, (BATCH, LENGTH), np.int32)
            lengths = draw.integers(LENGTH // 2, LENGTH + 1, (BATCH, 1))
            rows[name] = np.where(np.arange(LENGTH) < lengths, tokens, 0)
        targets = rows["decoder_target_tokens"]
        rows["decoder_input_tokens"] = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
        found.append(rows)
    return found


def in_transformers() -> Any:
    """The configuration of the same network in transformers, without dropout."""
    import transformers

    return transformers.T5Config(
        vocab_size=CONFIG.vocab_size,
        d_model=CONFIG.emb_dim,
        d_kv=CONFIG.head_dim,
        d_ff=CONFIG.mlp_dim,
        num_layers=CONFIG.num_encoder_layers,
        num_heads=CONFIG.num_heads,
        feed_forward_proj="relu",
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )


class Step:
    """A method's training step; calling it does one and waits for it.

    Args:
      method: what trains.
      base: the frozen network's weights; random if None.
      rows: the batch; that of the setting if None.
      like: a step with the same parameters, held once for both: either moves them on.

    Attributes:
      lowered: the program before it is compiled.
      tracing: seconds of the processor that it took to trace and lower it.
    """

    def __init__(
        self,
        method: Method,
        base: Mapping[str, Any] | None = None,
        rows: Mapping[str, jax.Array] | None = None,
        like: "Step | None" = None,
    ):
        began = time.process_time()
        model = EncoderDecoderModel(
            method.module,
            consistency=method.consistency,
            loss_normalizing_factor="num_real_target_tokens",
            loss_chunk=None if method.consistency else CHUNK,
        ).with_space(method.space)
        self.model = model
        self._batch = batch(method) if rows is None else dict(rows)
        optimizer = optimizers.Optimizer(learning_rate=1e-4, lazy=method.lazy)
        layout = initialize.layout(model, self._batch, optimizer.groups)
        mesh = partitioning.make_mesh(1, jax.devices()[:1])
        self._trainer = trainer.Trainer(
            model,
            optimizer,
            mesh,
            layout.trained,
            layout.frozen,
            layout.axes,
            rates=layout.rates,
            lazy=layout.lazy,
        )
        self.tracing = time.process_time() - began
        if like is not None:
            self.frozen, self._held = like.frozen, like._held
        else:
            if base is None:
                base = initialize.host_init(model, self._batch, layout.frozen, 0)
            own = initialize.host_init(model, self._batch, layout.trained, 0)
            self.frozen = partitioning.place(
                base if layout.frozen else {}, self._trainer.frozen_sharding
            )
            self._held = [self._trainer.init_state(own, 0)]
        self._flag = jnp.zeros((1,), jnp.int32)
        began = time.process_time()
        arguments = (self.state, self.frozen, self._batch, self._flag)
        self.lowered = self._trainer.train_step.lower(*arguments)
        self.tracing += time.process_time() - began

    @functools.cached_property
    def compiled(self) -> Any:
        """The program, compiled when it is first asked for."""
        program = self.lowered.compile()
        profiling.release_freed_memory()  # as a training does
        return program

    @property
    def flops(self) -> float:
        """Floating point operations of the compiled program, by XLA's count."""
        return float(self.compiled.cost_analysis()["flops"])

    @property
    def state(self) -> trainer.TrainState:
        """As the last step left it."""
        return self._held[0]

    def feed(self, rows: Mapping[str, Any]) -> None:
        """Takes another batch of the same shapes."""
        self._batch = jax.tree.map(jnp.asarray, dict(rows))

    def __call__(self) -> float:
        """The step's loss, per target."""
        self._held[0], sums = self.compiled(self.state, self.frozen, self._batch, self._flag)
        return float(sums["loss"] / sums["weight"])


def forward() -> tuple[Callable[[], float], float]:
    """The frozen network's loss of a batch alone, and the operations of it."""
    method = METHODS["full"]
    model, rows = EncoderDecoderModel(method.module), batch(method)
    params = jax.jit(model.init)(jax.random.key(0), rows)["params"]
    compiled = jax.jit(lambda p, b: model.loss_fn(p, b, None)[0]).lower(params, rows).compile()
    return lambda: float(compiled(params, rows)), float(compiled.cost_analysis()["flops"])


def flops_on_paper(name: str) -> float:
    """Floating point operations of the products of matrices in a step of a method, or of "forward".

    A product of `[N, D]` and `[D, K]` is `2 N D K`. Backward, a frozen kernel's product costs as much again, for the
    gradient of its input; a trained kernel's twice as much. The two products of attention cost twice as much backward.
    In the first layers of adapted networks nothing below an adapter needs a gradient: no input's, and no key's.
    Norms, softmax, the optimizer and all else that is not a product of matrices are left out.
    """
    cfg, tokens = CONFIG, BATCH * LENGTH
    joined = cfg.num_heads * cfg.head_dim
    layers = cfg.num_encoder_layers + cfg.num_decoder_layers
    projection = tokens * cfg.emb_dim * joined
    attentions = layers + cfg.num_decoder_layers
    kernels = attentions * 4 * projection + layers * 2 * tokens * cfg.emb_dim * cfg.mlp_dim
    kernels += tokens * cfg.emb_dim * cfg.vocab_size
    product = tokens * LENGTH * joined  # of attention: queries with keys, weights with values
    scores = attentions * 2 * product
    if name == "forward":
        return 2.0 * (kernels + scores)
    if name == "full":
        return 2.0 * (3 * kernels + 3 * scores)
    # Encoder and decoder begin with a layer whose query, key and value need no gradient of their input.
    base = 2 * kernels - 2 * 3 * projection + 3 * scores - 2 * product
    method = METHODS[name]
    modules = method.router.modules(method.space)
    if method.lazy:  # the values that the batch can have
        space = method.space
        few = tuple((name, values[:BATCH]) for name, values in space.features)
        modules = method.router.modules(dataclasses.replace(space, features=few))
    ranks = method.bank.ranks(modules)
    down, up = sum(ranks), sum(ranks)
    if choose_form(sum(ranks), RANK, BATCH, LENGTH, jax.default_backend()) == "gathered":
        down = up = RANK  # each row's own columns
    if name.startswith("adamix"):
        down = up = RANK  # one module is drawn for the batch before it meets a token
    width = cfg.emb_dim * down + up * joined
    sites = 2 * attentions
    # Forward, the gradients of both parts and of what they meet; the first layers' input needs none.
    added = sites * tokens * 3 * width - 2 * 2 * tokens * cfg.emb_dim * down
    if name.startswith("adamix"):  # the average over the bank, forward and backward
        added += sites * 2 * SKILLS * RANK * cfg.emb_dim
    passes = 2 if method.consistency else 1
    return 2.0 * passes * (base + added)
