"""Tiny tokenizers, and chat templates that repeat what matters of those of known models."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MARKS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "[INST]", "[/INST]", "<|eot_id|>")


def byte_tokenizer(
    template: str | None = None,
    single: str | None = None,
    normalizer: Any = None,
    merges: tuple[tuple[str, str], ...] = (),
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer; ``single`` is what stands around any text (``<s> $A </s>``)."""
    vocabulary = {piece: index for index, piece in enumerate([*BYTES, *dict.fromkeys(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return _finished(tokenizer, template, single)


def word_tokenizer(words: str, single: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, ``?`` for any other."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", *words.split()])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _finished(tokenizer, None, single)


def piece_tokenizer(pieces: tuple[str, ...], merges: tuple[tuple[str, str], ...]) -> PreTrainedTokenizerFast:
    """As a SentencePiece model of Llama 2: a space in front of every text, spaces written as ``▁``."""
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(merges)))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)]
    )
    return _finished(tokenizer, None, None)


def save(tokenizer: PreTrainedTokenizerFast, directory: Path, **config: Any) -> Path:
    """A model directory without weights."""
    tokenizer.save_pretrained(directory)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    (directory / "config.json").write_text(json.dumps({"eos_token_id": end} | config))
    return directory


def _finished(tokenizer: Tokenizer, template: str | None, single: str | None) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens(list(MARKS))
    if single is not None:
        used = [(mark, tokenizer.token_to_id(mark)) for mark in MARKS if mark in single]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=used)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast


_TURNS = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
_HEADER = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"

CHATML = _TURNS + _HEADER
# An empty thought in front of the last answer, and behind the header where thoughts are switched off.
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% set content = m.content %}{% if m.role == 'assistant' %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}{% if loop.index0 > ns.last and loop.last %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{{ content.lstrip('\n') + '<|im_end|>\n' }}{% else %}"
    "{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{% endif %}{% endfor %}" + _HEADER + ""
    "{% if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)
SMOLLM3 = (
    "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
    "{% set mode = '/think' if enable_thinking else '/no_think' %}{% set today = strftime_now('%d %B %Y') %}"
    "{{ '<|im_start|>system\nToday Date: ' + today + '\nReasoning Mode: ' + mode + '<|im_end|>\n' }}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% if not enable_thinking %}"
    "{{ '<think>\n\n</think>\n' }}{% endif %}{{ m.content.lstrip('\n') + '<|im_end|>\n' }}{% else %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}" + _HEADER + ""
    "{% if add_generation_prompt and not enable_thinking %}{{ '<think>\n\n</think>\n' }}{% endif %}"
)
LLAMA32 = (
    "{{ bos_token }}{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = '26 Jul 2024' %}"
    "{% endif %}{% endif %}"
    "{{ '<|im_start|>system\nToday Date: ' + date_string + '<|eot_id|>' }}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
# Opens a thought behind every header, and writes finished turns without one.
DEEPSEEK_R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>' + m.content }}{% else %}"
    "{% set content = m.content.split('</think>')[-1] %}{{ '<|im_end|>' + content + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_end|><think>\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{{ '<|im_start|>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
# No header, and a space before a reply.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
