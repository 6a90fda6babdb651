"""Tiny random models in the hub's own files: architecture, kind of tokenizer and template are those of the repository.

So are the values of the configurations, apart from what ``_resized`` replaces. A future profile's model is one more
entry of ``HUB``.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM

LAYERS, KV_HEADS, HEAD_DIM = 3, 2, 16
# More than the tokenizers know, as on the hub: matrices are padded.
_VOCABULARY, _PADDED = 3000, 3200
# Large weights make attention uneven; with the published 0.02 every token would weigh the same.
_SPREAD = 0.3


@dataclass(frozen=True)
class HubModel:
    """What tells one repository from another.

    Attributes
    ----------
    config, generation
        config.json and generation_config.json; token ids are written as the tokens that they stand for.
    tokenizer
        tokenizer_config.json, apart from the listing of added tokens.
    pattern, normalised
        How a text is cut before it is tokenised, and whether its characters are composed before.
    special
        Added tokens in their order.
    """

    config: dict[str, Any]
    generation: dict[str, Any]
    tokenizer: dict[str, Any]
    pattern: str
    normalised: bool
    special: tuple[str, ...]


HUB = {
    "Qwen/Qwen2.5-7B-Instruct": HubModel(
        config={
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": "<|endoftext|>",
            "eos_token_id": "<|im_end|>",
            "hidden_act": "silu",
            "hidden_size": 3584,
            "initializer_range": 0.02,
            "intermediate_size": 18944,
            "max_position_embeddings": 32768,
            "max_window_layers": 28,
            "model_type": "qwen2",
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 131072,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.43.1",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": 152064,
        },
        generation={
            "bos_token_id": "<|endoftext|>",
            "pad_token_id": "<|endoftext|>",
            "do_sample": True,
            "eos_token_id": ["<|im_end|>", "<|endoftext|>"],
            "repetition_penalty": 1.05,
            "temperature": 0.7,
            "top_p": 0.8,
            "top_k": 20,
            "transformers_version": "4.37.0",
        },
        tokenizer={
            "add_bos_token": False,
            "add_prefix_space": False,
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"],
            "bos_token": None,
            "chat_template": (
                "{%- if messages[0]['role'] == 'system' %}\n"
                "    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n"
                "{%- else %}\n"
                "    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
                "<|im_end|>\\n' }}\n"
                "{%- endif %}\n"
                "{%- for message in messages %}\n"
                '    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or '
                '(message.role == "assistant" and not message.tool_calls) %}\n'
                "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n"
                "    {%- endif %}\n"
                "{%- endfor %}\n"
                "{%- if add_generation_prompt %}\n"
                "    {{- '<|im_start|>assistant\\n' }}\n"
                "{%- endif %}\n"
            ),
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 131072,
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
        pattern=(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
            r"|\s+(?!\S)|\s+"
        ),
        normalised=True,
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    ),
    "microsoft/phi-4": HubModel(
        config={
            "architectures": ["Phi3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": "<|endoftext|>",
            "embd_pdrop": 0.0,
            "eos_token_id": "<|im_end|>",
            "hidden_act": "silu",
            "hidden_size": 5120,
            "initializer_range": 0.02,
            "intermediate_size": 17920,
            "max_position_embeddings": 16384,
            "model_type": "phi3",
            "num_attention_heads": 40,
            "num_hidden_layers": 40,
            "num_key_value_heads": 10,
            "original_max_position_embeddings": 16384,
            "pad_token_id": "<|dummy_85|>",
            "resid_pdrop": 0.0,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 250000,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.47.0",
            "use_cache": True,
            "vocab_size": 100352,
        },
        generation={
            "_from_model_config": True,
            "bos_token_id": "<|endoftext|>",
            "eos_token_id": "<|im_end|>",
            "pad_token_id": "<|dummy_85|>",
            "transformers_version": "4.47.0",
        },
        tokenizer={
            "add_prefix_space": False,
            "bos_token": "<|endoftext|>",
            "chat_template": (
                "{% for message in messages %}{% if (message['role'] == 'system') %}"
                "{{'<|im_start|>system<|im_sep|>' + message['content'] + '<|im_end|>'}}"
                "{% elif (message['role'] == 'user') %}"
                "{{'<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>'}}"
                "{% elif (message['role'] == 'assistant') %}"
                "{{'<|im_start|>assistant<|im_sep|>' + message['content'] + '<|im_end|>'}}"
                "{% endif %}{% endfor %}"
                "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
            ),
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "model_max_length": 16384,
            "pad_token": "<|dummy_85|>",
            "tokenizer_class": "GPT2Tokenizer",
            "unk_token": "<|endoftext|>",
        },
        pattern=(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
            r"|\s+(?!\S)|\s+"
        ),
        normalised=False,
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|dummy_85|>"),
    ),
}


def write_model(repository: str, text: str, folder: Path) -> None:
    """The files of a repository, smaller: the tokenizer learned from ``text``, the weights drawn at random."""
    made = HUB[repository]
    folder.mkdir(parents=True)
    _write_tokenizer(made, text, folder)
    ids = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    tokens = {token["content"]: token["id"] for token in ids}
    for name, content in (("config", _resized(made.config)), ("generation_config", made.generation)):
        _write_json(folder / f"{name}.json", _with_ids(content, tokens))
    config = (folder / "config.json").read_bytes()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="1MB")
    # The library writes both anew, in words of its own version.
    (folder / "config.json").write_bytes(config)
    _write_json(folder / "generation_config.json", _with_ids(made.generation, tokens))
    # What lies beside a model on the hub and is no part of it.
    (folder / "README.md").write_text(f"# {repository}\n")


def _resized(config: dict[str, Any]) -> dict[str, Any]:
    """Fewer layers and narrower ones; as many queries to a KV head."""
    heads = config["num_attention_heads"] // config["num_key_value_heads"] * KV_HEADS
    sizes = {
        "hidden_size": heads * HEAD_DIM,
        "intermediate_size": 2 * heads * HEAD_DIM,
        "num_attention_heads": heads,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": _PADDED,
        "max_window_layers": LAYERS,
        "initializer_range": _SPREAD,
    }
    return config | {name: size for name, size in sizes.items() if name in config}


def _with_ids(content: dict[str, Any], tokens: dict[str, int]) -> dict[str, Any]:
    def number(value: Any) -> Any:
        return [tokens[token] for token in value] if isinstance(value, list) else tokens[value]

    return {name: number(value) if name.endswith("_token_id") else value for name, value in content.items()}


def _write_tokenizer(made: HubModel, text: str, folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    if made.normalised:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(made.pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=_VOCABULARY, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in made.special])
    tokenizer.save(str(folder / "tokenizer.json"))
    learned = json.loads((folder / "tokenizer.json").read_text())
    _write_json(folder / "vocab.json", learned["model"]["vocab"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in learned["model"]["merges"]))
    listing = {str(token.pop("id")): token for token in learned["added_tokens"]}
    _write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": listing} | made.tokenizer)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
