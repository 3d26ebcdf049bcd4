"""Babel's texts as whole words: a vocabulary of one world's words, labels and prompts.

Bytes make an example five times as long. With words a base is pretrained in minutes and an adapter trained in a
minute on one core, at the price that the sound of a word says nothing: words of two languages are the same token where
they are spelt alike, and otherwise as different as any. What languages have in common is then what the base learnt of
it.
"""

import os
from collections.abc import Iterator

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from modjax.data.vocabularies import HuggingFaceVocabulary
from tasks import babel_world as world
from tasks.babel_examples import TAGS, Babel

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
SPACE = "\u2581"  # stands before a piece that begins a word
ROLES = ("WHO", "OBJ", "IN", "TO", "FROM", "WHEN", "DO")


def pieces(babel: Babel) -> list[str]:
    """All tokens of a world's texts but the three special ones, sorted: words, labels, tags, prompts."""
    words = {word for language in babel.languages.values() for word in language.words.values()}
    words |= {f"{task}:" for task in (*world.TASKS, "fill")} | {"=", "_", ".", "?", "]"}
    words |= {f">{code}" for code in babel.languages}
    words |= {f"[IN:{name.upper()}" for name in world.ACTIONS + world.ATTITUDES}
    words |= {f"[SL:{role}" for role in ROLES}
    tags = {f"|{tag}" for tag in ("O", *TAGS.values())}
    return sorted(SPACE + word for word in words) + sorted(tags)


def write_tokenizer(babel: Babel, path: str | os.PathLike[str]) -> None:
    """Writes a tokenizer.json of a world: token 0 pads, 1 ends a text, 2 is unknown, then its `pieces`."""
    vocabulary = {piece: i for i, piece in enumerate((PAD, EOS, UNK, *pieces(babel)))}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(SPACE, prepend_scheme="always"),
            pre_tokenizers.Split(tokenizers.Regex(r"\|[A-Z]+"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(SPACE, prepend_scheme="always")
    tokenizer.add_special_tokens([PAD, EOS, UNK])
    tokenizer.save(os.fspath(path))


def vocabulary(path: str | os.PathLike[str]) -> HuggingFaceVocabulary:
    """The vocabulary of a file of `write_tokenizer`."""
    return HuggingFaceVocabulary(path, eos_id=1, unk_id=2)


def copy_examples(babel: Babel, split: str) -> Iterator[dict[str, str]]:
    """Random pieces to be copied, labels and tags among them, so that the base has read and written each of them.

    Args:
      babel: the world.
      split: train (as many as one language has to translate), validation or test.
    """
    draw = world.Draw(babel.config.seed, "copy words", split)
    known = pieces(babel)
    number = babel.config.pretrain_examples if split == "train" else babel.config.eval_examples
    for _ in range(number):
        first, *rest = (draw.pick(known) for _ in range(3 + draw.below(10)))
        # A tag has a word before it.
        text = (first.replace("|", SPACE) + "".join(rest)).removeprefix(SPACE).replace(SPACE, " ")
        yield {"inputs": f"= {text}", "targets": text, "source": "copy"}
