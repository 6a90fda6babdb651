"""Tiny random models of the families that transformers has, for docs/MODELS.md and its test."""

from typing import Any

import transformers
from transformers import PretrainedConfig

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Large weights make attention uneven; with the default 0.02 every token would weigh the same.
    "initializer_range": 0.2,
}
HEAD = {"head_dim": 16}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 24}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 28,
    "patch_size": 14,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 128,
}

# name in the table -> name of the config in transformers, what it differs in
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", HEAD),
    "Llama 3.1 (scaled rotation)": (
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "Llama, dynamic NTK": (
        "LlamaConfig",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
            "max_position_embeddings": 256,
        },
    ),
    "Llama 4 (text)": (
        "Llama4TextConfig",
        HEAD | {"num_local_experts": 2, "intermediate_size_mlp": 96, "attention_chunk_size": 48},
    ),
    "Qwen2": ("Qwen2Config", {}),
    "Qwen2, YaRN": (
        "Qwen2Config",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    "Qwen2, first layers sliding": (
        "Qwen2Config",
        {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 24},
    ),
    "Qwen2-MoE": ("Qwen2MoeConfig", EXPERTS | {"shared_expert_intermediate_size": 32}),
    "Qwen3": ("Qwen3Config", HEAD),
    "Qwen3-MoE": ("Qwen3MoeConfig", HEAD | EXPERTS),
    "Qwen3-Next": (
        "Qwen3NextConfig",
        HEAD
        | EXPERTS
        | {
            "shared_expert_intermediate_size": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
    ),
    "Gemma": ("GemmaConfig", HEAD),
    "Gemma 2": ("Gemma2Config", HEAD | SLIDING | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0}),
    "Gemma 3 (text)": ("Gemma3TextConfig", HEAD | SLIDING | {"query_pre_attn_scalar": 20}),
    "Gemma 3 (multimodal)": (
        "Gemma3Config",
        {
            "text_config": SIZES | HEAD | SLIDING,
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
        },
    ),
    "Gemma 3n (text)": (
        "Gemma3nTextConfig",
        HEAD
        | SLIDING
        | {
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": 128,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
    "Phi": ("PhiConfig", {}),
    "Phi-3, whole rotation": ("Phi3Config", {}),
    "Phi-3, sliding": ("Phi3Config", {"sliding_window": 24}),
    "Phi-4-mini, partial rotation": (
        "Phi3Config",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}},
    ),
    "Phi-3, LongRoPE": ("Phi3Config", {"rope_parameters": LONG, "original_max_position_embeddings": 128}),
    "Granite": (
        "GraniteConfig",
        {"logits_scaling": 8.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1},
    ),
    "Granite-MoE": (
        "GraniteMoeConfig",
        {"logits_scaling": 8.0, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "Cohere": ("CohereConfig", {"logit_scale": 0.3}),
    "Cohere 2": ("Cohere2Config", HEAD | SLIDING | {"logit_scale": 0.3}),
    "OLMo": ("OlmoConfig", {"clip_qkv": 2.0}),
    "OLMo 2": ("Olmo2Config", {}),
    "OLMo 3": ("Olmo3Config", SLIDING),
    "OLMoE": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "SmolLM3": ("SmolLM3Config", {"no_rope_layer_interval": 2}),
    "GLM": ("GlmConfig", HEAD),
    "GLM-4": ("Glm4Config", HEAD),
    "GLM-4-MoE": ("Glm4MoeConfig", HEAD | LATENT | {"num_key_value_heads": 2}),
    "Mistral": ("MistralConfig", {"sliding_window": None}),
    "Mistral, sliding": ("MistralConfig", {"sliding_window": 24}),
    "Ministral": ("MinistralConfig", HEAD | SLIDING),
    "Mixtral": ("MixtralConfig", {"num_local_experts": 4, "sliding_window": None}),
    "StableLM": ("StableLmConfig", {"partial_rotary_factor": 0.25}),
    "StarCoder 2": ("Starcoder2Config", {"sliding_window": None}),
    "Nemotron": ("NemotronConfig", {"partial_rotary_factor": 0.5}),
    "EXAONE 4": ("Exaone4Config", SLIDING),
    "GPT-OSS": ("GptOssConfig", HEAD | SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "GPT-2": ("GPT2Config", {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 512}),
    "GPT-NeoX": ("GPTNeoXConfig", {}),
    "GPT-J": ("GPTJConfig", {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 512, "rotary_dim": 8}),
    "OPT": ("OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "Bloom": ("BloomConfig", {"n_layer": 4, "n_head": 4}),
    "MPT": ("MptConfig", {"d_model": 64, "n_layers": 4, "n_heads": 4}),
    "Falcon": ("FalconConfig", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "Seed-OSS": ("SeedOssConfig", HEAD),
    "ERNIE 4.5": ("Ernie4_5Config", HEAD),
    "Arcee": ("ArceeConfig", HEAD),
    "Apertus": ("ApertusConfig", {}),
    "Helium": ("HeliumConfig", HEAD),
    "Hunyuan": ("HunYuanDenseV1Config", HEAD),
    "BitNet": ("BitNetConfig", {}),
    "dots.llm1": ("Dots1Config", HEAD | LATENT | {"num_key_value_heads": 2, "n_shared_experts": 1}),
    "MiniMax": (
        "MiniMaxConfig",
        HEAD | {"num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"] * 2},
    ),
    "DeepSeek-V2": ("DeepseekV2Config", LATENT),
    "DeepSeek-V3": ("DeepseekV3Config", LATENT),
    "DiffLlama": ("DiffLlamaConfig", HEAD),
    "Jamba": (
        "JambaConfig",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "num_experts": 2},
    ),
    "Bamba": (
        "BambaConfig",
        {"attn_layer_indices": [1, 3], "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16},
    ),
    "Zamba 2": (
        "Zamba2Config",
        {
            "layers_block_type": ["mamba", "hybrid"] * 2,
            "mamba_ngroups": 1,
            "n_mamba_heads": 8,
            "use_mem_eff_path": False,
        },
    ),
    "Falcon-H1": (
        "FalconH1Config",
        HEAD | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1},
    ),
    "LFM2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"] * 2}),
    "RecurrentGemma": (
        "RecurrentGemmaConfig",
        HEAD | {"block_types": ("recurrent", "attention"), "attention_window_size": 24, "lru_width": 64},
    ),
    "Mamba 2": ("Mamba2Config", {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1}),
}


def config(family: str) -> PretrainedConfig:
    """The configuration of a family's tiny model."""
    name, changes = FAMILIES[family]
    made: PretrainedConfig = getattr(transformers, name)(**(changes if "text_config" in changes else SIZES | changes))
    return made
