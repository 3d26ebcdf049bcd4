"""Tiny random T5s of transformers, saved to a folder: what the parity tests compare with."""

import functools

import pytest

_SIZES = dict(
    vocab_size=67,
    d_model=24,
    d_kv=5,
    d_ff=40,
    num_layers=3,
    num_decoder_layers=2,
    num_heads=4,
    decoder_start_token_id=0,
)
# name -> (class, configuration, whether the output layer is made to differ from the embedding)
VARIANTS = {
    "t5": ("T5", dict(feed_forward_proj="relu"), False),
    "t5_1_1": ("T5", dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False), True),
    "t5_1_1_tied": ("T5", dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False), False),
    "mt5": ("MT5", dict(), True),
    "mt5_tied": ("MT5", dict(), False),
    "byt5": (
        "T5",
        dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False, num_layers=4),
        True,
    ),
    "umt5": ("UMT5", dict(), True),
    "umt5_tied": ("UMT5", dict(), False),
}


@pytest.fixture(scope="session")
def hf_t5(tmp_path_factory):
    """A function: variant -> (transformers model in evaluation mode, the folder it was saved to).

    `gain` is the scale of the layers' weights: a large one makes decodes depend on the input.
    """
    import torch
    import transformers

    @functools.cache
    def make(variant: str, gain: float = 0.7):
        kind, settings, own_head = VARIANTS[variant]
        torch.manual_seed(sum(map(ord, variant)))
        config = getattr(transformers, f"{kind}Config")(**{**_SIZES, **settings})
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
        torch.nn.init.normal_(model.shared.weight, std=0.5)
        if own_head:
            head = 0.5 * torch.randn_like(model.shared.weight)
            head[1] *= 2.0  # the end token, so that decodes end
            model.lm_head.weight = torch.nn.Parameter(head)
            model.all_tied_weights_keys.pop("lm_head.weight", None)
        for name, weight in model.named_parameters():
            # Away from the initial values: norms are ones, logits hardly vary.
            if "layer_norm" in name:
                torch.nn.init.uniform_(weight, 0.5, 1.5)
            elif "relative_attention_bias" in name:
                torch.nn.init.normal_(weight, std=1.0)
            elif "lm_head" not in name and "shared" not in name:
                torch.nn.init.normal_(weight, std=gain * weight.shape[1] ** -0.5)
        folder = tmp_path_factory.mktemp(variant)
        model.eval().save_pretrained(folder)
        return model, folder

    return make
