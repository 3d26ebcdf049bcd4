"""How fast a batch is decoded: one that mixes datasets, one of a merged dataset, and transformers with peft.

    pip install -c constraints.txt -e '.[parity]'
    python -m benchmarks.decode [--network llama] [--rounds 5] [--ours]

A T5 of width 512, 6+6 layers and 32128 tokens, or a Llama of that width, 6 layers and half as many heads of keys as of
queries (float32, random weights), 16 examples of 64 tokens, 64 new tokens each, greedily and with four beams. Nothing
ends early. Mixed: FLix with two features of rank 4 each on query and value, every row another dataset. Merged: the
first dataset's update is in the base's weights. In transformers, mixed means 16 LoRAs of rank 8 and `adapter_names`,
and both sides have the same weights: they write the same tokens, which is checked.
"""

import argparse
import dataclasses
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from benchmarks.setting import CONFIG, in_transformers
from modjax import adapters
from modjax.features import FeatureSpace
from modjax.models import DecoderOnlyModel, EncoderDecoderModel
from modjax.networks import decoder, t5

BATCH, LENGTH, NEW, BEAMS, RANK = 16, 64, 64, 4, 8
TASKS, LANGUAGES = tuple(f"t{i}" for i in range(4)), tuple(f"l{i}" for i in range(22))
DATASETS = [(TASKS[i % 4], LANGUAGES[i]) for i in range(BATCH)]  # 26 values, every row another pair
SEARCHES = {
    "greedy": {"decoder": "greedy"},
    "beam": {"decoder": "beam", "num_decodes": BEAMS, "alpha": 0.0},
}


@dataclasses.dataclass(frozen=True)
class Network:
    """A network that both sides have.

    Attributes:
      model: makes ours of a network, adapted or not.
      network: of ours, plain.
      peft_task: what peft calls it.
      query_and_value: their names in transformers.
      prompted: whether prompt and answer are one sequence, and `generate` returns both.
    """

    model: Any
    network: Any
    peft_task: str
    query_and_value: tuple[str, str]
    prompted: bool

    def batch(self, draw: np.random.Generator) -> dict[str, np.ndarray]:
        """16 examples without features."""
        inputs = draw.integers(2, CONFIG.vocab_size, (BATCH, LENGTH), np.int32)
        nothing = np.zeros((BATCH, NEW), np.int32)
        if self.prompted:
            return {"decoder_prompt_tokens": inputs, "decoder_answer_tokens": nothing}
        shifted = {"decoder_input_tokens": nothing, "decoder_target_tokens": nothing}
        return {"encoder_input_tokens": inputs, **shifted}

    def init(self, model: Any, batch: dict[str, np.ndarray]) -> Any:
        """Random parameters of ours."""
        shown = dict(batch)
        if self.prompted:
            tokens = shown["decoder_prompt_tokens"]
            shown |= {"decoder_input_tokens": tokens, "decoder_target_tokens": tokens}
        return jax.jit(model.init)(jax.random.key(0), shown)["params"]

    def in_transformers(self) -> Any:
        """The same network, its weights at random."""
        import transformers

        if not self.prompted:
            return transformers.T5ForConditionalGeneration(in_transformers())
        config = self.network.config
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.emb_dim,
                intermediate_size=config.mlp_dim,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                tie_word_embeddings=True,
            )
        )

    def their_name(self, path: str) -> str:
        """`encoder/layers_1/attention/query` as transformers calls it."""
        found = re.fullmatch(r"(\w+)/layers_(\d+)/(\w+)/(\w+)", path)
        assert found is not None, path
        stack, layer, block, part = found.groups()
        name = self.query_and_value[part == "value"]
        if self.prompted:
            return f"model.layers.{layer}.self_attn.{name}"
        cross = block == "encoder_decoder_attention"
        place = "layer.1.EncDecAttention" if cross else "layer.0.SelfAttention"
        return f"{stack}.block.{layer}.{place}.{name}"


LLAMA = decoder.DecoderConfig(
    vocab_size=CONFIG.vocab_size,
    emb_dim=CONFIG.emb_dim,
    num_heads=CONFIG.num_heads,
    num_kv_heads=CONFIG.num_heads // 2,
    head_dim=CONFIG.head_dim,
    mlp_dim=1408,
    num_layers=6,
    mlp_activations=("silu", "linear"),
    logits_via_embedding=True,
)
NETWORKS = {
    "t5": Network(EncoderDecoderModel, t5.Transformer(CONFIG), "SEQ_2_SEQ_LM", ("q", "v"), False),
    "llama": Network(
        DecoderOnlyModel, decoder.Transformer(LLAMA), "CAUSAL_LM", ("q_proj", "v_proj"), True
    ),
}


def flix(kind: Network, base: Any = None) -> tuple[Any, Any, dict[str, Any]]:
    """(model, parameters with adapters that do something, batch); on random weights unless given a base."""
    space = FeatureSpace((("task", TASKS), ("language", LANGUAGES)))
    mixture = adapters.Mixture("flix", adapters.LowRank(RANK // 2), adapters.Features())
    rule = adapters.Rule(r".*attention/(query|value)", mixture)
    module = adapters.Adapted(kind.network, (rule,), space)
    model = kind.model(module, eos_id=-1)
    draw = np.random.default_rng(0)
    ids = [space.encode({"task": task, "language": language}) for task, language in DATASETS]
    batch = {**kind.batch(draw), "features": np.asarray(ids, np.int32)[:, None]}
    added, own = adapters.split(kind.init(model, batch), module)
    added = jax.tree.map(lambda x: jnp.asarray(draw.normal(0, 0.05, x.shape), x.dtype), added)
    return model, adapters.join(own if base is None else base, added), batch


def our_side(model: Any, params: Any, batch: Any, search: str) -> Any:
    """A function that decodes the batch, compiled already; it returns the tokens."""
    options = SEARCHES[search]
    batch = jax.device_put(batch)
    compiled = (
        jax.jit(lambda params, batch: model.predict_batch(params, batch, **options))
        .lower(params, batch)
        .compile()
    )
    return lambda: np.asarray(compiled(params, batch))


def transformers_model(kind: Network) -> tuple[Any, Any]:
    """(the network in transformers with random weights, the same weights as parameters of ours)."""
    import torch

    from modjax import hub

    torch.manual_seed(0)
    model = kind.in_transformers().eval()
    for name, weight in model.named_parameters():
        # The initial values of the attention are so small that all rows would write the same.
        if weight.ndim > 1 and "shared" not in name and "embed" not in name:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        _, base = hub.load_base(folder)
    return model, jax.tree.map(jnp.asarray, base)


def peft_model(kind: Network, model: Any, ours: Any, params: Any) -> Any:
    """The model of transformers with a LoRA for each dataset, composed from our parameters."""
    import copy

    import peft
    import torch

    model = copy.deepcopy(model)
    settings = peft.LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules=list(kind.query_and_value),
        task_type=kind.peft_task,
    )
    added, _ = adapters.split(params, ours.adapted)
    for i, (task, language) in enumerate(DATASETS):
        if i == 0:
            model = peft.get_peft_model(model, settings, "d0")
        else:
            model.add_adapter(f"d{i}", settings)
        composed, leaves = adapters.compose(ours.adapted, added, task=task, language=language)
        weights = dict(model.named_parameters())
        for (path, _), bank in adapters.trees.banks(leaves, composed).items():
            layer = f"base_model.model.{kind.their_name(path)}"
            for side, leaf in (("A", "a"), ("B", "b")):
                weight = weights[f"{layer}.lora_{side}.d{i}.weight"]
                weight.data = torch.tensor(np.array(bank[leaf].T)).contiguous()
    return model.eval()


def their_side(
    kind: Network, model: Any, batch: Any, search: str, **options: Any
) -> Callable[[], np.ndarray]:
    """A function that generates the batch; it returns the tokens."""
    import torch

    name = "decoder_prompt_tokens" if kind.prompted else "encoder_input_tokens"
    # Ours counts a decoder-only network's tokens from 1, for 0 is padding.
    offset = kind.network.config.token_offset if kind.prompted else 0
    tokens = torch.tensor(batch[name] - offset).long()
    beams = {"num_beams": BEAMS, "length_penalty": 0.0} if search == "beam" else {"num_beams": 1}

    def generate() -> np.ndarray:
        with torch.inference_mode():
            found = model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=NEW,
                **beams,
                **options,
            )
        return found.numpy()[:, -NEW:] + offset

    return generate


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--network", choices=NETWORKS, default="t5")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--searches", nargs="+", choices=SEARCHES, default=list(SEARCHES))
    parser.add_argument(
        "--cores", type=int, default=1, help="0 for all; on one, processor time is told"
    )
    parser.add_argument("--ours", action="store_true", help="without transformers and peft")
    args = parser.parse_args(argv)
    clock = measure.use_cores(args.cores)
    kind = NETWORKS[args.network]
    theirs, base = (None, None) if args.ours else transformers_model(kind)
    model, params, batch = flix(kind, base)
    added, own = adapters.split(params, model.adapted)
    task, language = DATASETS[0]
    merged = adapters.merge(model.adapted, added, own, task=task, language=language)
    plain = kind.model(kind.network, eos_id=-1)
    names = {"adapter_names": [f"d{i}" for i in range(BATCH)]}
    if theirs is not None:
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        theirs.generation_config.eos_token_id = None
        theirs_mixed = peft_model(kind, theirs, model, params)
        theirs_merged = peft_model(kind, theirs, model, params)
        theirs_merged = theirs_merged.merge_and_unload(adapter_names=["d0"])
    print(f"{measure.machine()}; batch {BATCH}, {NEW} new tokens of {LENGTH}, medians (quartiles)")
    goals = []
    for search in args.searches:
        sides = {
            "mixed": our_side(model, params, batch, search),
            "merged": our_side(plain, merged, batch, search),
        }
        if theirs is not None:
            sides["peft, mixed"] = their_side(kind, theirs_mixed, batch, search, **names)
            sides["transformers, merged"] = their_side(kind, theirs_merged, batch, search)
            for ours, other in (("mixed", "peft, mixed"), ("merged", "transformers, merged")):
                same = float(np.mean(sides[ours]() == sides[other]()))
                print(f"{search}: {ours} writes {100 * same:.1f} % of the tokens of {other}")
        found = measure.in_turn(sides, args.rounds, clock=clock)
        for name, seconds in found.items():
            speed = measure.spread([BATCH * NEW / s for s in seconds])
            print(f"{search:6}  {name:20}  {measure.spread(seconds)} s  {speed} tokens/s")
        over = measure.ratio(found, "mixed", "merged")
        goals.append(measure.goal(f"{search}: mixed over merged, time", over, 1.10))
        if theirs is not None:
            for ours, other in (("mixed", "peft, mixed"), ("merged", "transformers, merged")):
                faster = measure.ratio(found, other, ours)
                name = f"{search}: {ours} over {other}, tokens per second"
                goals.append(measure.goal(name, faster, 3.0, at_least=True))
    measure.report(goals)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
