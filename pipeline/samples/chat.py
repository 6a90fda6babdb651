"""Text to token ids, the way a model expects it: by its chat template, or for a base model as a transcript.

It knows templates, not corpora. Prompts must be the same on any day and in any process, and a reply must stand where
the template itself would write it: what cannot be so is refused when the first prompt is made.
"""

import functools
import itertools
import json
import random
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError

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
# Texts behind which a reply's tokens are looked up where it cannot follow its prompt.
_ANCHORS = ("\n", ".", "a", "1")


def read_config(path: Path) -> dict[str, Any]:
    """A model's JSON file; empty where there is none.

    Raises
    ------
    PipelineError
        It is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise PipelineError(f"{path} cannot be read ({error}); fetch the model again.") from None
    if not isinstance(config, dict):
        raise PipelineError(f"{path} is no JSON object; fetch the model again.")
    return config


def language_value(config: dict[str, Any], key: str) -> Any:
    """A value of a model's configuration; a multimodal one keeps those of its language part in ``text_config``."""
    part = config.get("text_config")
    nested = part.get(key) if isinstance(part, dict) else None
    return config[key] if config.get(key) is not None else nested


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

    Parameters
    ----------
    messages
        Alternating turns, the last a user's.
    end
        From :func:`end_of_turn`.
    """
    return encode_pair(tokenizer, chat_prompt(tokenizer, messages), f"{reply_gap(tokenizer)}{reply}", end)


def encode(tokenizer: Any, text: str, templated: bool = True) -> list[int]:
    """Token ids of a text that goes on.

    Special tokens are put in front only where no chat template has written them; those that a tokenizer appends,
    such as an end of sequence, are left out: they would stand between a prompt and its continuation.

    Parameters
    ----------
    templated
        Whether the text went through the chat template, where the tokenizer has one.
    """
    ids: list[int] = _tokenized(tokenizer, text, templated).input_ids
    return ids[: len(ids) - _appended(tokenizer, templated)]


def encode_pair(
    tokenizer: Any, prompt: str, continuation: str, end: int | None, templated: bool = True
) -> tuple[tuple[int, ...], int]:
    """Token ids of prompt and continuation, and how many of them belong to the prompt.

    Both are encoded as one text, so that the continuation gets the tokens it would have in the wild.
    Where a token would straddle the border, they are encoded apart: the prompt must not depend on its
    answer. ``templated`` as in :func:`encode`.

    Raises
    ------
    PipelineError
        Apart, they are not the text that they are together.
    """
    before = encode(tokenizer, prompt, templated)
    together = encode(tokenizer, prompt + continuation, templated)
    if together[: len(before)] == before:
        after = together[len(before) :]
    else:
        after = _encoded_apart(tokenizer, before, continuation, _decoded(tokenizer, together))
    return (*before, *after, *([] if end is None else [end])), len(before)


def encode_choices(
    tokenizer: Any, context: str, choices: Sequence[str], where: str
) -> tuple[list[int], tuple[tuple[int, ...], ...]]:
    """Token ids of a context without a chat template, and of the choices after it and a space.

    As lm-eval 0.4.13's ``_encode_pair``: context and choice are encoded as one text and cut where the context alone,
    without the space at its end, stops.

    Raises
    ------
    PipelineError
        A choice has no tokens of its own, what is cut is not the text, or all choices have the same tokens;
        ``where`` names the row.
    """
    prompt = encode(tokenizer, context.rstrip(), templated=False)
    tokens = []
    for choice in choices:
        whole = encode(tokenizer, f"{context} {choice}", templated=False)
        own = whole[len(prompt) :]
        if not own or not choice.strip():
            raise PipelineError(f"{where} has a choice without tokens of its own; drop the row.")
        if whole[: len(prompt)] != prompt and _decoded(tokenizer, [*prompt, *own]) != _decoded(tokenizer, whole):
            raise PipelineError(f"{where}: the tokenizer joins the end of the context with a choice; drop the row.")
        tokens.append(tuple(own))
    if len(set(tokens)) == 1:
        raise PipelineError(f"{where}: the tokenizer gives every choice the same tokens; drop the row or the model.")
    return prompt, tuple(tokens)


def first_token_after(tokenizer: Any, text: str, character: int, templated: bool = True) -> int:
    """Index of the first token that holds anything behind ``character`` in the encoding of the whole text.

    A token that straddles the place is the one. ``templated`` as in :func:`encode`.

    Raises
    ------
    PipelineError
        The tokenizer does not know which characters its tokens stand for.
    """
    try:
        encoding = _tokenized(tokenizer, text, templated, return_offsets_mapping=True)
    except NotImplementedError:  # tokenizers written in Python
        raise PipelineError(
            f"{_name(tokenizer)}: this tokenizer does not say where its tokens begin; it needs a tokenizer.json."
        ) from None
    ids = encoding.input_ids[: len(encoding.input_ids) - _appended(tokenizer, templated)]
    # Ends, not starts: a byte-level tokenizer leaves the space before a word out of its offsets.
    ends = [end for _, end in encoding.offset_mapping[: len(ids)]]
    index = next((index for index, end in enumerate(ends) if end > character), len(ends))
    # A tokenizer that rewrites its text may count the characters of another one.
    before = encode(tokenizer, text[: max(ends[:index], default=0)], templated)
    if _decoded(tokenizer, ids[:index]).rstrip() != _decoded(tokenizer, before).rstrip():
        raise PipelineError(
            f"{_name(tokenizer)}: this tokenizer says wrongly where its tokens begin, so that a late question "
            "cannot be cut off; set late_question to false."
        )
    return index


def _render(tokenizer: Any, messages: Sequence[dict[str, str]], header: bool) -> str:
    _inspect(tokenizer, str(tokenizer.chat_template))
    return _apply(tokenizer, messages, header)


@functools.lru_cache(maxsize=8)
def _inspect(tokenizer: Any, template: str) -> str:
    """The gap that a template leaves before a reply; ``template`` is there for the cache, a tokenizer's may change.

    Raises
    ------
    PipelineError
        See :func:`template_settings`.
    """
    gap = ""
    for turns in _PROBES:
        prompt = _apply(tokenizer, turns, True)
        whole = _apply(tokenizer, [*turns, {"role": "assistant", "content": _REPLY}], False)
        if re.search(r" at 0x[0-9a-f]+>", prompt):
            raise PipelineError(
                f"{_name(tokenizer)}: its chat template writes an address in memory, so that no prompt could be made "
                "again; use another template."
            )
        start = next((start for start in (prompt, prompt.rstrip()) if whole.startswith(start)), None)
        rest = "" if start is None else whole[len(start) :]
        if not rest.lstrip().startswith(_REPLY):
            raise PipelineError(
                f"{_name(tokenizer)}: its chat template does not write a reply right after the header of a turn "
                "(models that always think aloud open a block of thoughts there), and the benchmarks mean a direct "
                "answer; use another model or template."
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
            f"{_name(tokenizer)}: its chat template cannot write turns of user and assistant ({reason[:200]}); use "
            "another template."
        ) from None
    if random.getstate() != state:
        random.setstate(state)
        raise PipelineError(
            f"{_name(tokenizer)}: its chat template draws random numbers, so that no prompt could be made again; use "
            "another template."
        )
    assert isinstance(text, str)
    return text


def _clock(time: datetime) -> dict[str, Any]:
    # What a call names goes before the globals of a template, transformers' clock among them.
    return {"date_string": time.strftime("%d %b %Y"), "strftime_now": time.strftime}


def _name(tokenizer: Any) -> str:
    return str(tokenizer.name_or_path or "the tokenizer")


def _tokenized(tokenizer: Any, text: str, templated: bool, **options: bool) -> Any:
    return tokenizer(text, add_special_tokens=_adds_special(tokenizer, templated), **options)


def _adds_special(tokenizer: Any, templated: bool) -> bool:
    return not (templated and tokenizer.chat_template)


def _appended(tokenizer: Any, templated: bool) -> int:
    """How many tokens a tokenizer puts behind every text."""
    return _appended_to_any(tokenizer) if _adds_special(tokenizer, templated) else 0


@functools.lru_cache(maxsize=8)
def _appended_to_any(tokenizer: Any) -> int:
    # A small vocabulary may know few words.
    for text in (_QUESTION, "a", *itertools.islice(tokenizer.get_vocab(), 1000)):
        plain, whole = (tokenizer(text, add_special_tokens=special).input_ids for special in (False, True))
        for start in range(len(whole) - len(plain) + 1) if plain else ():
            if whole[start : start + len(plain)] == plain:
                return len(whole) - len(plain) - start
    raise PipelineError(
        f"{_name(tokenizer)}: this tokenizer cuts a text differently with its special tokens; use another one."
    )


def _encoded_apart(tokenizer: Any, before: list[int], continuation: str, text: str) -> list[int]:
    candidates = [tokenizer(continuation, add_special_tokens=False).input_ids]
    # Some tokenizers put a space before any text of its own; behind another one there is none.
    for anchor in _ANCHORS:
        alone, whole = (tokenizer(part, add_special_tokens=False).input_ids for part in (anchor, anchor + continuation))
        if whole[: len(alone)] == alone:
            candidates.append(whole[len(alone) :])
    for after in candidates:
        if _decoded(tokenizer, [*before, *after]) == text:
            return list(after)
    raise PipelineError(
        f"{_name(tokenizer)}: this tokenizer joins the end of a prompt with its answer, and apart they are "
        "another text; use another tokenizer."
    )


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
