"""What is exported computes in transformers and peft what it computes here."""

import functools
import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from modjax import adapters, hub  # noqa: E402
from modjax.hub.export import export_hf  # noqa: E402
from modjax.hub.kinds import KINDS  # noqa: E402
from modjax.hub.peft import export_peft  # noqa: E402
from modjax.hub.run import MODELS  # noqa: E402
from modjax.optimizers import Group  # noqa: E402
from tests.testdata.trained_runs import SPACE, write_run  # noqa: E402

TOLERANCE = 2e-5
LAYERS = r".*/(query|value|out|wi|wi_0|wo)"
DATASETS = {
    "parse_en": {"task": "parse", "language": "en"},
    "tag_sw": {"task": "tag", "language": "sw"},
    "parse_yo": {"task": "parse", "language": "yo"},
}
_AUTO = {
    "t5": "AutoModelForSeq2SeqLM",
    "decoder": "AutoModelForCausalLM",
    "encoder": "AutoModelForSequenceClassification",
}
_ENCODER = dict(
    vocab_size=67, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4
)


def low_rank(router, name="bank", layers=LAYERS, **settings):
    mixture = adapters.Mixture(name, adapters.LowRank(**settings), router)
    return (adapters.Rule(layers, mixture),)


METHODS = {
    "lora": low_rank(adapters.Single(), rank=3, alpha=6),
    "flix": low_rank(adapters.Features(), rank={"task": 3, "language": 2}),
    "polytropon": low_rank(adapters.Skills(3), rank=2),
    "poly_s": low_rank(adapters.Skills(3, heads=2, granularity="block"), rank=2),
    "adamix": low_rank(adapters.Stochastic(3), rank=2, alpha=4, share_up=True),
    "ia3": (
        adapters.Rule(r".*/(key|value)", adapters.Mixture("ia3", adapters.Scale())),
        adapters.Rule(r".*/mlp/wo", adapters.Mixture("ia3", adapters.Scale("input"))),
    ),
}


@pytest.fixture(scope="module")
def hf_encoder(tmp_path_factory):
    """A function: (family, classes or 0 for none) -> a folder of transformers."""

    @functools.cache
    def make(family: str, classes: int):
        name, settings = {
            "bert": ("Bert", dict(max_position_embeddings=20)),
            "roberta": ("Roberta", dict(max_position_embeddings=22, type_vocab_size=1)),
            "xlm-roberta": ("XLMRoberta", dict(max_position_embeddings=22, type_vocab_size=1)),
        }[family]
        labels = {"num_labels": classes} if classes else {}
        config = getattr(transformers, f"{name}Config")(**_ENCODER, **settings, **labels)
        torch.manual_seed(len(family))
        kind = "ForSequenceClassification" if classes else "Model"
        model = getattr(transformers, name + kind)(config)
        for path, weight in model.named_parameters():
            # Away from the initial values: norms are ones, biases zeros, attention is even.
            if weight.ndim == 1:
                torch.nn.init.normal_(weight, std=0.2)
                weight.data += 1.0 if "LayerNorm.weight" in path else 0.0
            else:
                scale = 1.0 if "embeddings" in path else 1.5 * weight.shape[1] ** -0.5
                torch.nn.init.normal_(weight, std=scale)
        folder = tmp_path_factory.mktemp(f"{family}-{classes}")
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def bases(hf_t5, hf_decoder, hf_encoder, tmp_path_factory):
    """A function: family -> (folder of transformers, BASE of the run, what the run chooses)."""

    @functools.cache
    def make(family: str):
        if family == "bert":
            folder = hf_encoder("bert", 0)
            return folder, folder, {"head": "pooled", "num_outputs": 3}
        folder = (hf_t5 if family == "t5" else hf_decoder)(family)[1]
        if family == "llama":
            return folder, folder, {"scan_layers": True}
        imported = tmp_path_factory.mktemp("imported") / family
        hub.import_hf(str(folder), imported)
        return folder, imported, {}

    return make


def batch_of(kind: str, offset: int) -> dict:
    """Three examples, of the three datasets, for our model."""
    rng = np.random.default_rng(3)

    def padded(*lengths):
        there = np.arange(max(lengths)) < np.array(lengths)[:, None]
        return np.where(there, offset + rng.integers(2, 67, there.shape), 0).astype(np.int32)

    batch = {
        "features": np.stack([SPACE.encode(row) for row in DATASETS.values()])[:, None],
        "tasks": np.array([[SPACE.dataset_id(name)] for name in DATASETS], np.int32),
    }
    if kind == "t5":
        targets = padded(7, 3, 9)
        batch |= {
            "encoder_input_tokens": padded(12, 5, 9),
            "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
            "decoder_target_tokens": targets,
        }
    elif kind == "decoder":
        tokens = padded(12, 5, 9)
        batch |= {"decoder_input_tokens": tokens, "decoder_target_tokens": tokens}
    else:
        batch["encoder_input_tokens"] = padded(12, 5, 9)
    return batch


def ours(model, params, batch) -> np.ndarray:
    """Logits, 0 where a batch has no target."""
    logits = jax.jit(model.logits)(params, {k: jnp.asarray(v) for k, v in batch.items()})
    return _masked(np.asarray(logits), batch)


def theirs(model, batch, offset: int, rows=slice(None), **options) -> np.ndarray:
    batch = {name: value[rows] for name, value in batch.items()}

    def ids(name):
        pad = model.config.pad_token_id or 0
        tokens = batch[name]
        return torch.tensor(np.where(tokens > 0, tokens - offset, pad)).long()

    stream = "encoder" if "encoder_input_tokens" in batch else "decoder"
    there = batch[f"{stream}_input_tokens"] > 0
    given = {"input_ids": ids(f"{stream}_input_tokens")}
    given["attention_mask"] = torch.tensor(there).long()
    if stream == "encoder" and "decoder_input_tokens" in batch:
        given["decoder_input_ids"] = ids("decoder_input_tokens")
        given["decoder_attention_mask"] = torch.tensor(batch["decoder_target_tokens"] > 0).long()
    with torch.no_grad():
        return _masked(model.eval()(**given, **options).logits.numpy(), batch)


def _masked(logits, batch):
    if logits.ndim == 2:
        return logits
    return logits * (batch["decoder_target_tokens"] > 0)[..., None]


def load(folder, kind, **options):
    return getattr(transformers, _AUTO[kind]).from_pretrained(folder, **options)


def largest(a, b) -> float:
    return float(np.abs(a - b).max())


def _kind(model) -> str:
    return next(name for name, known in MODELS.items() if type(model) is known)


def _features(dataset):
    return {**DATASETS[dataset], "dataset": dataset}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["t5", "llama", "gpt2", "bert"])
def test_each_datasets_export_is_its_mixture_alone_and_in_a_mixed_batch(
    bases, tmp_path, family, method
):
    folder, base, changes = bases(family)
    model, params = write_run(tmp_path / "run", base, METHODS[method], **changes)
    kind, offset = _kind(model), model.token_offset
    batch = batch_of(kind, offset)
    expected = ours(model, params, batch)

    plain = load(folder, kind, **({"num_labels": 3} if kind == "encoder" else {}))
    without = theirs(plain, batch, offset)
    tuned = None
    for dataset in DATASETS:
        destination = tmp_path / dataset
        export_peft(tmp_path / "run", destination, _features(dataset))
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*adapter keys")
            warnings.filterwarnings("error", "fan_in_fan_out")
            if tuned is None:
                tuned = peft.PeftModel.from_pretrained(plain, destination, adapter_name=dataset)
            else:
                tuned.load_adapter(destination, adapter_name=dataset)
    alone = []
    for row, dataset in enumerate(DATASETS):
        tuned.set_adapter(dataset)
        alone.append(theirs(tuned, batch, offset, slice(row, row + 1)))
    found = {"alone": np.concatenate(alone)}
    if method != "ia3":  # of which peft mixes no batch
        found["mixed"] = theirs(tuned, batch, offset, adapter_names=list(DATASETS))
    for what, logits in found.items():
        difference = largest(logits, expected)
        print(f"{family} {method} {what}: {difference:.1e} of {np.abs(expected).max():.1f}")
        assert difference < TOLERANCE
    assert largest(without, expected) > 0.1
    if method not in ("lora", "adamix", "ia3"):
        tuned.set_adapter("parse_en")
        assert largest(theirs(tuned, batch, offset), expected) > 0.05  # adapters differ


def test_a_misspelt_key_does_not_pass(bases, tmp_path):
    folder, base, _ = bases("t5")
    model, params = write_run(tmp_path / "run", base, METHODS["flix"])
    batch = batch_of("t5", 0)
    expected = ours(model, params, batch)
    export_peft(tmp_path / "run", tmp_path / "right", _features("parse_en"))

    def difference(rename):
        written = shutil.copytree(tmp_path / "right", tmp_path / "wrong", dirs_exist_ok=True)
        file = written / "adapter_model.safetensors"
        tensors = safetensors.numpy.load_file(file)
        safetensors.numpy.save_file({rename(k): v for k, v in tensors.items()}, file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuned = peft.PeftModel.from_pretrained(load(folder, "t5"), written)
        return largest(theirs(tuned, batch, 0, slice(0, 1)), expected[:1])

    one = "base_model.model.encoder.block.1.layer.0.SelfAttention.q.lora_B.weight"
    assert difference(lambda key: key) < TOLERANCE
    assert difference(lambda key: key.replace("SelfAttention", "Attention")) > 1e-2
    assert difference(lambda key: "q_lora" if key == one else key) > 1e-3
    assert difference(lambda key: key.removeprefix("base_model.model.")) > 1e-2


def _written_by(folder, tmp_path, **changes):
    """A copy of a folder whose config.json says something else."""
    copy = shutil.copytree(folder, tmp_path / "as-written")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **changes}))
    return copy


V4 = dict(transformers_version="4.40.0")
HF_RUNS = {
    "t5": ("t5", {}, "lora"),
    "t5 full": ("t5", {}, "full"),
    "t5_1_1": ("t5_1_1", {}, "flix"),
    "t5_1_1_tied": ("t5_1_1_tied", {}, "lora"),
    "mt5": ("mt5", {}, "ia3"),
    "mt5_tied": ("mt5_tied", {}, "lora"),
    "mt5 of 4, tied and scaled": ("mt5_tied", dict(V4, tie_word_embeddings=True), "lora"),
    "umt5": ("umt5", {}, "lora"),
    "umt5_tied": ("umt5_tied", {}, "full"),
    "umt5 of 4, not scaled": ("umt5", dict(V4, tie_word_embeddings=False), "lora"),
    "gpt2": ("gpt2", {}, "ia3"),
    "gpt2_separate": ("gpt2_separate", {}, "full"),
    "llama_biased": ("llama_biased", {}, "lora"),
    "llama3": ("llama3", {}, "poly_s"),
    "mistral": ("mistral", {}, "lora"),
    "qwen2": ("qwen2", {}, "lora"),
    "qwen3": ("qwen3", {}, "lora"),
    "gemma2": ("gemma2", {}, "lora"),
    "gemma3": ("gemma3", {}, "lora"),
    "bert": ("bert", {}, "ia3"),
    "roberta": ("roberta", {}, "bitfit"),
    "xlm-roberta": ("xlm-roberta", {}, "lora"),
}
GROUPS = {
    "bitfit": (
        Group(r".*/(bias|scale|rel_embedding)"),
        Group(r"classifier/.*"),
        Group(".*", train=False),
    )
}


@pytest.mark.parametrize("case", HF_RUNS)
def test_the_merged_model_is_the_same_in_transformers_and_read_back(
    hf_t5, hf_decoder, hf_encoder, tmp_path, case
):
    variant, said, method = HF_RUNS[case]
    changes = {"scan_layers": True} if method == "poly_s" else {}
    if variant in ("bert", "roberta", "xlm-roberta"):
        # RoBERTa brings a head, of other classes; the others are headless.
        base = hf_encoder(variant, 2 if variant == "roberta" else 0)
        head = "pooled" if variant == "bert" else "dense"
        changes = {"head": head, "num_outputs": 3}
    else:
        base = (hf_t5 if "t5" in variant else hf_decoder)(variant)[1]
    base = _written_by(base, tmp_path, **said) if said else base
    model, params = write_run(
        tmp_path / "run", base, METHODS.get(method, ()), groups=GROUPS.get(method, ()), **changes
    )
    kind, offset = _kind(model), model.token_offset
    batch = batch_of(kind, offset)
    expected = ours(model, params, batch)[:1]  # of the first dataset

    features = _features("parse_en") if method in METHODS else {}
    config = export_hf(tmp_path / "run", tmp_path / "out", features)
    assert (config["vocab_size"], config["dtype"]) == (67, "float32")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = load(tmp_path / "out", kind)
    assert type(loaded).__name__ in config["architectures"]
    logits = theirs(loaded, batch, offset, slice(0, 1))

    fields, again = hub.load_base(tmp_path / "out")
    network = KINDS[kind].network(KINDS[kind].config(**fields))
    one = {name: value[:1] for name, value in batch.items()}
    read = ours(MODELS[kind](network), again, one)

    differences = largest(logits, expected), largest(read, expected)
    print(f"{case}: {differences[0]:.1e}, {differences[1]:.1e} of {np.abs(expected).max():.1f}")
    assert max(differences) < TOLERANCE
    fields, untouched = hub.load_base(base)
    if kind == "encoder":
        fields, untouched = {**fields, **changes}, {**untouched, "classifier": again["classifier"]}
    network = KINDS[kind].network(KINDS[kind].config(**fields))
    assert largest(ours(MODELS[kind](network), untouched, one), expected) > 0.1
