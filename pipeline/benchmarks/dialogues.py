"""Doc2Dial: multi-turn dialogues over the passages they rest on, composed to a target length.

It reads NVIDIA's ChatRAG edition (documents.json and one list of rows, each a prefix of a dialogue) and
knows no wheel, model or benchmark. Splits share neither dialogues nor passages.
"""

import json
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pipeline.benchmarks.base import AllSizes, Making
from pipeline.benchmarks.base_dialogues import ComposedDialogues
from pipeline.errors import PipelineError
from pipeline.samples.rows import FilledText, RowModel, Text, WholeNumber, decoded, is_null, parsed, validated
from pipeline.samples.sample import SPLITS, Sample, Split
from pipeline.samples.template import encode_reply, end_of_turn

_IN_WHEEL = "lm_eval/tasks/chatrag_bench/dataset"
_ROWS = "nvidia_dragon_multiturn_retrieved.jsonl"
_COLUMNS = {"messages": "list", "answers": "list", "document": "str", "ctxs": "list", "ground_truth_ctx": "int"}
# A dialogue whose turns leave less room than this for its passages is not a dialogue over passages.
_MIN_PASSAGE_TOKENS = 64

Message = dict[str, str]


class _Passages(RowModel):
    passages: list[Text]


class _Turn(RowModel):
    role: Literal["user", "assistant"]
    content: Text


class _DialogueRow(RowModel):
    messages: list[_Turn]
    answers: list[FilledText]
    document: str
    ctxs: list[WholeNumber]
    ground_truth_ctx: WholeNumber


@dataclass(frozen=True)
class Dialogue:
    """One dialogue with its last reply held back.

    Attributes
    ----------
    number
        Row of the source file that holds the whole dialogue.
    domain
        Which passages it draws on: ssa, va, dmv or studentaid.
    turns
        Alternating messages, from the first user turn to the last one.
    reply
        The assistant's answer to the last turn.
    gold
        Indices of the passages it rests on, the last reply's own first.
    retrieved
        Indices of further passages a retriever found for the last turn.
    """

    number: int
    domain: str
    turns: tuple[Message, ...]
    reply: str
    gold: tuple[int, ...]
    retrieved: tuple[int, ...]


class Dialogues(ComposedDialogues):
    """A dialogue over its passages, and as many others of its domain as fill it."""

    too_few: ClassVar[str] = (
        "only {found} dialogues fit the {split} split, {wanted} are wanted; lower sizes, or change length or "
        "max_reply_tokens."
    )

    kind: Literal["dialogues"]

    def build(self, making: Making) -> dict[Split, list[Sample]]:
        """All samples, by split.

        Raises
        ------
        PipelineError
            The source is unusable, or there are too few dialogues.
        """
        documents, rows = read_documents(making.sources["source"])
        end = end_of_turn(making.model, making.tokenizer)
        dialogues = recover_dialogues(rows)
        split_of = assign_passages(documents, dialogues, self.sizes, self.seed)

        def compose(split: Split, _: Sequence[Dialogue], dialogue: Dialogue) -> Sample | None:
            passages = _passages(documents[dialogue.domain], dialogue, split, split_of, self.seed)
            return self._compose(making, split, dialogue, passages, end)

        return self.divided(making, dialogues, lambda d: split_of[documents[d.domain][d.gold[0]]], compose)

    def _compose(
        self,
        making: Making,
        split: Split,
        dialogue: Dialogue,
        passages: Sequence[tuple[int, str]],
        end: int | None,
    ) -> Sample | None:
        """A sample of about ``length`` tokens, None if reply or turns are too long or passages too few."""
        tokenizer = making.tokenizer

        def encoded(context: str) -> tuple[tuple[int, ...], int]:
            first = dialogue.turns[0] | {"content": f"{context}\n\n{dialogue.turns[0]['content']}"}
            return encode_reply(tokenizer, [first, *dialogue.turns[1:]], dialogue.reply, end)

        ids, prompt_len = encoded("")
        room = self.length - len(ids)
        if not 0 < len(ids) - prompt_len - (end is not None) <= self.max_reply_tokens or room < _MIN_PASSAGE_TOKENS:
            return None
        used: list[tuple[int, str]] = []
        for index, text in passages:
            offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            if len(offsets) + 2 <= room:
                used.append((index, text))
                room -= len(offsets) + 2
                continue
            # The last passage is cut behind the last whole word that fits.
            cut = text[: offsets[max(0, room - 2)][0]].rpartition(" ")[0]
            if cut:
                used.append((index, cut))
            room = 0
            break
        if room > self.length // 20:
            return None
        ids, prompt_len = encoded("\n\n".join(text for _, text in used))
        return Sample(
            sample_id=f"{dialogue.domain}-{split}-{dialogue.number:04d}",
            benchmark=making.name,
            task=dialogue.domain,
            split=split,
            input_ids=ids,
            prompt_len=prompt_len,
            meta=json.dumps({"row": dialogue.number, "passages": [index for index, _ in used]}, sort_keys=True),
            ask=("likelihood",) if split == "test" else (),
        )


def read_documents(root: Path) -> tuple[dict[str, list[str]], list[dict[str, Any]]]:
    """The passages by domain and the rows of the source.

    ``root`` is an unpacked nvidia-lm-eval wheel, or a directory with the two files.

    Raises
    ------
    PipelineError
        A file is missing, empty or no JSON, or a row lacks a column or points to a passage there is not.
    """
    directory = root / _IN_WHEEL if (root / _IN_WHEEL).is_dir() else root
    documents = _read_json(directory / "documents.json", dict)
    for domain, passages in documents.items():
        where = f"{directory / 'documents.json'}: {domain}"
        validated(_Passages, {"passages": passages}, where, "Doc2Dial", "NVIDIA's ChatRAG")
    rows = []
    for number, row in enumerate(_read_json(directory / _ROWS, list)):
        where = f"{directory / _ROWS}: row {number}"
        if not isinstance(row, dict):
            raise PipelineError(f"{where} is no JSON object; fetch it again.")
        for column, kind in _COLUMNS.items():
            if is_null(row.get(column)):
                raise PipelineError(f"{where} lacks the column {column} ({kind}).")
        checked = validated(_DialogueRow, row, where, "Doc2Dial", "NVIDIA's ChatRAG").model_dump()
        count = len(documents.get(checked["document"], []))
        indices = (checked["ground_truth_ctx"], *checked["ctxs"])
        if not checked["answers"] or not all(0 <= index < count for index in indices):
            raise PipelineError(f"{where} has no answer or names a passage that documents.json lacks; fix it.")
        rows.append(checked)
    return documents, rows


def recover_dialogues(rows: Sequence[dict[str, Any]]) -> list[Dialogue]:
    """Put the dialogues together again: the rows that are no proper prefix of another row."""
    by_prefix: dict[str, dict[str, Any]] = {_key(row["messages"]): row for row in rows}
    prefixes = {key for row in rows for key in _proper_prefixes(row["messages"])}
    dialogues = []
    for number, row in enumerate(rows):
        turns = _alternating(row["messages"])
        if _key(row["messages"]) in prefixes or not turns or turns[-1]["role"] != "user":
            continue
        earlier = [by_prefix[key] for key in _proper_prefixes(row["messages"]) if key in by_prefix]
        gold = dict.fromkeys([row["ground_truth_ctx"], *(r["ground_truth_ctx"] for r in reversed(earlier))])
        dialogues.append(
            Dialogue(number, row["document"], tuple(turns), row["answers"][0].strip(), tuple(gold), tuple(row["ctxs"]))
        )
    return dialogues


def assign_passages(
    documents: dict[str, list[str]], dialogues: Sequence[Dialogue], sizes: AllSizes, seed: int
) -> dict[str, Split]:
    """Give every passage (by its text) to one split, in the proportions of the wanted samples.

    Passages that one dialogue rests on go together, so that no dialogue lies between two splits.
    """
    parent = {text: text for passages in documents.values() for text in passages}

    def root(text: str) -> str:
        while parent[text] != text:
            parent[text] = parent[parent[text]]
            text = parent[text]
        return text

    for dialogue in dialogues:
        first, *others = (root(documents[dialogue.domain][index]) for index in dialogue.gold)
        for other in others:
            parent[root(other)] = root(first)
    weight: defaultdict[str, int] = defaultdict(int)
    for dialogue in dialogues:
        weight[root(documents[dialogue.domain][dialogue.gold[0]])] += 1
    groups = sorted({root(text) for text in parent})
    random.Random(seed).shuffle(groups)
    # Groups with dialogues are dealt by dialogues, the others, which only fill, by number.
    split_of_group: dict[str, Split] = {}
    for dealt in ([g for g in groups if weight[g]], [g for g in groups if not weight[g]]):
        held: dict[Split, int] = dict.fromkeys(SPLITS, 0)
        for group in dealt:
            split = min(SPLITS, key=lambda s: held[s] / sizes.of(s))
            held[split] += max(1, weight[group])
            split_of_group[group] = split
    return {text: split_of_group[root(text)] for text in parent}


def _passages(
    passages: Sequence[str], dialogue: Dialogue, split: Split, split_of: dict[str, Split], seed: int
) -> list[tuple[int, str]]:
    """Gold passages, then what the retriever found, then the rest of the domain; all of this split."""
    rest = [index for index, text in enumerate(passages) if split_of[text] == split]
    random.Random(f"{seed} {dialogue.number}").shuffle(rest)
    ordered = dict.fromkeys([*dialogue.gold, *dialogue.retrieved, *rest])
    return [(index, passages[index].strip()) for index in ordered if split_of[passages[index]] == split]


def _read_json(path: Path, kind: type) -> Any:
    try:
        value = parsed(decoded(path.read_bytes()))
    except FileNotFoundError:
        raise PipelineError(f"{path} does not exist; the source must be nvidia-lm-eval or hold that file.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise PipelineError(f"{path} is not valid JSON ({error}); fetch it again.") from None
    if not isinstance(value, kind) or not value:
        raise PipelineError(f"{path} holds no {kind.__name__} of Doc2Dial, or an empty one; fetch it again.")
    return value


def _alternating(messages: Sequence[Message]) -> list[Message]:
    turns: list[Message] = []
    for message in messages:
        if turns and turns[-1]["role"] == message["role"]:
            turns[-1] = turns[-1] | {"content": f"{turns[-1]['content']} {message['content']}"}
        elif turns or message["role"] == "user":
            turns.append({"role": message["role"], "content": message["content"]})
    return turns


def _proper_prefixes(messages: Sequence[Message]) -> Iterator[str]:
    return (_key(messages[:count]) for count in range(1, len(messages)))


def _key(messages: Sequence[Message]) -> str:
    return json.dumps(messages, sort_keys=True)
