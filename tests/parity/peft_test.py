"""Our LoRA is peft's LoRA, in outputs and gradients; and FLix composes to it."""

import re

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from modjax import adapters, hub  # noqa: E402
from modjax.features import FeatureSpace  # noqa: E402
from modjax.models import EncoderDecoderModel  # noqa: E402
from modjax.networks import t5  # noqa: E402

EVERYWHERE = r".*(attention/(query|key|value|out)|mlp/w\w+)"
TARGETS = ["q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"]
_PROJECTIONS = {"query": "q", "key": "k", "value": "v", "out": "o"}


def _batch(seed=3):
    rng = np.random.default_rng(seed)

    def padded(lengths, width):
        tokens = rng.integers(2, 67, (len(lengths), width))
        return np.where(np.arange(width) < np.array(lengths)[:, None], tokens, 0).astype(np.int32)

    targets = padded([7, 3, 9, 5], 9)
    return {
        "encoder_input_tokens": padded([12, 5, 9, 12], 12),
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": targets,
    }


def _peft_layer(path: str) -> str:
    """`encoder/layers_1/attention/query` as peft calls it (interop: T5 in the PEFT format)."""
    stack, layer, block, part = re.fullmatch(r"(\w+)/layers_(\d+)/(\w+)/(\w+)", path).groups()
    place = {
        "attention": "layer.0.SelfAttention",
        "self_attention": "layer.0.SelfAttention",
        "encoder_decoder_attention": "layer.1.EncDecAttention",
        "mlp": f"layer.{2 if stack == 'decoder' else 1}.DenseReluDense",
    }[block]
    return f"base_model.model.{stack}.block.{layer}.{place}.{_PROJECTIONS.get(part, part)}"


def _lora_weights(model):
    """{"<layer>.lora_A": parameter} of a peft model."""
    return {
        name.removesuffix(".default.weight"): weight
        for name, weight in model.named_parameters()
        if "lora_" in name
    }


def _copy(tree, model):
    """Our adapters into the peft model; every one of either must have its counterpart."""
    theirs = _lora_weights(model)
    for (path, _), pair in adapters.trees.places(tree, _NAMED).items():
        for leaf, letter in (("a", "A"), ("b", "B")):
            weight = theirs.pop(f"{_peft_layer(path)}.lora_{letter}")
            with torch.no_grad():
                weight.copy_(torch.tensor(np.array(pair[leaf]).T))
    assert not theirs, f"peft adapts more layers: {list(theirs)}"


_NAMED = adapters.Adapted(None, (adapters.Rule("x", adapters.Mixture("lora")),))


def _torch_logits(model, batch):
    return model(
        input_ids=torch.tensor(batch["encoder_input_tokens"]).long(),
        attention_mask=torch.tensor(batch["encoder_input_tokens"] > 0).long(),
        decoder_input_ids=torch.tensor(batch["decoder_input_tokens"]).long(),
        decoder_attention_mask=torch.tensor(batch["decoder_target_tokens"] > 0).long(),
    ).logits


def _random(tree, seed=0):
    """Adapters with all weights random: with B = 0, as they start, A would have no gradient."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) * 0.1, tree)


def _adapted(overrides, rules, batch, space=None):
    """(model, random adapters) around the network of `overrides`."""
    network = t5.Transformer(t5.T5Config(**overrides))
    model = EncoderDecoderModel(
        adapters.Adapted(network, rules, space), loss_normalizing_factor="num_real_target_tokens"
    )
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
    tree, _ = adapters.split(shapes, model.adapted)
    return model, _random(tree)


def _peft_model(hf_model, rank, alpha):
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=TARGETS, lora_dropout=0.0, task_type="SEQ_2_SEQ_LM"
    )
    return peft.get_peft_model(hf_model, config).eval()


@pytest.mark.parametrize("variant", ["t5", "mt5", "umt5_tied"])
def test_lora_has_pefts_logits_and_gradients(hf_t5, variant):
    hf_model, folder = hf_t5(variant)
    overrides, base = hub.load_base(folder)
    batch = _batch()
    mixture = adapters.Mixture("lora", adapters.LowRank(rank=3, alpha=6.0), adapters.Single())
    model, ours = _adapted(overrides, (adapters.Rule(EVERYWHERE, mixture),), batch)
    theirs = _peft_model(hf_model, rank=3, alpha=6)
    try:
        _copy(ours, theirs)

        def loss(tree):
            logits = model.logits(adapters.join(tree, base), batch)
            return model.loss_fn(adapters.join(tree, base), batch, None)[0], logits

        (our_loss, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(ours)

        expected = _torch_logits(theirs, batch)
        targets = torch.tensor(batch["decoder_target_tokens"]).long()
        their_loss = torch.nn.functional.cross_entropy(
            expected.flatten(0, 1), targets.flatten(), ignore_index=0
        )
        their_loss.backward()
        real = batch["decoder_target_tokens"] > 0
        difference = np.abs(np.asarray(logits) - expected.detach().numpy())[real].max()
        with theirs.disable_adapter(), torch.no_grad():
            plain = _torch_logits(theirs, batch).numpy()
        effect = np.abs(plain - expected.detach().numpy())[real].max()

        named = _lora_weights(theirs)
        worst = largest = 0.0
        for (path, _), pair in adapters.trees.places(gradients, _NAMED).items():
            for leaf, letter in (("a", "A"), ("b", "B")):
                gradient = named[f"{_peft_layer(path)}.lora_{letter}"].grad.numpy().T
                worst = max(worst, np.abs(np.asarray(pair[leaf]) - gradient).max())
                largest = max(largest, np.abs(gradient).max())
        print(
            f"{variant}: logits {difference:.1e} (LoRA moves them by {effect:.2f}), "
            f"gradients {worst:.1e} of {largest:.2f}"
        )
        assert effect > 0.1 and largest > 0.05
        assert difference < 1e-5
        assert worst < 1e-4
        np.testing.assert_allclose(our_loss, their_loss.item(), rtol=1e-6)
    finally:
        theirs.unload()


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_flix_on_a_mixed_batch_equals_peft_with_each_datasets_composition(hf_t5, scan_layers):
    hf_model, folder = hf_t5("mt5")
    overrides, base = hub.load_base(folder, scan_layers=scan_layers)
    datasets = [
        {"task": "parse", "language": "sw"},
        {"task": "tag", "language": "sw"},
        {"task": "tag", "language": "hi"},
        {"task": "parse", "language": "hi"},
    ]
    space = FeatureSpace((("task", ("parse", "tag")), ("language", ("en", "sw", "hi"))))
    batch = _batch()
    batch["features"] = np.stack([space.encode(d) for d in datasets])[:, None, :]
    module = adapters.LowRank(rank={"task": 3, "language": 2}, alpha={"task": 6.0, "language": 1.0})
    mixture = adapters.Mixture("flix", module, adapters.Features())
    rule = adapters.Rule(EVERYWHERE, mixture)
    model, ours = _adapted(overrides, (rule,), batch, space)
    mixed = np.asarray(jax.jit(model.logits)(adapters.join(ours, base), batch))

    theirs = _peft_model(hf_model, rank=5, alpha=5)
    try:
        for row, features in enumerate(datasets):
            _, pairs = adapters.compose(model.adapted, ours, **features)
            _copy(hub.unstack_layers(pairs) if scan_layers else pairs, theirs)
            with torch.no_grad():
                expected = _torch_logits(theirs, {k: v[row : row + 1] for k, v in batch.items()})
            real = batch["decoder_target_tokens"][row] > 0
            difference = np.abs(mixed[row] - expected.numpy()[0])[real].max()
            print(f"{features}: {difference:.1e}")
            assert difference < 1e-5
    finally:
        theirs.unload()
