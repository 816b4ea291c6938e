"""A tiny random model of any class of transformers, from its default configuration made small."""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig

V, WIDTH, HEADS, LAYERS = 64, 32, 4, 2
FIRST_SPECIAL = 48  # ids from here on stand for images, sounds and the like

# the first pattern that an integer option's whole name matches says how large it is made
SIZES: list[tuple[str, int]] = [
    (r"(unpadded|padded)_vocab_size", V),
    (r".*vocab_size.*|n_vocab|num_tokens|vocab_size", V),
    (r"pad_token_id", 0),
    (r"bos_token_id|decoder_start_token_id|cls_token_id", 1),
    (r"eos_token_id|sep_token_id", 2),
    (r"max_position_embeddings|max_position|n_positions|n_ctx", 64),
    (r"max_seq_len.*|max_sequence_length", 64),
    (r"max_(source|target)_positions|seq_length|max_context_length|context_length", 64),
    (r"num_key_value_heads|num_kv_heads|.*_num_kv_heads|n_head_kv|multi_query_group_num", 2),
    (r".*key_value_heads", 2),
    (r"mamba_(n|num)_heads|linear_num_(key|value)_heads|linear_num_heads", HEADS),
    (r"num_attention_heads|.*attention_heads|num_heads|n_heads?|.*_num_heads|.*n_heads", HEADS),
    (r".*head_dim|.*d_head|d_kv|attention_head_size|head_size", 8),
    (r"qk_nope_head_dim|qk_rope_head_dim|kv_channels", 8),
    (r"q_lora_rank|kv_lora_rank|.*_rank", 8),
    (r"num_nextn_predict_layers|num_mtp_layers|.*mtp.*layers", 0),
    (r"first_k_dense_replace|moe_layer_start_index|num_dense_layers", 1),
    (r"num_hidden_layers|.*num_layers|n_layers?|.*_layers|depth", LAYERS),
    (r"num_experts_per_tok(en)?|moe_k|top_k_experts|moe_topk|.*experts_per_tok.*|expert_top_k", 2),
    (r"num_experts|.*num_experts|num_local_experts|n_routed_experts|moe_num_experts", 4),
    (r"n_group|topk_group|n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"moe_intermediate_size|.*expert_intermediate_size|expert_ffn_hidden_size", 16),
    (r"intermediate_size.*|.*intermediate_size|.*ffn_dim|.*ffn_hidden_size|d_ff|n_inner", 48),
    (r"inner_dim|mlp_dim|dim_feedforward|ffn_size|.*mlp_hidden_size", 48),
    (r"hidden_size|.*hidden_size|d_model|n_embd|.*embed_dim|dim|embedding_size|emb_dim", WIDTH),
    (r".*hidden_dim|.*_dim|.*embedding_dim|width|word_embed_proj_dim|lru_width", WIDTH),
    (r"(mamba_)?(d_)?ssm_state_size|state_size|mamba_d_state|ssm_d_state|.*d_state", 8),
    (r"image_size", 16),
    (r".*patch_size", 4),
    (r"sliding_window|attention_window.*|window_size|local_attention|.*chunk_size", 16),
    (r"num_labels", 5),
]  # fmt: skip


HEAD = {"head_dim": 8}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
# options that hold together in another way, by the class of the configuration ...
OVERRIDES: dict[str, dict] = {
    "BambaConfig": MAMBA,
    "CodeGenConfig": {"rotary_dim": 4},
    "DeepseekV2Config": {"num_key_value_heads": HEADS, "num_experts_per_tok": 2},
    "DbrxConfig": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": WIDTH,
            "ffn_hidden_size": 16,
            "moe_num_experts": 4,
            "moe_top_k": 2,
        },
    },
    "DoryConfig": {
        "num_hidden_layers": 3,
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
    },
    "EsmConfig": {"vocab_size": V},
    "EsmcConfig": {"num_key_value_heads": HEADS},
    "GPTJConfig": {"rotary_dim": 4},
    "GPTNeoConfig": {"num_layers": LAYERS, "attention_types": [[["global", "local"], 1]]},
    "Gemma3nTextConfig": {"num_kv_shared_layers": 0},
    "Glm5NextTextConfig": {"num_key_value_heads": HEADS},
    "GraniteMoeHybridConfig": MAMBA | {"layers_block_type": ["mamba", "attention"]},
    "HunYuanDenseV1Config": HEAD,
    "HunYuanMoEV1Config": HEAD,
    "LayoutLMv3Config": {"coordinate_size": 4, "shape_size": 8},
    "LiltConfig": {"channel_shrink_ratio": 2},
    "Mamba2Config": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "MinistralConfig": HEAD,
    "MobileBertConfig": {"true_hidden_size": 32, "intra_bottleneck_size": 32},
    "NemotronConfig": HEAD | {"num_key_value_heads": 2},
    "Qwen3_5MoeTextConfig": {"num_hidden_layers": 4},
    "Qwen3_5TextConfig": {"num_hidden_layers": 4},
    "Mistral4Config": {"num_key_value_heads": HEADS, "qk_head_dim": 16, "head_dim": 8},
    "MiniCPM3Config": {"num_key_value_heads": HEADS},
    "BailingHybridConfig": {"num_expert_group": 1, "topk_group": 1, "qk_head_dim": 16},
    "Dots1Config": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "Gemma4TextConfig": {
        "layer_types": ["sliding_attention", "full_attention"],
        "per_layer_config": None,
        "hidden_size_per_layer_input": 8,
    },
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "LongcatFlashConfig": {"qk_head_dim": 16, "zero_expert_num": 2},
    "NemotronHConfig": {"n_groups": 2},
    "ZambaConfig": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "attention_head_dim": 16,
        "mamba_dt_rank": 4,
    },
    "Zamba2Config": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "hybrid_layer_ids": [1],
        "attention_head_dim": 16,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "num_query_groups": 4,
    },
    "XmodConfig": {"default_language": "en_XX"},
}
# ... or of the model
CLASS_OVERRIDES: dict[str, dict] = {
    "ReformerModelWithLMHead": {
        "is_decoder": True,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
    },
}

# with parameters that transformers leaves as they lay in memory
NEVER_SET = ("DbrxForCausalLM", "JetMoeForCausalLM")


def small(name: str, value: Any) -> Any:
    """An option's tiny value, the value itself where it stays."""
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    for pattern, size in SIZES:
        if re.fullmatch(pattern, name):
            return min(size, value) if "vocab" not in name else size
    return value


def tiny_options(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Constructor options that make the default configuration tiny."""
    default = config_class()
    options: dict[str, Any] = {}
    specials = iter(range(FIRST_SPECIAL, V))
    for name, value in default.to_dict().items():
        inner = vars(default).get(name)  # asked by name, some configs refuse what differs by layer
        if isinstance(inner, PreTrainedConfig):
            options[name] = tiny_options(type(inner)) | {"model_type": inner.model_type}
            options[name] |= OVERRIDES.get(type(inner).__name__, {})
        elif re.fullmatch(r".*token_(id|index)|.*_token", name) and isinstance(value, int):
            made = small(name, value)
            options[name] = made if made < V else next(specials)
        elif isinstance(value, dict) and value.get("mrope_section"):
            options[name] = {**value, "mrope_section": [2, 1, 1]}  # half a head
        elif (made := small(name, value)) != value:
            options[name] = made
    if options.get("kv_lora_rank") and "num_key_value_heads" in options:
        options["num_key_value_heads"] = HEADS  # latent attention has no groups
    return options


def tiny_config(config_class: type[PreTrainedConfig], **more: Any) -> PreTrainedConfig:
    options = tiny_options(config_class) | OVERRIDES.get(config_class.__name__, {}) | more
    return config_class(**options)


def config_class_of(model_class: type) -> type[PreTrainedConfig]:
    return model_class.config_class


def tiny_model(name: str, **options: Any):
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    options = CLASS_OVERRIDES.get(name, {}) | options
    config = tiny_config(config_class_of(model_class), **options)
    for part in (config, config.get_text_config()):
        if getattr(part, "pad_token_id", None) is None:
            part.pad_token_id = 0
    if hasattr(config, "_attn_implementation"):
        config._attn_implementation = "eager"
    model = model_class(config).float().eval()
    if name in NEVER_SET:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return model
