"""How fast a batch is decoded: one that mixes datasets, one of a merged dataset, and transformers with peft.

    pip install -c constraints.txt -e '.[parity]'
    python -m benchmarks.decode [--rounds 5] [--ours]

A T5 of width 512, 6+6 layers and 32128 tokens (float32, random weights), 16 examples of 64 tokens, 64 new tokens each,
greedily and with four beams. Nothing ends early. Mixed: FLix with two features of rank 4 each on query and value, every
row another dataset. Merged: the first dataset's update is in the base's weights. In transformers, mixed means 16 LoRAs
of rank 8 and `adapter_names`, and both sides have the same weights: they write the same tokens, which is checked.
"""

import argparse
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
from modjax.models import EncoderDecoderModel
from modjax.networks import t5

BATCH, LENGTH, NEW, BEAMS, RANK = 16, 64, 64, 4, 8
TASKS, LANGUAGES = tuple(f"t{i}" for i in range(4)), tuple(f"l{i}" for i in range(22))
DATASETS = [(TASKS[i % 4], LANGUAGES[i]) for i in range(BATCH)]  # 26 values, every row another pair
SEARCHES = {
    "greedy": {"decoder": "greedy"},
    "beam": {"decoder": "beam", "num_decodes": BEAMS, "alpha": 0.0},
}


def flix(base: Any = None) -> tuple[EncoderDecoderModel, Any, dict[str, Any]]:
    """(model, parameters with adapters that do something, batch); on random weights unless given a base."""
    space = FeatureSpace((("task", TASKS), ("language", LANGUAGES)))
    mixture = adapters.Mixture("flix", adapters.LowRank(RANK // 2), adapters.Features())
    rule = adapters.Rule(r".*attention/(query|value)", mixture)
    module = adapters.Adapted(t5.Transformer(CONFIG), (rule,), space)
    model = EncoderDecoderModel(module, eos_id=-1)
    draw = np.random.default_rng(0)
    ids = [space.encode({"task": task, "language": language}) for task, language in DATASETS]
    batch = {
        "encoder_input_tokens": draw.integers(2, CONFIG.vocab_size, (BATCH, LENGTH), np.int32),
        "decoder_input_tokens": np.zeros((BATCH, NEW), np.int32),
        "decoder_target_tokens": np.zeros((BATCH, NEW), np.int32),
        "features": np.asarray(ids, np.int32)[:, None],
    }
    params = jax.jit(model.init)(jax.random.key(0), batch)["params"]
    added, own = adapters.split(params, module)
    added = jax.tree.map(lambda x: jnp.asarray(draw.normal(0, 0.05, x.shape), x.dtype), added)
    return model, adapters.join(own if base is None else base, added), batch


def our_side(model: EncoderDecoderModel, params: Any, batch: Any, search: str) -> Any:
    """A function that decodes the batch, compiled already; it returns the tokens."""
    options = SEARCHES[search]
    batch = jax.device_put(batch)
    compiled = (
        jax.jit(lambda params, batch: model.predict_batch(params, batch, **options))
        .lower(params, batch)
        .compile()
    )
    return lambda: np.asarray(compiled(params, batch))


def transformers_model() -> tuple[Any, Any]:
    """(transformers' T5 with random weights, the same weights as parameters of ours)."""
    import torch
    import transformers

    from modjax import hub

    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(in_transformers()).eval()
    for name, weight in model.named_parameters():
        # The initial values of the attention are so small that all rows would write the same.
        if "layer_norm" not in name and "shared" not in name:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        _, base = hub.load_base(folder)
    return model, jax.tree.map(jnp.asarray, base)


def peft_model(model: Any, ours: EncoderDecoderModel, params: Any) -> Any:
    """The model of transformers with a LoRA for each dataset, composed from our parameters."""
    import copy

    import peft
    import torch

    model = copy.deepcopy(model)
    settings = peft.LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"
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
            layer = f"base_model.model.{their_name(path)}"
            for side, leaf in (("A", "a"), ("B", "b")):
                weight = weights[f"{layer}.lora_{side}.d{i}.weight"]
                weight.data = torch.tensor(np.array(bank[leaf].T)).contiguous()
    return model.eval()


def their_name(path: str) -> str:
    """`encoder/layers_1/attention/query` as transformers calls it."""
    found = re.fullmatch(r"(\w+)/layers_(\d+)/(\w+)/(\w+)", path)
    assert found is not None, path
    stack, layer, block, part = found.groups()
    cross = block == "encoder_decoder_attention"
    place = "layer.1.EncDecAttention" if cross else "layer.0.SelfAttention"
    return f"{stack}.block.{layer}.{place}.{'q' if part == 'query' else 'v'}"


def their_side(model: Any, batch: Any, search: str, **options: Any) -> Callable[[], np.ndarray]:
    """A function that generates the batch; it returns the tokens."""
    import torch

    tokens = torch.tensor(batch["encoder_input_tokens"]).long()
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
        return found.numpy()[:, 1:]

    return generate


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--searches", nargs="+", choices=SEARCHES, default=list(SEARCHES))
    parser.add_argument(
        "--cores", type=int, default=1, help="0 for all; on one, processor time is told"
    )
    parser.add_argument("--ours", action="store_true", help="without transformers and peft")
    args = parser.parse_args(argv)
    clock = measure.use_cores(args.cores)
    theirs, base = (None, None) if args.ours else transformers_model()
    model, params, batch = flix(base)
    added, own = adapters.split(params, model.adapted)
    task, language = DATASETS[0]
    merged = adapters.merge(model.adapted, added, own, task=task, language=language)
    plain = EncoderDecoderModel(t5.Transformer(CONFIG), eos_id=-1)
    names = {"adapter_names": [f"d{i}" for i in range(BATCH)]}
    if theirs is not None:
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        theirs.generation_config.eos_token_id = None
        theirs_mixed = peft_model(theirs, model, params)
        theirs_merged = peft_model(theirs, model, params)
        theirs_merged = theirs_merged.merge_and_unload(adapter_names=["d0"])
    print(f"{measure.machine()}; batch {BATCH}, {NEW} new tokens of {LENGTH}, medians (quartiles)")
    goals = []
    for search in args.searches:
        sides = {
            "mixed": our_side(model, params, batch, search),
            "merged": our_side(plain, merged, batch, search),
        }
        if theirs is not None:
            sides["peft, mixed"] = their_side(theirs_mixed, batch, search, **names)
            sides["transformers, merged"] = their_side(theirs_merged, batch, search)
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
