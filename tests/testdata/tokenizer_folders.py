"""Text in twelve scripts, and folders as a model's publisher lays them out, with tokenizers trained on that text."""

import functools
import io
import json
from pathlib import Path

# With what tokenizers trip over: digits, punctuation, capitals, marks above and below, joined and paired characters.
TEXTS = {
    "latin": "Žluťoučký kůň úpěl ďábelské ódy; ça coûte 12,50 € à Łódź – não é?",
    "cyrillic": "Съешь ещё этих мягких булок, да выпей же чаю. Їжак любить ґанок!",
    "greek": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία· τι ώρα είναι; Σ' αγαπώ, Οδυσσέα.",
    "arabic": "ذَهَبَ الطَّالِبُ إلى المدرسةِ في الساعة ٨:٣٠ صباحًا، أليس كذلك؟",
    "hebrew": 'בְּרֵאשִׁית בָּרָא אֱלֹהִים; הילד קנה 3 תפוחים בשוק "הכרמל".',
    "devanagari": "क्या आप हिन्दी में श्रृंखला के १२ पृष्ठ पढ़ सकते हैं? ज़रूर।",
    "thai": "วันนี้อากาศดีมาก เราไปเที่ยวน้ำตกที่เชียงใหม่กันไหม ๒๕๖๗",
    "han": "今天天气很好,我们去龍門石窟看看吧。𠮷野家在哪里?",
    "hangul": "내일 아침 7시에 깨워 주세요. 값을 깎아 줄 수 있나요?",
    "kana": "コーヒーを二杯ください。パーティーは「ぎゅうにゅう」抜きで!",
    "ethiopic": "ሰላም ልጆች፤ ዛሬ ትምህርት ቤት እንሄዳለን። ዋጋው ፲፪ ብር ነው?",
    "emoji": "Party 🎉 with 👩‍👩‍👧‍👦 and 👍🏽 in 🇪🇹 ❤️!",
}
# Three times, so that there is something to merge.
_CORPUS = [text for text in TEXTS.values() for _ in range(3)]


def make(kind: str, folder: Path) -> Path:
    """Writes the folder of a kind: the name of a function below."""
    return globals()[kind](folder)


def byte_level(folder: Path) -> Path:
    """GPT-2's kind: byte-level BPE whose token 0 is "!", without padding; ids in config.json alone."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    end = tokenizer.get_vocab_size() - 1
    assert tokenizer.token_to_id("!") == 0
    return _save(
        folder, tokenizer, {"model_type": "gpt2", "bos_token_id": end, "eos_token_id": end}
    )


def roberta(folder: Path) -> Path:
    """Byte-level BPE with RoBERTa's special tokens and template; <s> is token 0, <pad> token 1."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    config = {"model_type": "roberta", "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    return _save(folder, tokenizer, config)


def llama(folder: Path) -> Path:
    """Llama 2's kind: BPE over "▁" with bytes for what it has not seen; <unk> is token 0, <s> begins a text."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, processors, trainers

    special = ["<unk>", "<s>", "</s>"]
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    # Only some of the scripts: the others are spelt in bytes.
    trainer = trainers.BpeTrainer(vocab_size=200, show_progress=False)
    tokenizer.train_from_iterator([TEXTS[s] for s in ("latin", "cyrillic", "han")] * 3, trainer)
    learnt = json.loads(tokenizer.to_str())["model"]
    pieces = [*special, *(f"<0x{b:02X}>" for b in range(256))]
    pieces += sorted(learnt["vocab"], key=learnt["vocab"].get)
    tokenizer.model = models.BPE(
        {piece: i for i, piece in enumerate(pieces)},
        [tuple(pair) for pair in learnt["merges"]],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    said = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
    config = {"model_type": "llama", "bos_token_id": 1, "eos_token_id": [2]}
    return _save(folder, tokenizer, config, {"tokenizer_config.json": said})


def unigram(folder: Path) -> Path:
    """T5's kind: unigram pieces over "▁", padding 0, and three sentinels at the end, the first one last."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=600,
        show_progress=False,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_special_tokens([f"<extra_id_{i}>" for i in (2, 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    said = {
        "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True},
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "extra_ids": 3,
    }
    config = {"model_type": "t5", "pad_token_id": 0, "eos_token_id": 1}
    return _save(folder, tokenizer, config, {"tokenizer_config.json": said})


def word_piece(folder: Path) -> Path:
    """BERT's kind, lower-casing: [PAD] is token 0, and no file says which tokens end a text; the template does."""
    import tokenizers
    from tokenizers import (
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=900, show_progress=False, special_tokens=special)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    # As sentence encoders publish them: every text cut to 16 tokens and padded to 16.
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=16, pad_id=0, pad_token="[PAD]")
    return _save(folder, tokenizer, {"model_type": "bert", "pad_token_id": 0})


def sentence_piece(folder: Path) -> Path:
    """T5's older kind: spiece.model with padding 0, end 1, unknown 2; 100 sentinels come on top."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(_sentence_piece())
    return _write(folder, {"config.json": {"model_type": "t5", "pad_token_id": 0}})


def byt5(folder: Path) -> Path:
    """No tokenizer file at all, only its name."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "t5", "pad_token_id": 0, "eos_token_id": 1}
    return _write(
        folder,
        {"config.json": config, "tokenizer_config.json": {"tokenizer_class": "ByT5Tokenizer"}},
    )


@functools.cache
def _sentence_piece() -> bytes:
    """A model trained on the texts, as its file's bytes."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_CORPUS),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        character_coverage=1.0,
        normalization_rule_name="identity",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def _save(folder: Path, tokenizer: object, config: dict, files: dict | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return _write(folder, {"config.json": config, **(files or {})})


def _write(folder: Path, files: dict) -> Path:
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return folder
