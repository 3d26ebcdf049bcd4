"""SeqIO vocabularies of the models there are: Hugging Face's fast tokenizers, SentencePiece, bytes.

    vocabulary = vocabularies.vocabulary_of("weights/gpt2")
    inputs, targets = seqio.Feature(vocabulary, add_eos=False), seqio.Feature(vocabulary)

where the inputs of a decoder-only model do not end; T5's do. In a gin file:
`from modjax.data import vocabularies`, then `@vocabularies.vocabulary_of()`.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from modjax.hub import tokenizers
from modjax.hub.errors import HubError


def vocabulary_of(path: str | os.PathLike[str]) -> seqio.Vocabulary:
    """The vocabulary of a base: of one of ours, or of a Hugging Face folder.

    Args:
      path: a folder. A tokenizer.json becomes a `HuggingFaceVocabulary`, a SentencePiece model a
        `seqio.SentencePieceVocabulary`, ByT5's a `seqio.ByteVocabulary`, in this order; see
        `modjax.hub.tokenizers` for what is read from where.

    Raises:
      HubError: there is no tokenizer (what there is, is listed), or it cannot be used as it is.
    """
    folder = Path(path)
    found = tokenizers.describe(folder)
    if found is None:
        raise HubError(tokenizers.missing(folder))
    kind, file = found.pop("kind"), found.pop("file")
    if kind == "bytes":
        return seqio.ByteVocabulary(extra_ids=found["extra_ids"])
    if kind == "sentencepiece":
        return seqio.SentencePieceVocabulary(str(folder / file), extra_ids=found["extra_ids"])
    return HuggingFaceVocabulary(folder / file, **found)


def save(vocabulary: seqio.Vocabulary, folder: str | os.PathLike[str]) -> None:
    """Puts a vocabulary into the folder of a base of ours, for `vocabulary_of`; nothing if it is of a kind not read."""
    ids: tuple[str, ...] = ("bos_id", "eos_id", "unk_id")
    file: tuple[str, str] | None = None  # where it is, and its name in the folder
    if isinstance(vocabulary, HuggingFaceVocabulary):
        kind, file = "huggingface", (str(vocabulary.file), "tokenizer.json")
        ids += ("sep_id", "cls_id")
    elif isinstance(vocabulary, seqio.SentencePieceVocabulary):
        kind, file = "sentencepiece", (vocabulary.sentencepiece_model_file, "spiece.model")
    elif isinstance(vocabulary, seqio.ByteVocabulary):
        kind = "bytes"
    else:
        return
    if file is not None:
        source, target = file[0], os.path.join(folder, file[1])
        if os.path.realpath(source) != os.path.realpath(target):
            tf.io.gfile.copy(source, target, overwrite=True)
    found = {name: getattr(vocabulary, name) for name in ids}
    description = {
        "kind": kind,
        "file": file[1] if file else None,
        "token_offset": getattr(vocabulary, "token_offset", 0),
        # SentencePiece has -1 for what a model lacks, and 0 is padding.
        **{name: token if token and token > 0 else None for name, token in found.items()},
        "extra_ids": vocabulary.extra_ids,
    }
    tokenizers.write(description, Path(folder))


def check_fits(vocabulary: seqio.Vocabulary, network_config: Any, where: str) -> None:
    """Refuses a vocabulary whose tokens are not the network's.

    Args:
      vocabulary: of a task's inputs or targets.
      network_config: says `vocab_size`, the rows of the embedding, and, where it is not 0,
        `token_offset`. Of one that says no `vocab_size` nothing is known, and nothing refused.
      where: of whom the error speaks, as "task 'mtop_en'".

    Raises:
      ValueError: tokens are numbered otherwise, or there are more of them than rows.
    """
    rows = getattr(network_config, "vocab_size", None)
    if rows is None:
        return
    offset = getattr(vocabulary, "token_offset", 0)
    expected = getattr(network_config, "token_offset", 0)
    remedy = "Use the base's own: modjax.data.vocabularies.vocabulary_of(FOLDER OF THE BASE)."
    if offset != expected:
        raise ValueError(
            f"{where}: token t of the vocabulary stands for row t - {offset} of an embedding "
            f"(token_offset={offset}), token t of the base for row t - {expected} "
            f"(token_offset={expected}). {remedy}"
        )
    if vocabulary.vocab_size - offset > rows:
        raise ValueError(
            f"{where}: the vocabulary has {vocabulary.vocab_size - offset} tokens, the base {rows} "
            f"embeddings. {remedy}"
        )


def of_base(path: str | os.PathLike[str] | None) -> seqio.Vocabulary | None:
    """`vocabulary_of` for `check_same`: None where there is no folder, or no tokenizer in it that can be read."""
    try:
        return None if path is None else vocabulary_of(path)
    except HubError:
        return None


def check_same(vocabulary: seqio.Vocabulary, base: seqio.Vocabulary | None, where: str) -> None:
    """Refuses a vocabulary whose tokens fit the base's embedding and mean something else there.

    Two libraries may read one tokenizer, and differ in a special token or a space; so tokens over the whole range are
    written out alone, and half of them must be the same text.

    Args:
      vocabulary: of a task's inputs or targets. One that is of no kind of `vocabulary_of` is not looked at.
      base: of the base's folder, see `of_base`; None if unknown.
      where: of whom the error speaks, as "task 'mtop_en'".

    Raises:
      ValueError: fewer are; a token of which they differ is shown.
    """
    if not isinstance(vocabulary, _KINDS) or base is None or vocabulary == base:
        return
    size = max(vocabulary.vocab_size, base.vocab_size)
    ids = [int(i) for i in np.unique(np.linspace(1, size - 1, 512).astype(int))]
    texts = [(i, vocabulary.decode([i]).strip(), base.decode([i]).strip()) for i in ids]
    different = [pair for pair in texts if pair[1] != pair[2]]
    if 2 * len(different) > len(texts):
        token, ours, theirs = different[len(different) // 2]
        raise ValueError(
            f"{where} is in another vocabulary than its base: token {token} is {ours!r} there and {theirs!r} in the "
            f"base's tokenizer, and so are {len(different)} of {len(texts)} tokens. Use the base's own: "
            "modjax.data.vocabularies.vocabulary_of(FOLDER OF THE BASE)."
        )


class HuggingFaceVocabulary(seqio.Vocabulary):
    """A tokenizer.json as a SeqIO vocabulary.

    Texts become plain tokens: no begin or end mark, no template (SeqIO's preprocessors append eos).
    A special token that is spelt out in a text is that token, as it is with Hugging Face; but for
    padding, which becomes unk, or nothing where there is no unk: 0 never comes out of a text.

    Decoding ends at eos and leaves out padding, bos, eos, sep and cls. Other special tokens (unk,
    sentinels, marks of a chat) appear as they are written; ids beyond the last one become unk.

    Objects are equal if file contents and settings are. Copies and pickles hold the path alone.

    Attributes:
      file: path of the tokenizer.json.
      token_offset: token t > 0 is Hugging Face's token t - token_offset.
      bos_id, eos_id, unk_id, sep_id, cls_id: in our numbering, or None.
      extra_ids: how many of the highest ids are sentinels; `vocab_size - 1` is <extra_id_0>.
      vocab_size: the largest id, and 1: `vocab_size - token_offset` rows of an embedding.

    Raises:
      ValueError: an offset other than 0 or 1, or an id that is 0 or less.
      HubError: the file does not exist, or (when first used) cannot be read.
    """

    def __init__(
        self,
        file: str | os.PathLike[str],
        *,
        token_offset: int = 0,
        bos_id: int | None = None,
        eos_id: int | None = None,
        unk_id: int | None = None,
        sep_id: int | None = None,
        cls_id: int | None = None,
        extra_ids: int = 0,
    ):
        super().__init__(extra_ids=extra_ids)
        self.file = os.path.abspath(file)
        if not os.path.isfile(self.file):
            raise HubError(f"{self.file} is not a file; give the path of a tokenizer.json.")
        if token_offset not in (0, 1):
            raise ValueError(f"{self.file}: token_offset must be 0 or 1, got {token_offset}.")
        self.token_offset = token_offset
        self._ids = {"bos": bos_id, "eos": eos_id, "unk": unk_id, "sep": sep_id, "cls": cls_id}
        for name, value in self._ids.items():
            if value is not None and value < 1:
                raise ValueError(f"{self.file}: {name}_id must be above 0, got {value}.")
        self._content: _Content | None = None

    @property
    def bos_id(self) -> int | None:
        return self._ids["bos"]

    @property
    def eos_id(self) -> int | None:
        return self._ids["eos"]

    @property
    def unk_id(self) -> int | None:
        return self._ids["unk"]

    @property
    def sep_id(self) -> int | None:
        return self._ids["sep"]

    @property
    def cls_id(self) -> int | None:
        return self._ids["cls"]

    @property
    def vocab_size(self) -> int:
        return self._base_vocab_size

    @property
    def _base_vocab_size(self) -> int:
        return self._read().tokens + self.token_offset

    @property
    def tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer`. It is shared: leave its settings as they are."""
        return self._read().tokenizer

    def encode_pair(
        self, first: str, second: str | None = None, max_length: int | None = None
    ) -> tuple[list[int], list[int]]:
        """One text or two in the tokenizer's own template, as encoders want them.

        BERT's gives `[CLS] first [SEP] second [SEP]`, RoBERTa's `<s> first </s></s> second </s>`.

        Args:
          first, second: the texts.
          max_length: of the result, special tokens included; the longer text is cut first.

        Returns:
          `(tokens, token types)`, equally long. Types are 0 and 1: they cannot tell padding.

        Raises:
          ValueError: the tokenizer has no such template, or max_length is too short for it.
        """
        tokenizer = self.tokenizer
        marks = tokenizer.num_special_tokens_to_add(second is not None)
        if marks == 0:
            raise ValueError(f"{self.file} has no template with special tokens; use `encode`.")
        parts = [
            tokenizer.encode(text, add_special_tokens=False)
            for text in (first, second)
            if text is not None
        ]
        if max_length is not None:
            if max_length < marks:
                raise ValueError(
                    f"max_length={max_length} leaves no room for the template's {marks} tokens."
                )
            _cut(parts, max_length - marks)
        whole = tokenizer.post_process(*parts)
        pairs = zip(self._ours(whole.ids), whole.type_ids, strict=True)
        kept = [(token, kind) for token, kind in pairs if token]
        return [token for token, _ in kept], [kind for _, kind in kept]

    def encode_pair_tf(
        self, first: tf.Tensor, second: tf.Tensor | None = None, max_length: int | None = None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """`encode_pair` of scalar strings, int32 `[L]` each."""

        def encode(first: bytes, second: bytes | None = None) -> tuple[np.ndarray, ...]:
            other = None if second is None else second.decode()
            found = self.encode_pair(first.decode(), other, max_length)
            return tuple(np.array(x, np.int32) for x in found)

        texts = [first] if second is None else [first, second]
        tokens, types = tf.numpy_function(encode, texts, [tf.int32, tf.int32], stateful=False)
        tokens.set_shape([None])
        types.set_shape([None])
        return tokens, types

    def _encode(self, s: str | bytes) -> list[int]:
        text = s.decode() if isinstance(s, bytes) else s
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return [token for token in self._ours(ids) if token]

    def _ours(self, ids: Iterable[int]) -> list[int | None]:
        """In our numbering; padding, which a text can only spell out, as unk, or None."""
        offset, unk = self.token_offset, self.unk_id
        return [i + offset or unk for i in ids]

    def _decode(self, ids: Iterable[int]) -> str:
        silent = {self.bos_id, self.eos_id, self.sep_id, self.cls_id}
        size = self._base_vocab_size
        theirs = [int(i) - self.token_offset for i in ids if i not in silent and 0 < i < size]
        return self.tokenizer.decode(theirs, skip_special_tokens=False)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        def encode(text: bytes) -> np.ndarray:
            return np.array(self._encode(text), np.int32)

        # Not stateful: the position of a dataset with a stateful step cannot be saved.
        ids = tf.numpy_function(encode, [s], tf.int32, stateful=False)
        ids.set_shape([None])
        return ids

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        def decode(ids: np.ndarray) -> np.ndarray:
            texts = np.empty(ids.shape[:-1], object)
            for place in np.ndindex(texts.shape):
                texts[place] = self._decode(ids[place].tolist()).encode()
            return texts

        texts = tf.numpy_function(decode, [ids], tf.string, stateful=False)
        texts.set_shape(ids.shape[:-1])
        return texts

    def _read(self) -> "_Content":
        if self._content is None:
            stat = os.stat(self.file)
            self._content = _read_content(self.file, (stat.st_mtime_ns, stat.st_size))
        return self._content

    def _settings(self) -> tuple[Any, ...]:
        return (self.token_offset, self.extra_ids, *self._ids.values())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HuggingFaceVocabulary):
            return False
        return self._settings() == other._settings() and self._read().digest == other._read().digest

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_content": None}

    def __str__(self) -> str:
        ids = ", ".join(f"{name}_id={value}" for name, value in self._ids.items())
        return (
            f"HuggingFaceVocabulary(file={self.file}, token_offset={self.token_offset}, {ids}, "
            f"extra_ids={self.extra_ids}, sha256={self._read().digest[:12]})"
        )


_KINDS = (HuggingFaceVocabulary, seqio.SentencePieceVocabulary, seqio.ByteVocabulary)


@dataclasses.dataclass(frozen=True)
class _Content:
    """What lies in a tokenizer.json."""

    tokenizer: Any
    tokens: int
    digest: str


@functools.lru_cache(maxsize=4)
def _read_content(file: str, stamp: tuple[int, int]) -> _Content:
    """Shared by equal objects; `stamp` tells a file that was written anew."""
    del stamp
    tokenizer = tokenizers.load(file)
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return _Content(tokenizer, max(tokenizer.get_vocab().values()) + 1, digest)


def _cut(parts: Sequence[Any], length: int) -> None:
    """Cuts encodings to `length` tokens together, the longer one first."""
    lengths = [len(part.ids) for part in parts]
    if sum(lengths) <= length:
        return
    if len(parts) == 1:
        parts[0].truncate(length)
        return
    shorter, longer = sorted(range(2), key=lengths.__getitem__)
    kept = min(lengths[shorter], length // 2)
    parts[shorter].truncate(kept)
    parts[longer].truncate(length - kept)
