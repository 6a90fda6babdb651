"""A dialogue with a model as the token ids that it has read and written: they are added to, never rendered again.

A template may write earlier turns in another way once later ones have come, and a reply read back is not always the
tokens that were written. A cache holds what was: so only what stands behind the last reply is taken from the template.
"""

from collections.abc import Collection, Sequence
from typing import Any

from pipeline.errors import PipelineError
from pipeline.samples.template import chat_prompt
from pipeline.samples.text import encode, encode_behind


class Conversation:
    """Turns of a user and a model.

    Parameters
    ----------
    tokenizer
        With a chat template, or without: then turns become a transcript (``pipeline/samples/template.py``).
    end_ids
        Tokens that end a reply.

    Attributes
    ----------
    ids
        Everything up to now: the model goes on from here.
    """

    def __init__(self, tokenizer: Any, end_ids: Collection[int]) -> None:
        self.tokenizer, self.end_ids = tokenizer, end_ids
        self.ids: list[int] = []

    def ask(self, text: str) -> None:
        """Add a turn of the user, and what a template writes before the reply.

        Raises
        ------
        PipelineError
            The template cannot write the turn, the tokenizer would join it with the reply before, or the text holds
            a mark by which the model tells turns apart.
        """
        marks = (token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special)
        if found := next((mark for mark in marks if mark.strip() and mark in text), None):
            raise PipelineError(f"The text holds {found}, by which the model tells turns apart; write it another way.")
        turn = {"role": "user", "content": text}
        if not self.ids:
            self.ids = encode(self.tokenizer, chat_prompt(self.tokenizer, [turn]))
            return
        # What was said stands for nothing here but the place behind it.
        reply = next(mark for mark in map(str, range(10**9, 10**10)) if mark not in text)
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": reply}, turn]
        behind = chat_prompt(self.tokenizer, turns).partition(reply)[2]
        self.ids += encode_behind(self.tokenizer, self.ids, behind)

    def reply(self, ids: Sequence[int]) -> None:
        """Add what the model wrote. A token that ends it is left to the template, which writes its own."""
        self.ids += ids[:-1] if ids and ids[-1] in self.end_ids else ids
