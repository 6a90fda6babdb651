"""Text to token ids: what goes on, a prompt with its continuation, choices. It knows no template and no benchmark."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

from pipeline.errors import PipelineError

# Texts behind which a reply's tokens are looked up where it cannot follow its prompt.
_ANCHORS = ("\n", ".", "a", "1")


def encode(tokenizer: Any, text: str, templated: bool = True) -> list[int]:
    """Token ids of a text that goes on.

    Special tokens are put in front only where no chat template has written them; those that a tokenizer appends,
    such as an end of sequence, are left out: they would stand between a prompt and its continuation. ``templated``
    says whether the text went through the chat template, where the tokenizer has one.
    """
    return _tokenized(tokenizer, text, templated)[0]


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


def encode_behind(tokenizer: Any, before: Sequence[int], text: str) -> list[int]:
    """Token ids of a text behind tokens that stay as they are, as those that a model wrote.

    Raises
    ------
    PipelineError
        The tokenizer would write another text.
    """
    return _encoded_apart(tokenizer, list(before), text, _decoded(tokenizer, before) + text)


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
        ids, encoding = _tokenized(tokenizer, text, templated, return_offsets_mapping=True)
    except NotImplementedError:  # tokenizers written in Python
        raise PipelineError(
            f"{tokenizer_name(tokenizer)}: this tokenizer does not say where its tokens begin; it needs a "
            "tokenizer.json."
        ) from None
    # Ends, not starts: a byte-level tokenizer leaves the space before a word out of its offsets.
    ends = [end for _, end in encoding.offset_mapping[: len(ids)]]
    index = next((index for index, end in enumerate(ends) if end > character), len(ends))
    # A tokenizer that rewrites its text may count the characters of another one.
    before = encode(tokenizer, text[: max(ends[:index], default=0)], templated)
    if _decoded(tokenizer, ids[:index]).rstrip() != _decoded(tokenizer, before).rstrip():
        raise PipelineError(
            f"{tokenizer_name(tokenizer)}: this tokenizer says wrongly where its tokens begin, so that a late question "
            "cannot be cut off; set late_question to false."
        )
    return index


def tokenizer_name(tokenizer: Any) -> str:
    """What an error calls a tokenizer: where it was loaded from."""
    return str(tokenizer.name_or_path or "the tokenizer")


def _tokenized(tokenizer: Any, text: str, templated: bool, **options: bool) -> tuple[list[int], Any]:
    """Token ids of a text that goes on, and all that the tokenizer says of it."""
    special = not (templated and tokenizer.chat_template)
    encoding = tokenizer(text, add_special_tokens=special, **options)
    ids: list[int] = encoding.input_ids
    return ids[: len(ids) - _appended(tokenizer)] if special else ids, encoding


@functools.lru_cache(maxsize=8)
def _appended(tokenizer: Any) -> int:
    """How many tokens a tokenizer puts behind every text."""
    # A small vocabulary may know few words.
    for text in ("17", "a", *itertools.islice(tokenizer.get_vocab(), 1000)):
        plain, whole = (tokenizer(text, add_special_tokens=special).input_ids for special in (False, True))
        for start in range(len(whole) - len(plain) + 1) if plain else ():
            if whole[start : start + len(plain)] == plain:
                return len(whole) - len(plain) - start
    raise PipelineError(
        f"{tokenizer_name(tokenizer)}: this tokenizer cuts a text differently with its special tokens; use another one."
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
        f"{tokenizer_name(tokenizer)}: this tokenizer joins the end of a prompt with its answer, and apart they are "
        "another text; use another tokenizer."
    )


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
