"""Text to token ids, the way a model expects it: by its chat template, or for a base model as a transcript.

It knows templates, not corpora.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError

# Who speaks in the transcript of a model without a chat template.
_SPEAKERS = {"user": "User", "assistant": "Assistant"}


def end_of_turn(model: Path, tokenizer: Any) -> int | None:
    """Id of the token that ends an assistant turn, None for a model without a chat template.

    The ids come from the model's configuration, because a tokenizer converted from GGUF may name the
    wrong one. Where there are several, the one that the template writes after a reply is taken.
    """
    if not tokenizer.chat_template:
        return None
    for name in ("generation_config.json", "config.json"):
        path = model / name
        ids = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
        if ids is not None:
            candidates: list[int] = ids if isinstance(ids, list) else [ids]
            turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            closing = [token for token in encode(tokenizer, _render(tokenizer, turns, False)) if token in candidates]
            return closing[-1] if closing else candidates[0]
    raise PipelineError(
        f"{model}: no eos_token_id in generation_config.json or config.json; add the end-of-turn token."
    )


def chat_prompt(tokenizer: Any, messages: Sequence[dict[str, str]]) -> str:
    """The turns as text, up to and including the header of the next assistant turn.

    Without a chat template the turns become a transcript, a paragraph each: ``User: ...``, ``Assistant: ...``.
    """
    if tokenizer.chat_template:
        return _render(tokenizer, messages, True)
    turns = "".join(f"{_SPEAKERS[message['role']]}: {message['content']}\n\n" for message in messages)
    return f"{turns}{_SPEAKERS['assistant']}:"


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
    space = "" if tokenizer.chat_template else " "
    return encode_pair(tokenizer, chat_prompt(tokenizer, messages), f"{space}{reply}", end)


def encode(tokenizer: Any, text: str, templated: bool = True) -> list[int]:
    """Token ids of a text; special tokens are added only where no chat template has written them.

    Parameters
    ----------
    templated
        Whether the text went through the chat template, where the tokenizer has one.
    """
    ids: list[int] = _tokenized(tokenizer, text, templated).input_ids
    return ids


def encode_pair(
    tokenizer: Any, prompt: str, continuation: str, end: int | None, templated: bool = True
) -> tuple[tuple[int, ...], int]:
    """Token ids of prompt and continuation, and how many of them belong to the prompt.

    Both are encoded as one text, so that the continuation gets the tokens it would have in the wild.
    Where a token would straddle the border, they are encoded apart: the prompt must not depend on its
    answer. ``templated`` as in :func:`encode`.
    """
    before = encode(tokenizer, prompt, templated)
    together = encode(tokenizer, prompt + continuation, templated)
    if together[: len(before)] == before:
        after = together[len(before) :]
    else:
        after = tokenizer(continuation, add_special_tokens=False).input_ids
    return (*before, *after, *([] if end is None else [end])), len(before)


def first_token_after(tokenizer: Any, text: str, character: int, templated: bool = True) -> int:
    """Index of the first token that holds anything behind ``character`` in the encoding of the whole text.

    A token that straddles the place is the one. ``templated`` as in :func:`encode`.
    """
    # Ends, not starts: a byte-level tokenizer leaves the space before a word out of its offsets.
    ends = [end for _, end in _tokenized(tokenizer, text, templated, return_offsets_mapping=True).offset_mapping]
    return next((index for index, end in enumerate(ends) if end > character), len(ends))


def _render(tokenizer: Any, messages: Sequence[dict[str, str]], header: bool) -> str:
    text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=header)
    return text


def _tokenized(tokenizer: Any, text: str, templated: bool, **options: bool) -> Any:
    return tokenizer(text, add_special_tokens=not (templated and tokenizer.chat_template), **options)
