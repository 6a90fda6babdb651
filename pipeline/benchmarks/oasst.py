"""OpenAssistant: message trees to English threads to multi-turn dialogues of a target length.

It reads the published schemas, messages (one row each, linked by parent_id) and trees (nested replies),
and knows no hub, model or benchmark. A thread is a path from a tree's first prompt to an assistant's reply
whose assistant turns were ranked best. A dialogue is several threads one after the other, as a user with
several questions would have it (paper, section "Models and benchmarks": OASST2-4k); the last reply of the
last one is to be predicted. Splits share no tree.
"""

import json
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from pipeline.benchmarks.base import AllSizes, Making
from pipeline.benchmarks.base_dialogues import ComposedDialogues, in_threads
from pipeline.errors import PipelineError
from pipeline.samples.rows import (
    Flag,
    Identifier,
    RowModel,
    Text,
    WholeNumber,
    is_null,
    read_placed_rows,
    require_columns,
    validated,
)
from pipeline.samples.sample import SPLITS, Sample, Split
from pipeline.samples.template import chat_prompt, encode_reply, end_of_turn
from pipeline.samples.text import encode

ROLES = {"prompter": "user", "assistant": "assistant"}
_COLUMNS = ("message_id", "parent_id", "message_tree_id", "role", "text", "lang")
# Filling stops at this share of the target length: whole threads rarely add up to it.
_SHORTEST = 0.9
# Threads that are tried in search of ones that fit; more would use the same short ones everywhere.
_CANDIDATES = 200
_ATTEMPTS = 20


def _blank_is_null(value: Any) -> Any:
    # Spreadsheets have no other null.
    return None if isinstance(value, str) and not value.strip() else value


class _Message(RowModel):
    message_id: Identifier
    parent_id: Annotated[Identifier | None, BeforeValidator(_blank_is_null)] = None
    message_tree_id: Identifier
    role: Literal["prompter", "assistant"]
    text: Text
    lang: Text
    deleted: Flag = False
    rank: WholeNumber | None = None


class _Tree(RowModel):
    message_tree_id: Identifier
    prompt: dict[str, Any]


class _Replies(RowModel):
    replies: tuple[dict[str, Any], ...] = Field(default=(), strict=False)


Message = dict[str, str]
_NEXT = {"role": "user", "content": "And then?"}


@dataclass(frozen=True)
class Thread:
    """Alternating turns of one path, the first a user's, the last an assistant's."""

    tree: str
    leaf: str
    turns: tuple[Message, ...]


class Oasst(ComposedDialogues):
    """A thread, and before it as many others as fill a dialogue."""

    too_few: ClassVar[str] = (
        "only {found} threads make a {split} dialogue of about {length} tokens, {wanted} are wanted; lower sizes or "
        "length, raise max_reply_tokens, or use a larger source."
    )

    kind: Literal["oasst"]

    def build(self, making: Making) -> dict[Split, list[Sample]]:
        """All samples, by split.

        Raises
        ------
        PipelineError
            The source is unusable, or there are too few threads.
        """
        composer = _Composer(self, making.tokenizer, end_of_turn(making.model, making.tokenizer))
        threads = english_threads(read_messages(making.sources["source"]))
        fits = in_threads(composer.fits, threads)
        fitting = {thread.tree for thread, does in zip(threads, fits, strict=True) if does}
        split_of = assign_trees(threads, fitting, self.sizes, self.seed)

        def compose(split: Split, own: Sequence[Thread], thread: Thread) -> Sample | None:
            found = composer.compose(thread, own)
            if found is None:
                return None
            ids, prompt_len, used = found
            return Sample(
                sample_id=f"{split}-{thread.leaf}",
                benchmark=making.name,
                task=making.name,
                split=split,
                input_ids=ids,
                prompt_len=prompt_len,
                meta=json.dumps({"threads": [other.leaf for other in used]}, sort_keys=True),
                ask=("likelihood",) if split == "test" else (),
            )

        return self.divided(making, threads, lambda thread: split_of[thread.tree], compose)


def read_messages(source: Path) -> list[dict[str, Any]]:
    """The messages of a source, trees unfolded.

    ``source`` is a ``.jsonl``, ``.jsonl.gz`` or ``.parquet`` file of messages or trees, or a directory laid out like
    the hub's repository: ``data/*.parquet``, else ``*_ready.messages.jsonl.gz``.

    Raises
    ------
    PipelineError
        There is no such file, it cannot be read, its rows are not of the published schema, a message is there
        twice, none begins a tree, or messages answer each other in a circle.
    """
    files = [source]
    if source.is_dir():
        files = sorted(source.glob("data/*.parquet")) or sorted(source.glob("*_ready.messages.jsonl.gz"))
        if not files:
            raise PipelineError(
                f"{source} holds neither data/*.parquet nor *_ready.messages.jsonl.gz; name the file of messages."
            )
    raw = [placed for file in files for placed in _unfolded(file)]
    if not raw:
        raise PipelineError(f"{source} holds no messages; fetch it again.")
    messages: dict[str, dict[str, Any]] = {}
    for where, row in raw:
        message = validated(_Message, row, where, "OASST", "OASST2's schema").model_dump()
        name = message["message_id"]
        if name in messages:
            raise PipelineError(f"{where} repeats the message_id {name}; every message must be there once.")
        messages[name] = message
    _check_parents(messages, source)
    return list(messages.values())


def english_threads(messages: Sequence[dict[str, Any]]) -> list[Thread]:
    """All paths from a first prompt to a last reply in English, deleted messages and their replies left out.

    So are messages whose parent is not among them: what they answer is not known.

    Where replies to a prompt were ranked, only the best goes on; every prompt that follows it does.
    """
    children: defaultdict[str | None, list[dict[str, Any]]] = defaultdict(list)
    for message in messages:
        usable = message["lang"] == "en" and not message.get("deleted") and message["text"].strip()
        if usable and message["role"] in ROLES:
            children[message["parent_id"]].append(message)

    roots = sorted(children[None], key=lambda message: str(message["message_id"]), reverse=True)
    waiting: list[tuple[dict[str, Any], tuple[Message, ...]]] = [(r, ()) for r in roots if r["role"] == "prompter"]
    threads = []
    while waiting:
        message, path = waiting.pop()
        path = (*path, {"role": ROLES[message["role"]], "content": message["text"].strip()})
        replies = [reply for reply in children[message["message_id"]] if reply["role"] != message["role"]]
        if message["role"] == "prompter" and replies:
            replies = [min(replies, key=_rank)]
        # A prompt that nobody answered ends its path at the reply before it.
        replies = [reply for reply in replies if reply["role"] == "assistant" or children[reply["message_id"]]]
        if not replies and message["role"] == "assistant":
            threads.append(Thread(message["message_tree_id"], message["message_id"], path))
        following = sorted(replies, key=lambda reply: str(reply["message_id"]), reverse=True)
        waiting += [(reply, path) for reply in following]
    return threads


def assign_trees(threads: Sequence[Thread], fitting: Set[str], sizes: AllSizes, seed: int) -> dict[str, Split]:
    """Give every tree to one split, in the proportions of the wanted samples.

    Trees of ``fitting``, which have a reply short enough to be predicted, are dealt first and by themselves: a split
    with many trees of long replies only could not be filled.
    """
    trees = sorted({thread.tree for thread in threads})
    random.Random(seed).shuffle(trees)
    split_of: dict[str, Split] = {}
    for group in ([tree for tree in trees if tree in fitting], [tree for tree in trees if tree not in fitting]):
        held: dict[Split, int] = dict.fromkeys(SPLITS, 0)
        for tree in group:
            split = min(SPLITS, key=lambda split: held[split] / sizes.of(split))
            held[split] += 1
            split_of[tree] = split
    return split_of


class _Composer:
    """Puts other threads in front of one until the dialogue has the target length."""

    def __init__(self, params: Oasst, tokenizer: Any, end: int | None) -> None:
        self.params, self.tokenizer, self.end = params, tokenizer, end
        self.sizes: dict[str, int] = {}

    def compose(self, last: Thread, others: Sequence[Thread]) -> tuple[tuple[int, ...], int, list[Thread]] | None:
        """Token ids, prompt length and the threads in order; None where reply or dialogue do not fit."""
        if not self.fits(last):
            return None
        # Few threads seldom add up at the first try.
        for attempt in range(_ATTEMPTS):
            chosen = self._fill(last, others, random.Random(f"{self.params.seed} {last.leaf} {attempt}"))
            ids, prompt_len = self._encoded([*chosen, last])
            # Sizes of parts do not add up to the size of the whole, to a token here and there.
            while len(ids) > self.params.length and chosen:
                chosen.pop()
                ids, prompt_len = self._encoded([*chosen, last])
            if _SHORTEST * self.params.length <= len(ids) <= self.params.length:
                return ids, prompt_len, [*chosen, last]
        return None

    def _fill(self, last: Thread, others: Sequence[Thread], order: random.Random) -> list[Thread]:
        room = self.params.length - len(self._encoded([last])[0])
        chosen: list[Thread] = []
        taken = {last.tree}
        for thread in order.sample(others, min(_CANDIDATES, len(others))):
            if thread.tree not in taken and self._size(thread) <= room:
                chosen.append(thread)
                taken.add(thread.tree)
                room -= self._size(thread)
        return chosen

    def fits(self, last: Thread) -> bool:
        """Whether a thread and its last reply are short enough to end a dialogue."""
        ids, prompt_len = self._encoded([last])
        reply = len(ids) - prompt_len - (self.end is not None)
        return reply <= self.params.max_reply_tokens and len(ids) <= self.params.length

    def _encoded(self, threads: Sequence[Thread]) -> tuple[tuple[int, ...], int]:
        turns = [turn for thread in threads for turn in thread.turns]
        return encode_reply(self.tokenizer, turns[:-1], turns[-1]["content"], self.end)

    def _tokens(self, turns: Sequence[Message]) -> int:
        return len(encode(self.tokenizer, chat_prompt(self.tokenizer, turns)))

    def _size(self, thread: Thread) -> int:
        if thread.leaf not in self.sizes:
            # In front of another turn: what a template adds once per dialogue is no part of a thread.
            self.sizes[thread.leaf] = self._tokens([*thread.turns, _NEXT]) - self._tokens([_NEXT])
        return self.sizes[thread.leaf]


def _unfolded(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """The messages of a file as they are written, each with where it stands."""
    rows = [(f"{place}: row {n}", row) for n, (place, row) in enumerate(read_placed_rows(file))]
    raw = [(where, message) for where, row in rows for message in _unfold(row, where)]
    # Tools leave out what is null, so that single rows may lack any of them, but not a whole file.
    columns = [dict.fromkeys(column for _, message in raw for column in message)] if raw else []
    require_columns(columns, _COLUMNS, file, "OASST2's schema")
    return raw


def _unfold(row: dict[str, Any], where: str) -> Iterator[dict[str, Any]]:
    """The messages of a tree; a message is its own."""
    if is_null(row.get("prompt")):
        yield row
        return
    tree = validated(_Tree, row, where, "OASST", "OASST2's trees")
    # Nested messages name neither their tree nor, at the top, their parent.
    waiting = [tree.prompt | {"parent_id": None}]
    while waiting:
        message = waiting.pop()
        yield {name: value for name, value in message.items() if name != "replies"} | {
            "message_tree_id": tree.message_tree_id
        }
        replies = validated(_Replies, message, where, "OASST", "OASST2's trees").replies
        waiting += [reply | {"parent_id": message.get("message_id")} for reply in replies]


def _check_parents(messages: dict[str, dict[str, Any]], source: Path) -> None:
    if all(message["parent_id"] is not None for message in messages.values()):
        raise PipelineError(f"{source}: no message begins a tree; the first of each must have null as its parent_id.")
    sound: set[str] = set()
    for start in messages:
        path: dict[str, None] = {}
        name: str | None = start
        while name in messages and name not in sound:
            if name in path:
                raise PipelineError(
                    f"{source}: message {name} answers itself, by way of its parents; correct parent_id."
                )
            path[name] = None
            name = messages[name]["parent_id"]
        sound.update(path)


def _rank(message: dict[str, Any]) -> tuple[float, str]:
    rank = message.get("rank")
    return (float("inf") if rank is None else rank, str(message["message_id"]))
