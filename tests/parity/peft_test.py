"""Our LoRA, IA3, Polytropon and MHR are peft's, in outputs and gradients; and FLix composes to its LoRA."""

import copy
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


def _theirs(model):
    """{"<layer>.lora_A": parameter} of what trains in a peft model."""
    return {
        re.sub(r"\.default(\.weight)?", "", name): weight
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }


def _ours(tree, adapted):
    """{peft's name: array in peft's layout} of our adapters (interop: the methods of PEFT)."""
    found = {}
    for (path, name), leaves in adapters.trees.places(tree, adapted).items():
        layer = _peft_layer(path)
        leaves = {leaf: np.array(value) for leaf, value in leaves.items()}
        if "logits" in leaves:
            tasks, heads, skills = leaves["logits"].shape
            (width, _), (_, features) = leaves["a"].shape, leaves["b"].shape
            a = leaves["a"].reshape(heads, width // heads, skills, -1)
            b = leaves["b"].reshape(skills, -1, heads, features // heads)
            found[f"{layer}.poly_lora_A"] = a.transpose(0, 2, 1, 3)
            found[f"{layer}.poly_lora_B"] = b.transpose(2, 0, 1, 3)
            found[f"{layer}.poly_router.module_logits"] = leaves["logits"].reshape(tasks, -1)
        elif "scale" in leaves:
            feed_forward = adapted.rule_for(path, name).mixture.module.acts_on == "input"
            found[f"{layer}.ia3_l"] = leaves["scale"] if feed_forward else leaves["scale"].T
        else:
            found[f"{layer}.lora_A"] = leaves["a"].T
            found[f"{layer}.lora_B"] = leaves["b"].T
    return found


def _copy(tree, adapted, model):
    """Our adapters into the peft model; every one of either must have its counterpart."""
    ours, theirs = _ours(tree, adapted), _theirs(model)
    assert set(ours) == set(theirs)
    with torch.no_grad():
        for name, value in ours.items():
            assert theirs[name].shape == value.shape, name
            theirs[name].copy_(torch.tensor(value))


def _torch_logits(model, batch):
    tasks = {}
    if "tasks" in batch:
        tasks["task_ids"] = torch.tensor(batch["tasks"][:, 0]).long() - 1  # ours begin at 1
    return model(
        input_ids=torch.tensor(batch["encoder_input_tokens"]).long(),
        attention_mask=torch.tensor(batch["encoder_input_tokens"] > 0).long(),
        decoder_input_ids=torch.tensor(batch["decoder_input_tokens"]).long(),
        decoder_attention_mask=torch.tensor(batch["decoder_target_tokens"] > 0).long(),
        **tasks,
    ).logits


def _random(tree, low_rank=0.1):
    """Adapters with all weights random: with B = 0, as it starts, A would have no gradient."""
    rng = np.random.default_rng(0)
    spread = {"a": (0.0, low_rank), "b": (0.0, low_rank), "scale": (1.0, 0.3), "logits": (0.0, 1.0)}

    def draw(path, x):
        mean, deviation = spread[path[-1].key]
        return (mean + deviation * rng.normal(size=x.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, tree)


def _adapted(overrides, rules, batch, space=None, low_rank=0.1):
    """(model, random adapters) around the network of `overrides`."""
    network = t5.Transformer(t5.T5Config(**overrides))
    model = EncoderDecoderModel(
        adapters.Adapted(network, rules, space), loss_normalizing_factor="num_real_target_tokens"
    )
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
    tree, _ = adapters.split(shapes, model.adapted)
    return model, _random(tree, low_rank)


def _peft_model(hf_model, config):
    """A peft model around a copy, so that other tests find the original as it was."""
    return peft.get_peft_model(copy.deepcopy(hf_model), config).eval()


def _lora_config(rank, alpha):
    return peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=TARGETS, lora_dropout=0.0, task_type="SEQ_2_SEQ_LM"
    )


def _assert_same(model, ours, base, theirs, batch):
    """The logits of both to 1e-5, the gradients of all that trains to 1e-4 of the largest."""
    _copy(ours, model.adapted, theirs)

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

    their_gradients = {name: weight.grad.numpy() for name, weight in _theirs(theirs).items()}
    worst: dict[str, list[float]] = {}
    for name, gradient in _ours(gradients, model.adapted).items():
        kind = name.rpartition(".")[2]
        now = np.abs(gradient - their_gradients[name]).max(), np.abs(their_gradients[name]).max()
        worst[kind] = np.maximum(worst.get(kind, (0.0, 0.0)), now)
    print(
        f"logits {difference:.1e} (the adapters move them by {effect:.2f}), gradients",
        ", ".join(f"{kind} {apart:.1e} of {size:.3f}" for kind, (apart, size) in worst.items()),
    )
    assert effect > 0.1
    assert difference < 1e-5
    for apart, size in worst.values():
        assert size > 1e-3
        assert apart < 1e-4 * min(size, 1.0)
    np.testing.assert_allclose(our_loss, their_loss.item(), rtol=1e-6)


@pytest.mark.parametrize("variant", ["t5", "mt5", "umt5_tied"])
def test_lora_has_pefts_logits_and_gradients(hf_t5, variant):
    hf_model, folder = hf_t5(variant)
    overrides, base = hub.load_base(folder)
    batch = _batch()
    mixture = adapters.Mixture("lora", adapters.LowRank(rank=3, alpha=6.0), adapters.Single())
    model, ours = _adapted(overrides, (adapters.Rule(EVERYWHERE, mixture),), batch)
    theirs = _peft_model(hf_model, _lora_config(rank=3, alpha=6))
    _assert_same(model, ours, base, theirs, batch)


@pytest.mark.parametrize("variant", ["t5", "mt5"])
def test_ia3_has_pefts_logits_and_gradients(hf_t5, variant):
    hf_model, folder = hf_t5(variant)
    overrides, base = hub.load_base(folder)
    batch = _batch()
    rules = (
        adapters.Rule(".*attention/(key|value)", adapters.Mixture("ia3", adapters.Scale())),
        adapters.Rule(".*/mlp/wo", adapters.Mixture("ia3", adapters.Scale("input"))),
    )
    model, ours = _adapted(overrides, rules, batch)
    config = peft.IA3Config(
        target_modules=["k", "v", "wo"], feedforward_modules=["wo"], task_type="SEQ_2_SEQ_LM"
    )
    _assert_same(model, ours, base, _peft_model(hf_model, config), batch)


@pytest.mark.parametrize("heads", [1, 2])
def test_skills_routed_in_evaluation_have_pefts_logits_and_gradients(hf_t5, heads):
    """Polytropon and MHR on a batch that mixes tasks; peft's scale is 1 / r, so alpha is 1.

    The variant with smooth activations: where a relu's input is zero up to rounding, either side's gradient is right.
    """
    hf_model, folder = hf_t5("mt5")
    overrides, base = hub.load_base(folder)
    batch = _batch() | {"tasks": np.array([[2], [1], [3], [2]], np.int32)}
    space = FeatureSpace((), datasets=("copy", "parse", "tag"))
    mixture = adapters.Mixture(
        "skills", adapters.LowRank(rank=2, alpha=1.0), adapters.Skills(4, heads=heads)
    )
    rules = (adapters.Rule(EVERYWHERE, mixture),)
    model, ours = _adapted(overrides, rules, batch, space, low_rank=0.25)
    config = peft.PolyConfig(
        poly_type="poly",
        r=2,
        n_tasks=3,
        n_skills=4,
        n_splits=heads,
        target_modules=TARGETS,
        task_type="SEQ_2_SEQ_LM",
    )
    _assert_same(model, ours, base, _peft_model(hf_model, config), batch)


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

    theirs = _peft_model(hf_model, _lora_config(rank=5, alpha=5))
    for row, features in enumerate(datasets):
        single, pairs = adapters.compose(model.adapted, ours, **features)
        _copy(hub.unstack_layers(pairs) if scan_layers else pairs, single, theirs)
        with torch.no_grad():
            expected = _torch_logits(theirs, {k: v[row : row + 1] for k, v in batch.items()})
        real = batch["decoder_target_tokens"][row] > 0
        difference = np.abs(mixed[row] - expected.numpy()[0])[real].max()
        print(f"{features}: {difference:.1e}")
        assert difference < 1e-5
