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


_YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, rope_theta=1e3)
_LLAMA = dict(
    vocab_size=67,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    eos_token_id=1,
    bos_token_id=2,
    max_position_embeddings=64,
)
# name -> (class, configuration). Windows and original contexts are shorter than what the tests feed.
DECODERS = {
    "gpt2": (
        "GPT2LMHead",
        dict(
            vocab_size=67,
            n_embd=24,
            n_head=4,
            n_layer=3,
            n_positions=64,
            bos_token_id=2,
            eos_token_id=1,
        ),
    ),
    "gpt2_separate": (
        "GPT2LMHead",
        dict(
            vocab_size=67,
            n_embd=24,
            n_head=3,
            n_layer=2,
            n_positions=64,
            n_inner=28,
            activation_function="gelu",
            scale_attn_weights=False,
            tie_word_embeddings=False,
            bos_token_id=2,
            eos_token_id=1,
        ),
    ),
    "llama": ("Llama", dict(_LLAMA, head_dim=10, rms_norm_eps=1e-5)),
    "llama_biased": ("Llama", dict(_LLAMA, attention_bias=True, mlp_bias=True)),
    "llama_linear": (
        "Llama",
        dict(_LLAMA, rope_parameters=dict(rope_type="linear", factor=3.0, rope_theta=500.0)),
    ),
    "llama3": (
        "Llama",
        dict(
            _LLAMA,
            tie_word_embeddings=True,
            head_dim=16,
            rope_parameters=dict(
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
                rope_theta=500.0,
            ),
        ),
    ),
    "llama_yarn": ("Llama", dict(_LLAMA, head_dim=16, rope_parameters=_YARN)),
    "llama_yarn_bounds": (
        "Llama",
        dict(
            _LLAMA,
            head_dim=16,
            rope_parameters=dict(
                _YARN, beta_fast=3.0, beta_slow=0.3, truncate=False, mscale=0.8, mscale_all_dim=0.4
            ),
        ),
    ),
    "mistral": ("Mistral", dict(_LLAMA, sliding_window=7)),
    "qwen2": (
        "Qwen2",
        dict(_LLAMA, use_sliding_window=True, sliding_window=7, max_window_layers=1),
    ),
    "qwen2_unbounded": ("Qwen2", dict(_LLAMA, sliding_window=7, tie_word_embeddings=True)),
    "qwen3": (
        "Qwen3",
        dict(
            _LLAMA,
            head_dim=8,
            attention_bias=True,
            use_sliding_window=True,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
    "gemma2": (
        "Gemma2",
        dict(
            _LLAMA,
            head_dim=10,
            query_pre_attn_scalar=14,
            sliding_window=7,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        ),
    ),
    "gemma3": (
        "Gemma3",
        dict(
            _LLAMA,
            num_hidden_layers=4,
            head_dim=10,
            query_pre_attn_scalar=14,
            sliding_window=7,
            sliding_window_pattern=3,
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", factor=2.0, rope_theta=1e4),
                sliding_attention=dict(rope_type="default", rope_theta=100.0),
            ),
        ),
    ),
}


@pytest.fixture(scope="session")
def hf_decoder(tmp_path_factory):
    """A function: variant -> (transformers model in evaluation mode, the folder it was saved to)."""
    import torch
    import transformers

    @functools.cache
    def make(variant: str, gain: float = 1.0):
        kind, settings = DECODERS[variant]
        torch.manual_seed(sum(map(ord, variant)))
        name = "Gemma3Text" if kind == "Gemma3" else kind.removesuffix("LMHead")
        config = getattr(transformers, f"{name}Config")(**settings)
        suffix = "Model" if kind == "GPT2LMHead" else "ForCausalLM"
        config._attn_implementation = "eager"
        model = getattr(transformers, kind + suffix)(config)
        for name, weight in model.named_parameters():
            # Away from the initial values: norms are ones, biases zeros, logits hardly vary.
            if "norm" in name or "ln_" in name or name.endswith("bias"):
                torch.nn.init.uniform_(weight, -0.5, 0.5)
                if not name.endswith("bias") and "Gemma" not in kind:
                    weight.data += 1.0
            elif "embed" in name or "wte" in name or "wpe" in name or "lm_head" in name:
                torch.nn.init.normal_(weight, std=0.3)
            else:
                fan_in = weight.shape[0 if kind == "GPT2LMHead" else 1]
                torch.nn.init.normal_(weight, std=gain * fan_in**-0.5)
        folder = tmp_path_factory.mktemp(variant)
        model.eval().save_pretrained(folder)
        return model, folder

    return make
