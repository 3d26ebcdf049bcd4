"""The tokenizer in a model's folder: which file it is, its special tokens, and the numbers we give its tokens.

Token 0 is padding in every batch of ours. Where the model pads with its own token 0 (T5, BERT, Gemma) its numbers are
ours; where its token 0 means something (GPT-2's "!", Llama's <unk>, RoBERTa's <s>) our token t > 0 is its token t - 1.
That difference is the `token_offset`, and the network's configuration says the same number.

A base folder of ours says what its tokenizer is in vocabulary.json,

    {"kind": "huggingface", "file": "tokenizer.json", "token_offset": 1, "bos_id": 2, "eos_id": 3, ...}

with all ids in our numbering. In other people's folders it is read off the files. Which token is eos (or bos, unk, sep,
cls), the first of these says that mentions it:

1. tokenizer_config.json: `eos_token`; null means that there is none
2. special_tokens_map.json, likewise
3. config.json: `eos_token_id`; the first, of several
4. generation_config.json, likewise
5. tokenizer.json: where it puts one token before a text and one behind it, they are cls and sep (BERT's other files are
   often silent); a WordPiece model names its unk

A text ends with eos, or with sep where there is no eos (BERT).

`modjax.data.vocabularies` makes a SeqIO vocabulary of this. Nothing here imports tensorflow.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modjax.errors import nearest
from modjax.hub.errors import HubError, listed
from modjax.hub.safetensors_io import read_json

VOCABULARY = "vocabulary.json"
KINDS = ("huggingface", "sentencepiece", "bytes")

_NAMES = ("bos", "eos", "unk", "sep", "cls", "pad")
_IDS = tuple(f"{name}_id" for name in _NAMES[:-1])
_FAST = "tokenizer.json"
_SENTENCE_PIECE = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
_OTHER_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
)
# All of a tokenizer's files, in other people's folders and ours.
FILES = (_FAST, *_SENTENCE_PIECE, *_OTHER_FILES)
_GENERATION = "generation_config.json"
_T5 = ("t5", "mt5", "umt5")
# Whose config.json may leave out that they pad with token 0.
_PAD_WITH_0 = (*_T5, "bert", "gemma", "gemma2", "gemma3", "gemma3_text")
_SENTINELS = {"t5": 100, "umt5": 300}  # mT5's are in its model
_CONVERT = """\
transformers writes a tokenizer.json into the same folder:
    import transformers
    transformers.AutoTokenizer.from_pretrained("FOLDER").save_pretrained("FOLDER")"""


def token_offset(config: Mapping[str, Any]) -> int:
    """0 where a model pads with its token 0, else 1; `config` is a Hugging Face config.json.

    The network's token t > 0 is row `t - token_offset` of the embedding. T5's is always 0.
    """
    if config.get("model_type") in _T5:
        return 0
    said = [part["pad_token_id"] for part in _parts(config) if "pad_token_id" in part]
    if said:
        return 0 if 0 in said else 1
    return 0 if config.get("model_type") in _PAD_WITH_0 else 1


def describe(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What vocabulary.json says of a folder, or would say.

    Args:
      folder: a base of ours, or a Hugging Face folder: tokenizer.json, or a SentencePiece model, or
        the name of ByT5's tokenizer in tokenizer_config.json or config.json.

    Returns:
      `kind`, one of KINDS; `file`, None for bytes; `token_offset`; `bos_id`, `eos_id`, `unk_id` and
      for "huggingface" `sep_id` and `cls_id`, in our numbering, None where there is none;
      `extra_ids`, how many sentinels: the highest ids of a tokenizer.json, what comes on top of a
      SentencePiece model, or of bytes. None if the folder holds none of these.

    Raises:
      HubError: a file that cannot be read; no token that ends a text, or two files that disagree on
        it; a special token that is no token; a model that pads with a token that means something;
        or a SentencePiece model whose numbers are not the network's.
    """
    folder = Path(folder)
    if (folder / VOCABULARY).exists():
        return _own(folder)
    if (folder / _FAST).exists():
        return _describe_fast(folder)
    for name in _SENTENCE_PIECE:
        if (folder / name).exists():
            return _describe_sentence_piece(folder, name)
    settings = _optional(folder, "tokenizer_config.json")
    classes = (settings.get("tokenizer_class"), _config(folder)[0].get("tokenizer_class"))
    if "ByT5Tokenizer" in classes:
        return _described("bytes", None, 0, {"eos": 1, "unk": 2}, settings.get("extra_ids", 125))
    return None


def copy(
    source: str | os.PathLike[str], destination: str | os.PathLike[str]
) -> dict[str, Any] | None:
    """Copies a folder's tokenizer files into a base of ours, and writes its vocabulary.json.

    Tokenizer files that an earlier base left in the destination are removed. vocabulary.json is
    written last, so that it never names a file that is not there.

    Returns:
      `describe(source)`; without one (None) there is no vocabulary.json.

    Raises:
      HubError: as `describe`, before anything is copied.
      OSError: the destination cannot be written.
    """
    source, destination = Path(source), Path(destination)
    if source.resolve() == destination.resolve():
        raise HubError(f"{source} cannot be copied onto itself.")
    description = describe(source)
    destination.mkdir(parents=True, exist_ok=True)
    (destination / VOCABULARY).unlink(missing_ok=True)
    for name in FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, destination / name)
        else:
            (destination / name).unlink(missing_ok=True)
    if description is not None:
        write(description, destination)
    return description


def write(description: Mapping[str, Any], folder: Path) -> None:
    """Writes a folder's vocabulary.json, whole or not at all; `description` is one of `describe`."""
    staged = folder / f".{VOCABULARY}.tmp"
    staged.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    os.replace(staged, folder / VOCABULARY)


def missing(folder: str | os.PathLike[str]) -> str:
    """What to say about a folder without a tokenizer that can be read: what it holds, and what to do."""
    folder = Path(folder)
    if not folder.is_dir():
        return f"{folder} is not a folder; give the one that holds {_FAST} and config.json."
    there = sorted(path.name for path in folder.iterdir())
    text = (
        f"{folder} holds no {_FAST}, no SentencePiece model ({', '.join(_SENTENCE_PIECE)}) and no "
        f"tokenizer_config.json that names ByT5Tokenizer, but: {listed(there, 20) or 'nothing'}."
    )
    if {"vocab.json", "merges.txt", "vocab.txt"} & set(there):
        text += f" From an older kind of tokenizer, {_CONVERT}"
    return text


def load(path: str | os.PathLike[str]) -> Any:
    """The `tokenizers.Tokenizer` of a tokenizer.json, without the truncation and padding that some files ask for."""
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no type of its own for it
        raise HubError(f"{path} cannot be read as a tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _described(
    kind: str, file: str | None, offset: int, tokens: Mapping[str, int | None], extra_ids: int
) -> dict[str, Any]:
    """A description; `tokens` are in the model's numbering, where ours has no place for them, None."""
    ids: dict[str, int | None] = {}
    for name in _IDS if kind == "huggingface" else _IDS[:3]:
        token = tokens.get(name.removesuffix("_id"))
        ids[name] = None if token is None or token + offset == 0 else token + offset
    return {"kind": kind, "file": file, "token_offset": offset, **ids, "extra_ids": extra_ids}


def _own(folder: Path) -> dict[str, Any]:
    path = folder / VOCABULARY
    found = read_json(path)
    kind = found.get("kind")
    if kind not in KINDS:
        raise HubError(f"{path}: unknown kind {kind!r}." + nearest(str(kind), KINDS))
    expected = _described(kind, None, 0, {}, 0)
    for name in found:
        if name not in expected:
            raise HubError(f"{path}: unknown field {name!r}." + nearest(name, expected))
    absent = [name for name in expected if name not in found]
    if absent:
        raise HubError(f"{path} lacks {listed(absent)}.")
    file = found["file"]
    if kind != "bytes" and (
        not isinstance(file, str) or Path(file).name != file or not (folder / file).is_file()
    ):
        raise HubError(f"{path}: 'file' is {file!r}, which is not a file of this folder.")
    for name in ("token_offset", "extra_ids", *(n for n in _IDS if n in expected)):
        value = found[name]
        if not (type(value) is int and value >= 0 or value is None and name in _IDS):
            raise HubError(f"{path}: {name!r} is {value!r}; it must be a whole number from 0 on.")
    return found


def _describe_fast(folder: Path) -> dict[str, Any]:
    tokenizer = load(folder / _FAST)
    config, offset = _config(folder)
    said = {"config.json": config, _GENERATION: _optional(folder, _GENERATION)}
    tokens = _special_tokens(folder, tokenizer, said)
    if offset is None:
        offset = 0 if tokens["pad"] == 0 else 1
    tokens["eos"] = _end(folder, tokenizer, tokens, said)
    added = tokenizer.get_added_tokens_decoder()
    word = not (0 in added and added[0].special)
    if offset == 0 and (word or tokens["eos"] == 0):
        raise HubError(
            f"{folder}: by config.json the model pads with token 0, but in {_FAST} that is "
            f"{tokenizer.id_to_token(0)!r}, which {'is part of' if word else 'ends'} a text. Set pad_token_id to null: "
            "padding then has a number of its own."
        )
    if tokens["unk"] == tokens["eos"]:
        tokens["unk"] = None  # GPT-2's name for a token that it has no use for
    top = max(tokenizer.get_vocab().values())
    sentinels = 0
    while tokenizer.token_to_id(f"<extra_id_{sentinels}>") == top - sentinels:
        sentinels += 1
    return _described("huggingface", _FAST, offset, tokens, sentinels)


def _special_tokens(
    folder: Path, tokenizer: Any, said: Mapping[str, Mapping[str, Any]]
) -> dict[str, int | None]:
    """The special tokens in the model's numbering, by the order at the top of this file."""
    found: dict[str, int | None] = {}
    for name in _NAMES:
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            settings = _optional(folder, file)
            if f"{name}_token" in settings:
                number = _token_id(settings[f"{name}_token"], tokenizer, folder / file)
                found.setdefault(name, number)
        for config in said.values():
            ids = _said_ids(config, f"{name}_token_id")
            if ids and (name == "eos" or tokenizer.id_to_token(ids[0]) is not None):
                found.setdefault(name, ids[0])
    template = tokenizer.encode("").ids
    if len(template) == 2:
        found.setdefault("cls", template[0])
        found.setdefault("sep", template[1])
    unknown = getattr(tokenizer.model, "unk_token", None)
    if unknown is not None:
        found.setdefault("unk", tokenizer.token_to_id(unknown))
    return {name: found.get(name) for name in _NAMES}


def _token_id(token: Any, tokenizer: Any, path: Path) -> int | None:
    if isinstance(token, Mapping):
        token = token.get("content")
    if token is None:
        return None
    number = tokenizer.token_to_id(token)
    if number is None:
        raise HubError(
            f"{path} names the special token {token!r}, which {_FAST} does not have: give the name of a "
            "token that it has, or null."
        )
    return number


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A config.json, and the part on text of one that is about more than text."""
    return [config, config.get("text_config") or {}]


def _said_ids(config: Mapping[str, Any], field: str) -> list[int]:
    """The ids in a field of config.json; none where it is null or not mentioned."""
    for part in _parts(config):
        value = part.get(field)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if ids := [i for i in ids if i >= 0]:  # some write -1 for none
            return ids
    return []


def _end(
    folder: Path,
    tokenizer: Any,
    tokens: Mapping[str, int | None],
    said: Mapping[str, Mapping[str, Any]],
) -> int:
    """The token that ends a text; refuses a folder whose files give none, or contradict each other."""
    eos = tokens["eos"]
    if eos is None:
        if tokens["sep"] is None:
            raise HubError(
                f"{folder} does not say which token ends a text. Set eos_token in tokenizer_config.json to one of "
                f"{_FAST}'s tokens, as {_example(tokenizer)!r}."
            )
        return tokens["sep"]
    if tokenizer.id_to_token(eos) is None:
        raise HubError(f"{folder}: eos_token_id is {eos}, but {_FAST} has no such token.")
    others = {file: _said_ids(config, "eos_token_id") for file, config in said.items()}
    if any(others.values()) and not any(eos in ids for ids in others.values()):
        listing = "; ".join(
            f"{file} says {', '.join(f'{i} ({tokenizer.id_to_token(i)!r})' for i in ids)}"
            for file, ids in others.items()
            if ids
        )
        raise HubError(
            f"{folder}: files disagree on the token that ends a text. The tokenizer's say {eos} "
            f"({tokenizer.id_to_token(eos)!r}); {listing}. Set eos_token in tokenizer_config.json, or eos_token_id in "
            "config.json, so that they agree."
        )
    return eos


def _example(tokenizer: Any) -> str:
    """A special token, for a message; the one that sounds most like an end."""
    special = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
    ends = [t for t in special if "end" in t or "/s" in t or "eos" in t]
    return (ends or special or ["</s>"])[0]


def _describe_sentence_piece(folder: Path, name: str) -> dict[str, Any]:
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / name))
    except (OSError, RuntimeError) as error:
        raise HubError(
            f"{folder / name} cannot be read as a SentencePiece model: {error}"
        ) from error
    config, offset = _config(folder)
    if model.pad_id() != 0 or offset == 1:
        raise HubError(
            f"{folder / name}: the numbers in this file cannot be used as they are: 0 is not the model's padding, and "
            f"the network may number the pieces otherwise. {_CONVERT}"
        )
    ids = {"bos": model.bos_id(), "eos": model.eos_id(), "unk": model.unk_id()}
    tokens = {key: None if token < 0 else token for key, token in ids.items()}
    if tokens["eos"] is None:
        raise HubError(f"{folder / name} has no piece that ends a text (eos_id). {_CONVERT}")
    extra_ids = _extra_ids(_optional(folder, "tokenizer_config.json"), config)
    if any(model.piece_to_id(p) != model.unk_id() for p in ("<extra_id_0>", "▁<extra_id_0>")):
        extra_ids = 0
    return _described("sentencepiece", name, 0, tokens, extra_ids)


def _extra_ids(settings: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    if isinstance(settings.get("extra_ids"), int):
        return settings["extra_ids"]
    return _SENTINELS.get(config.get("model_type", ""), 0)


def _config(folder: Path) -> tuple[Mapping[str, Any], int | None]:
    """Hugging Face's config.json, also from within one of ours, and the network's token offset, if they are known."""
    config = _optional(folder, "config.json")
    if config.get("format") == "modjax":
        fields = config.get("config") or {}
        return config.get("huggingface") or {}, fields.get("token_offset", 0)
    return config, token_offset(config) if config else None


def _optional(folder: Path, name: str) -> dict[str, Any]:
    return read_json(folder / name) if (folder / name).exists() else {}
