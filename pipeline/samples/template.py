"""Turns to text, the way a model expects them: by its chat template, or for a base model as a transcript.

It knows templates, not benchmarks. Prompts must be the same on any day and in any process, and a reply must stand
where the template itself would write it: what cannot be so is refused when the first prompt is made.
"""

import functools
import random
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.samples.config import language_value, read_config
from pipeline.samples.text import encode, encode_pair, tokenizer_name

# Who speaks in the transcript of a model without a chat template.
_SPEAKERS = {"user": "User", "assistant": "Assistant"}
# What templates that show the date are told: the one that Llama 3.1's and 3.2's fall back to.
DATE = datetime(2024, 7, 26)
# Benchmarks mean a direct answer: the switches by which templates of models that can think aloud are told so.
_DIRECT = {"enable_thinking": False, "thinking": False}
# Digits, because a template may change the case of what it wraps; all distinct, to be found again.
_QUESTION, _REPLY, _NEXT = "17", "23", "41"
_PROBES = (
    ({"role": "user", "content": _QUESTION},),
    (
        {"role": "user", "content": _QUESTION},
        {"role": "assistant", "content": "59"},
        {"role": "user", "content": _NEXT},
    ),
)


def end_of_turn(model: Path, tokenizer: Any) -> int | None:
    """Id of the token that ends an assistant turn, None for a model without a chat template.

    The ids come from the model's configuration, because a tokenizer converted from GGUF may name the
    wrong one. Where there are several, the first that the template writes after a reply is taken.

    Raises
    ------
    PipelineError
        The configuration names none, or the template ends a turn with a special token that it does not name.
    """
    if not tokenizer.chat_template:
        return None
    for name in ("generation_config.json", "config.json"):
        ids = language_value(read_config(model / name), "eos_token_id")
        if ids is None:
            continue
        candidates: list[int] = ids if isinstance(ids, list) else [ids]
        if not candidates or not all(type(token) is int and token >= 0 for token in candidates):
            raise PipelineError(f"{model / name}: eos_token_id {ids!r} is no token id; correct it.")
        reply = {"role": "assistant", "content": _REPLY}
        closing = encode(tokenizer, _render(tokenizer, [*_PROBES[0], reply], False).rpartition(_REPLY)[2])
        known = [token for token in closing if token in candidates]
        # Vocabularies list runs of line breaks beside their marks.
        added = tokenizer.added_tokens_decoder
        special = [token for token in closing if token in added and added[token].content.strip()]
        if special and not known:
            raise PipelineError(
                f"{model / name}: the chat template ends a turn with {tokenizer.convert_ids_to_tokens(special[0])} "
                f"({special[0]}), which eos_token_id {ids!r} does not hold; add it, or no answer would ever end."
            )
        return known[0] if known else candidates[0]
    raise PipelineError(
        f"{model}: no eos_token_id in generation_config.json or config.json; add the end-of-turn token."
    )


def chat_prompt(tokenizer: Any, messages: Sequence[dict[str, str]]) -> str:
    """The turns as text, up to and including the header of the next assistant turn.

    Without a chat template the turns become a transcript, a paragraph each: ``User: ...``, ``Assistant: ...``.

    Raises
    ------
    PipelineError
        The template cannot render the turns, changes their text, or is none that a benchmark can use
        (:func:`template_settings`).
    """
    if tokenizer.chat_template:
        text = _render(tokenizer, messages, True)
        place = 0
        for message in messages:
            content = message["content"].strip()
            place = text.find(content, place)
            if place < 0:
                raise PipelineError(
                    "the chat template changes the text of a turn or leaves it out; use another template."
                )
            place += len(content)
        return text
    turns = "".join(f"{_SPEAKERS[message['role']]}: {message['content']}\n\n" for message in messages)
    return f"{turns}{_SPEAKERS['assistant']}:"


def reply_gap(tokenizer: Any) -> str:
    """What stands between a prompt and its reply: a space in a transcript, whatever a template writes there."""
    return _inspect(tokenizer, str(tokenizer.chat_template)) if tokenizer.chat_template else " "


def template_settings(tokenizer: Any) -> dict[str, str]:
    """What a chat template was told beside the turns, as far as it changes a prompt: the date, and not to think aloud.

    Raises
    ------
    PipelineError
        The template gives another text each time, or a reply after its header is not what it writes for a
        finished turn, as those that always open a block of thoughts.
    """
    if not tokenizer.chat_template:
        return {}
    reply_gap(tokenizer)
    plain = _apply(tokenizer, _PROBES[0], True)
    settings = {}
    if plain != _apply(tokenizer, _PROBES[0], True, **_clock(datetime(1999, 12, 3, 4, 5, 6))):
        settings["date"] = DATE.date().isoformat()
    if plain != _apply(tokenizer, _PROBES[0], True, **dict.fromkeys(_DIRECT, True)):
        settings["thinking"] = "off"
    return settings


def encode_reply(
    tokenizer: Any, messages: Sequence[dict[str, str]], reply: str, end: int | None
) -> tuple[tuple[int, ...], int]:
    """Token ids of a dialogue with the reply to its last turn, and how many come before the reply.

    ``messages`` are alternating turns, the last a user's; ``end`` comes from :func:`end_of_turn`.
    """
    return encode_pair(tokenizer, chat_prompt(tokenizer, messages), f"{reply_gap(tokenizer)}{reply}", end)


def _render(tokenizer: Any, messages: Sequence[dict[str, str]], header: bool) -> str:
    _inspect(tokenizer, str(tokenizer.chat_template))
    return _apply(tokenizer, messages, header)


@functools.lru_cache(maxsize=8)
def _inspect(tokenizer: Any, template: str) -> str:
    """The gap that a template leaves before a reply; ``template`` is there for the cache, a tokenizer's may change."""
    gap = ""
    for turns in _PROBES:
        prompt = _apply(tokenizer, turns, True)
        whole = _apply(tokenizer, [*turns, {"role": "assistant", "content": _REPLY}], False)
        if re.search(r" at 0x[0-9a-f]+>", prompt):
            raise PipelineError(
                f"{tokenizer_name(tokenizer)}: its chat template writes an address in memory, so that no prompt could "
                "be made again; use another template."
            )
        start = next((start for start in (prompt, prompt.rstrip()) if whole.startswith(start)), None)
        rest = "" if start is None else whole[len(start) :]
        if not rest.lstrip().startswith(_REPLY):
            raise PipelineError(
                f"{tokenizer_name(tokenizer)}: its chat template does not write a reply right after the header of "
                "a turn (models that always think aloud open a block of thoughts there), and the benchmarks mean a "
                "direct answer; use another model or template."
            )
        gap = rest[: len(rest) - len(rest.lstrip())] if start == prompt else ""
    return gap


def _apply(tokenizer: Any, messages: Sequence[dict[str, str]], header: bool, **more: Any) -> str:
    settings = _clock(DATE) | _DIRECT | more
    state = random.getstate()
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=header, **settings)
    except Exception as error:  # a template raises whatever it likes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PipelineError(
            f"{tokenizer_name(tokenizer)}: its chat template cannot write turns of user and assistant "
            f"({reason[:200]}); use another template."
        ) from None
    if random.getstate() != state:
        random.setstate(state)
        raise PipelineError(
            f"{tokenizer_name(tokenizer)}: its chat template draws random numbers, so that no prompt could be "
            "made again; use another template."
        )
    assert isinstance(text, str)
    return text


def _clock(time: datetime) -> dict[str, Any]:
    # What a call names goes before the globals of a template, transformers' clock among them.
    return {"date_string": time.strftime("%d %b %Y"), "strftime_now": time.strftime}
