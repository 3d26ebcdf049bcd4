"""Which tokenizer a folder holds: its files, in a stated order, and nothing guessed where they disagree."""

import json
import subprocess
import sys

import pytest
import tokenizers as library

from modjax.hub import HubError, tokenizers
from tests.testdata import tokenizer_folders

KINDS = ("byte_level", "roberta", "llama", "unigram", "word_piece", "sentence_piece", "byt5")


@pytest.fixture
def folder(tmp_path):
    return lambda kind: tokenizer_folders.make(kind, tmp_path / kind)


def write(folder, name, **changes):
    """Changes fields of a JSON file of the folder; ... removes one."""
    path = folder / name
    found = json.loads(path.read_text()) if path.exists() else {}
    found |= changes
    path.write_text(json.dumps({k: v for k, v in found.items() if v is not ...}))


def ids(folder):
    found = tokenizers.describe(folder)
    return {name[:-3]: i for name, i in found.items() if name.endswith("_id") and i is not None}


@pytest.mark.parametrize(
    ("config", "offset"),
    [
        ({"model_type": "gpt2", "pad_token_id": None}, 1),
        ({"model_type": "gpt2"}, 1),
        ({"model_type": "llama"}, 1),
        ({"model_type": "llama", "pad_token_id": -1}, 1),
        ({"model_type": "qwen2", "pad_token_id": 151643}, 1),
        ({"model_type": "llama", "pad_token_id": 0}, 0),
        ({"model_type": "gemma2"}, 0),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, 0),
        ({"model_type": "gemma3", "text_config": {"pad_token_id": 3}}, 1),
        ({"model_type": "bert", "pad_token_id": 0}, 0),
        ({"model_type": "roberta", "pad_token_id": 1}, 1),
        ({"model_type": "mt5", "pad_token_id": None}, 0),
    ],
)
def test_the_offset_is_0_where_the_model_pads_with_its_token_0(config, offset):
    assert tokenizers.token_offset(config) == offset


def test_every_kind_of_folder_is_described(folder):
    end = 401
    assert tokenizers.describe(folder("byte_level")) == {
        "kind": "huggingface",
        "file": "tokenizer.json",
        "token_offset": 1,
        "bos_id": end,
        "eos_id": end,
        "unk_id": None,
        "sep_id": None,
        "cls_id": None,
        "extra_ids": 0,
    }
    assert ids(folder("roberta")) == {"bos": 1, "eos": 3, "sep": 3, "cls": 1}
    assert ids(folder("llama")) == {"bos": 2, "eos": 3, "unk": 1}
    assert ids(folder("unigram")) == {"eos": 1, "unk": 2}
    assert tokenizers.describe(folder("unigram"))["extra_ids"] == 3
    assert ids(folder("word_piece")) == {"eos": 3, "unk": 1, "sep": 3, "cls": 2}
    assert tokenizers.describe(folder("sentence_piece")) == {
        "kind": "sentencepiece",
        "file": "spiece.model",
        "token_offset": 0,
        "bos_id": None,
        "eos_id": 1,
        "unk_id": 2,
        "extra_ids": 100,
    }
    assert tokenizers.describe(folder("byt5")) == {
        "kind": "bytes",
        "file": None,
        "token_offset": 0,
        "bos_id": None,
        "eos_id": 1,
        "unk_id": 2,
        "extra_ids": 125,
    }


def test_a_folder_without_a_tokenizer_has_no_description(folder, tmp_path):
    at = folder("llama")
    (at / "tokenizer.json").unlink()
    assert tokenizers.describe(at) is None
    assert tokenizers.copy(at, tmp_path / "base") is None
    assert not (tmp_path / "base" / "vocabulary.json").exists()


# Which file decides.


def test_the_tokenizers_own_files_come_before_the_models(folder):
    at = folder("roberta")  # </s> by config.json alone
    assert ids(at)["eos"] == 3
    write(at, "config.json", eos_token_id=[4, 2])
    assert ids(at)["eos"] == 5
    write(at, "generation_config.json", eos_token_id=[3, 2])
    write(at, "special_tokens_map.json", eos_token={"content": "</s>", "lstrip": False})
    assert ids(at)["eos"] == 3
    write(at, "tokenizer_config.json", eos_token="<mask>")
    assert ids(at)["eos"] == 5
    write(at, "tokenizer_config.json", bos_token=None, unk_token="<unk>", sep_token="<unk>")
    assert ids(at) == {"eos": 5, "sep": 4, "unk": 4, "cls": 1}


def test_generation_config_and_text_config_are_asked_too(folder):
    at = folder("byte_level")
    write(at, "config.json", eos_token_id=None, bos_token_id=...)
    write(at, "generation_config.json", eos_token_id=[400, 7])
    assert ids(at) == {"eos": 401}
    write(at, "config.json", text_config={"eos_token_id": 5, "bos_token_id": 6})
    assert ids(at) == {"eos": 6, "bos": 7}


def test_without_config_json_the_tokenizers_padding_gives_the_offset(folder):
    for kind, offset in (("unigram", 0), ("llama", 1)):
        at = folder(kind)
        (at / "config.json").unlink()
        assert tokenizers.describe(at)["token_offset"] == offset


def test_a_base_of_ours_without_vocabulary_json_says_its_offset_in_its_config(folder):
    at = folder("llama")
    hugging_face = json.loads((at / "config.json").read_text())
    before = tokenizers.describe(at)
    for extra in ({}, {"huggingface": hugging_face}):
        config = {"format": "modjax", "config": {"token_offset": 1}, **extra}
        (at / "config.json").write_text(json.dumps(config))
        assert tokenizers.describe(at) == before
    (at / "config.json").write_text(json.dumps({"format": "modjax", "config": {}}))
    assert tokenizers.describe(at)["token_offset"] == 0


def test_sentinels_of_sentence_piece_are_counted_once(folder):
    at = folder("sentence_piece")
    write(at, "config.json", model_type="mt5")
    assert tokenizers.describe(at)["extra_ids"] == 0
    write(at, "config.json", model_type="umt5")
    assert tokenizers.describe(at)["extra_ids"] == 300
    write(at, "tokenizer_config.json", extra_ids=7)
    assert tokenizers.describe(at)["extra_ids"] == 7
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString((at / "spiece.model").read_bytes())
    model.pieces.add(piece="▁<extra_id_0>", score=0.0, type=4)
    (at / "spiece.model").write_bytes(model.SerializeToString())
    assert tokenizers.describe(at)["extra_ids"] == 0


# What is refused.


def test_no_end_of_text_is_an_error_that_names_a_token_for_it(folder):
    at = folder("byte_level")
    (at / "config.json").unlink()
    message = r"does not say which token ends a text. Set eos_token .* as '<\|endoftext\|>'"
    with pytest.raises(HubError, match=message):
        tokenizers.describe(at)
    write(at, "tokenizer_config.json", eos_token="<|endoftext|>")
    assert ids(at) == {"eos": 401}


def test_files_that_disagree_on_the_end_are_an_error_that_says_both(folder):
    at = folder("llama")
    write(at, "config.json", eos_token_id=1)
    message = r"tokenizer's say 2 \('</s>'\); config.json says 1 \('<s>'\). Set eos_token"
    with pytest.raises(HubError, match=message):
        tokenizers.describe(at)
    write(at, "generation_config.json", eos_token_id=[1, 2])
    assert ids(at)["eos"] == 3


def test_special_tokens_that_are_no_tokens_are_an_error(folder):
    at = folder("byte_level")
    write(at, "config.json", eos_token_id=50256)
    with pytest.raises(HubError, match="eos_token_id is 50256, but tokenizer.json has no such"):
        tokenizers.describe(at)
    write(at, "config.json", eos_token_id=400, bos_token_id=50256)
    assert ids(at) == {"eos": 401}
    write(at, "tokenizer_config.json", cls_token="[CLS]")
    with pytest.raises(HubError, match=r"tokenizer_config.json names the special token '\[CLS\]'"):
        tokenizers.describe(at)


def test_padding_with_a_token_that_means_something_is_an_error(folder):
    at = folder("byte_level")
    write(at, "config.json", pad_token_id=0)
    with pytest.raises(
        HubError, match="pads with token 0, .* that is '!', which is part of a text"
    ):
        tokenizers.describe(at)
    at = folder("roberta")
    write(at, "config.json", pad_token_id=0, eos_token_id=0)
    with pytest.raises(
        HubError, match="that is '<s>', which ends a text. Set pad_token_id to null"
    ):
        tokenizers.describe(at)
    at = folder("llama")  # as the first Llamas said; <unk> is never part of a text
    write(at, "config.json", pad_token_id=0)
    assert ids(at) == {"bos": 1, "eos": 2}


def test_a_sentence_piece_model_whose_numbers_are_not_the_networks_is_an_error(folder):
    at = folder("sentence_piece")
    write(at, "config.json", model_type="xlm-roberta", pad_token_id=1)
    with pytest.raises(HubError, match="(?s)cannot be used as they are.*AutoTokenizer"):
        tokenizers.describe(at)
    (at / "spiece.model").write_bytes(b"not a model")
    with pytest.raises(HubError, match="spiece.model cannot be read as a SentencePiece model"):
        tokenizers.describe(at)


def test_a_damaged_file_is_named(folder):
    at = folder("llama")
    (at / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(HubError, match="tokenizer.json cannot be read as a tokenizer"):
        tokenizers.describe(at)


# Copies.


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_says_of_itself_what_its_source_said(folder, tmp_path, kind):
    source, base, again = folder(kind), tmp_path / "base", tmp_path / "again"
    expected = tokenizers.describe(source)
    assert tokenizers.copy(source, base) == expected == tokenizers.describe(base)
    assert json.loads((base / "vocabulary.json").read_text()) == expected
    for path in source.iterdir():
        if path.name != "config.json":
            assert (base / path.name).read_bytes() == path.read_bytes()
    assert tokenizers.copy(base, again) == expected
    assert not list(base.glob(".*"))


def test_a_copy_leaves_nothing_of_an_earlier_tokenizer(folder, tmp_path):
    base = tmp_path / "base"
    tokenizers.copy(folder("llama"), base)
    (base / "model.safetensors").write_text("weights")
    tokenizers.copy(folder("sentence_piece"), base)
    there = {path.name for path in base.iterdir()}
    assert there == {"vocabulary.json", "spiece.model", "model.safetensors"}
    with pytest.raises(HubError, match="cannot be copied onto itself"):
        tokenizers.copy(base, base)
    assert tokenizers.describe(base)["kind"] == "sentencepiece"


def test_a_source_that_is_refused_leaves_the_copy_as_it_was(folder, tmp_path):
    base, bad = tmp_path / "base", folder("byte_level")
    tokenizers.copy(folder("llama"), base)
    (bad / "config.json").unlink()
    with pytest.raises(HubError, match="which token ends a text"):
        tokenizers.copy(bad, base)
    assert ids(base) == {"bos": 2, "eos": 3, "unk": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "word2vec"}, "unknown kind 'word2vec'. Known: huggingface, sentencepiece, bytes"),
        ({"eos": 3}, "unknown field 'eos'. Did you mean 'eos_id'"),
        ({"eos_id": ...}, "vocabulary.json lacks eos_id"),
        ({"eos_id": "</s>"}, "'eos_id' is '</s>'; it must be a whole number"),
        ({"token_offset": None}, "'token_offset' is None; it must be"),
        ({"file": "other.json"}, "'file' is 'other.json', which is not a file of this folder"),
        ({"file": "../llama/tokenizer.json"}, "which is not a file of this folder"),
    ],
)
def test_a_vocabulary_json_that_is_wrong_says_where(folder, tmp_path, change, message):
    base = tmp_path / "base"
    tokenizers.copy(folder("llama"), base)
    write(base, "vocabulary.json", **change)
    with pytest.raises(HubError, match=message):
        tokenizers.describe(base)


def test_describing_needs_neither_tensorflow_nor_seqio(folder):
    folders = [str(folder(kind)) for kind in ("llama", "sentence_piece")]
    code = (
        "import sys\n"
        "for name in ('tensorflow', 'seqio', 'gin', 'torch', 'transformers'):\n"
        "    sys.modules[name] = None\n"
        "from modjax.hub import tokenizers\n"
        "assert 'tokenizers' not in sys.modules and 'sentencepiece' not in sys.modules\n"
        f"print([tokenizers.describe(f)['kind'] for f in {folders!r}])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "['huggingface', 'sentencepiece']", done.stderr


def test_truncation_and_padding_that_a_file_asks_for_are_left_out(folder):
    path = folder("word_piece") / "tokenizer.json"
    asked = library.Tokenizer.from_file(str(path))
    assert len(asked.encode("a " * 40).ids) == len(asked.encode("a").ids) == 16
    tokenizer = tokenizers.load(path)
    assert len(tokenizer.encode("a " * 40).ids) == 42 and len(tokenizer.encode("a").ids) == 3
