"""Text to token ids, the way a chat model expects it. It knows templates, not corpora."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError


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
    """The turns as text, up to and including the header of the next assistant turn."""
    return _render(tokenizer, messages, True)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text; special tokens are added only where no chat template has written them."""
    ids: list[int] = tokenizer(text, add_special_tokens=not tokenizer.chat_template).input_ids
    return ids


def encode_pair(tokenizer: Any, prompt: str, continuation: str, end: int | None) -> tuple[tuple[int, ...], int]:
    """Token ids of prompt and continuation, and how many of them belong to the prompt.

    Both are encoded as one text, so that the continuation gets the tokens it would have in the wild.
    Where a token would straddle the border, they are encoded apart: the prompt must not depend on its
    answer.
    """
    before = encode(tokenizer, prompt)
    together = encode(tokenizer, prompt + continuation)
    if together[: len(before)] == before:
        after = together[len(before) :]
    else:
        after = tokenizer(continuation, add_special_tokens=False).input_ids
    return (*before, *after, *([] if end is None else [end])), len(before)


def _render(tokenizer: Any, messages: Sequence[dict[str, str]], header: bool) -> str:
    text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=header)
    return text
