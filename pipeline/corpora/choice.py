"""BoolQ, ARC-Challenge, MMLU and HellaSwag with the prompts and the tokenisation of the EleutherAI harness.

Prompts, choices and splits are those of lm-eval 0.4.13 without examples: ``tasks/super_glue/boolq``,
``tasks/arc``, ``tasks/mmlu/default`` and ``tasks/hellaswag``. A choice follows its context after a space; both
are encoded as one text without a chat template and cut where the context alone ends (``_encode_pair`` in
``api/model.py``). It knows no model but its tokenizer, and no metric but its name.
"""

import itertools
import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from pipeline.errors import PipelineError
from pipeline.params import ChoiceParams
from pipeline.samples.chat import encode_choices, first_token_after
from pipeline.samples.rows import (
    SUFFIXES,
    FilledText,
    Identifier,
    Row,
    RowModel,
    Text,
    WholeNumber,
    flag,
    is_null,
    read_placed_rows,
    validated,
)
from pipeline.samples.sample import Sample, Split

_LETTERS = tuple("ABCDEFGHIJ")
_WORDS = {"yes": True, "no": False}


@dataclass(frozen=True)
class Question:
    """One row in the harness's words.

    Attributes
    ----------
    context
        Everything before a choice.
    choices, gold
        The choices without the space before them, and which of them is right.
    subject
        What the row is about, where the data set is divided into subjects.
    late_from
        Character of ``context`` at which the question begins, where another text stands before it.
    """

    context: str
    choices: tuple[str, ...]
    gold: int
    subject: str | None = None
    late_from: int | None = None


@dataclass(frozen=True)
class Task:
    """What the harness's YAML file of a task says.

    Attributes
    ----------
    repository
        The data set on the hub.
    files
        Its evaluated split, as the start of file names; the first pattern that matches is taken.
    columns
        What a row must hold: the columns of ``repository``, or a plain form with ``choices`` as a list and
        ``answer`` as an index counted from 0 or as the choice's letter.
    render
        A row that holds it in the harness's words.
    """

    repository: str
    files: tuple[str, ...]
    columns: Callable[[Row], type[RowModel]]
    render: Callable[[Row], Question]
    metric: str = "accuracy"


def _zero_or_one(value: Any) -> Any:
    """0 or 1 for every spelling of a truth value; other values as they are."""
    truth = _WORDS.get(value.lower(), flag(value)) if isinstance(value, str) else flag(value)
    return int(truth) if isinstance(truth, bool) else value


class _BoolqRow(RowModel):
    """``label`` or ``answer``, a truth value or 0 and 1."""

    question: FilledText
    passage: FilledText
    answer: Annotated[WholeNumber, BeforeValidator(_zero_or_one)]

    @model_validator(mode="before")
    @classmethod
    def _either_name(cls, row: Row) -> Row:
        named = [row[name] for name in ("label", "answer") if not is_null(row.get(name))]
        if len(named) == 2 and _zero_or_one(named[0]) != _zero_or_one(named[1]):
            raise ValueError("its label and its answer differ")
        return row | {"answer": named[0]} if named else row


class _ArcChoices(RowModel):
    text: list[Text]
    label: list[Identifier]

    @model_validator(mode="after")
    def _one_label_each(self) -> "_ArcChoices":
        if len(self.text) != len(self.label) or len(set(self.label)) != len(self.label):
            raise ValueError("every choice should have one text and one label of its own")
        return self


class _ArcRow(RowModel):
    question: FilledText
    choices: _ArcChoices
    answerKey: Identifier

    @model_validator(mode="before")
    @classmethod
    def _from_structures(cls, row: Row) -> Row:
        # Databases turn a structure of two lists into a list of structures.
        choices = row.get("choices")
        if isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices):
            return row | {"choices": {name: [choice.get(name) for choice in choices] for name in ("text", "label")}}
        return row

    @model_validator(mode="after")
    def _labelled(self) -> "_ArcRow":
        if self.answerKey not in self.choices.label:
            raise ValueError(f"answerKey {self.answerKey} is none of the labels {', '.join(self.choices.label)}")
        return self


def _place(value: Any) -> Any:
    """Index of a choice from its letter; other values as they are."""
    return ord(value) - ord("A") if isinstance(value, str) and value in _LETTERS else value


def _unambiguous(value: Any) -> Any:
    # ARC's own labels are numbers from 1 in some rows: "2" may be the second choice or the third.
    if isinstance(value, str) and value not in _LETTERS:
        raise ValueError("it should be a number counted from 0, or a letter; numbers as text may be labels from 1")
    return value


class _PlainRow(RowModel):
    question: FilledText
    choices: list[Text]
    answer: Annotated[WholeNumber, BeforeValidator(_place)]


class _PlainArcRow(_PlainRow):
    answer: Annotated[WholeNumber, BeforeValidator(_place), BeforeValidator(_unambiguous)]


class _MmluRow(RowModel):
    subject: FilledText
    question: FilledText
    choices: Annotated[list[Text], Field(min_length=4, max_length=4)]
    answer: Annotated[WholeNumber, BeforeValidator(_place)]


class _HellaswagRow(RowModel):
    activity_label: Text
    ctx_a: Text
    ctx_b: Text
    endings: list[Text]
    label: WholeNumber

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_empty(cls, row: Row) -> Row:
        # Half of the rows have an empty ctx_b, which spreadsheets and pandas read as no value.
        return row | {"ctx_b": ""} if "ctx_b" in row and is_null(row["ctx_b"]) else row


def _boolq(row: Row) -> Question:
    passage = row["passage"]
    return Question(
        f"{passage}\nQuestion: {row['question']}?\nAnswer:", ("no", "yes"), row["answer"], late_from=len(passage)
    )


def _arc_challenge(row: Row) -> Question:
    choices = row["choices"]
    if isinstance(choices, dict):
        texts, gold = choices["text"], choices["label"].index(row["answerKey"])
    else:
        texts, gold = choices, row["answer"]
    return Question(f"Question: {row['question']}\nAnswer:", tuple(texts), gold)


def _mmlu(row: Row) -> Question:
    subject = row["subject"]
    listed = "".join(f"{letter}. {text}\n" for letter, text in zip(_LETTERS[:4], row["choices"], strict=True))
    context = (
        f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        f"{row['question'].strip()}\n{listed}Answer:"
    )
    return Question(context, _LETTERS[:4], row["answer"], subject)


def _hellaswag(row: Row) -> Question:
    if "ctx_a" in row:
        query = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        choices, gold = row["endings"], row["label"]
    else:
        # The plain form has lost the activity's label.
        query, choices, gold = row["question"], row["choices"], row["answer"]
    return Question(_without_brackets(query), tuple(map(_without_brackets, choices)), gold)


def _without_brackets(text: str) -> str:
    # Marks of the WikiHow part; the order of the steps matters.
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


TASKS = {
    "boolq": Task("aps/super_glue", ("boolq/validation", "data/validation", "validation"), lambda _: _BoolqRow, _boolq),
    "arc_challenge": Task(
        "allenai/ai2_arc",
        ("ARC-Challenge/test", "test"),
        lambda row: _ArcRow if _is_structured(row.get("choices")) else _PlainArcRow,
        _arc_challenge,
    ),
    "mmlu": Task("cais/mmlu", ("all/test", "*/test", "test"), lambda _: _MmluRow, _mmlu),
    "hellaswag": Task(
        "Rowan/hellaswag",
        ("data/validation", "validation"),
        lambda row: _PlainRow if is_null(row.get("ctx_a")) else _HellaswagRow,
        _hellaswag,
        "accuracy_norm",
    ),
}


def _is_structured(choices: Any) -> bool:
    return isinstance(choices, dict) or (isinstance(choices, list) and any(isinstance(c, dict) for c in choices))


def evaluated_files(task: str, source: Path) -> list[Path]:
    """The files of the split that ``task`` evaluates, in order; arguments as in :func:`read_questions`.

    Raises
    ------
    PipelineError
        The directory holds no such file.
    """
    if source.is_file():
        return [source]
    starts = TASKS[task].files
    for start in starts:
        if found := sorted(file for file in source.glob(f"{start}*") if file.name.endswith(SUFFIXES)):
            return found
    raise PipelineError(
        f"{source} holds none of {', '.join(f'{start}*' for start in starts)}; name the file of the evaluated "
        f"split, or lay the directory out like {TASKS[task].repository}."
    )


def read_questions(task: str, source: Path) -> list[Question]:
    """All questions of a source, in its order.

    Parameters
    ----------
    task
        A key of ``TASKS``.
    source
        A ``.parquet``, ``.jsonl`` or ``.jsonl.gz`` file, or a directory laid out like the hub's repository.

    Raises
    ------
    PipelineError
        There is no such file, it cannot be read, or a row lacks a column or a right answer.
    """
    return [question for _, question in _questions(task, source)]


def read_choice_rows(task: str, source: Path) -> list[Row]:
    """The rows behind :func:`read_questions`, every value as what it stands for; arguments and errors as there."""
    return [row for row, _ in _questions(task, source)]


def _questions(task: str, source: Path) -> Iterator[tuple[Row, Question]]:
    definition = TASKS[task]
    schema = f"{definition.repository}, or question, choices and answer"
    for file in evaluated_files(task, source):
        for number, (place, raw) in enumerate(read_placed_rows(file)):
            where = f"{place}: row {number}"
            row = validated(definition.columns(raw), raw, where, task, schema).model_dump()
            question = definition.render(row)
            if not question.context.strip() or not 0 <= question.gold < len(question.choices):
                raise PipelineError(f"{where} has no right answer; use the split that {task} evaluates.")
            yield row, question


def build(
    params: ChoiceParams, name: str, source: Path, model: Path, progress: Callable[[str], None] = lambda _: None
) -> dict[Split, list[Sample]]:
    """All samples of the corpus: test only.

    Parameters
    ----------
    name
        Name of the corpus in params.yaml. Where the data set has subjects, they are the samples' ``task``, and
        each gives as many samples as the others, to one.
    source
        See :func:`read_questions`.
    model
        Exported model directory with the tokenizer.
    progress
        Called with a line when the split is finished.

    Raises
    ------
    PipelineError
        The source is unusable or too small, or there is nothing before the question that a late question
        could come after.
    """
    from pipeline.models.load import load_tokenizer

    tokenizer = load_tokenizer(model)
    questions = read_questions(params.task, source)
    wanted = params.samples.test
    if wanted > len(questions):
        raise PipelineError(
            f"corpora.{name}: the source has {len(questions)} rows, {wanted} are wanted; lower samples.test."
        )
    samples = []
    for index in _draw(questions, wanted, params.seed):
        question = questions[index]
        if params.late_question and question.late_from is None:
            raise PipelineError(
                f"corpora.{name}: {params.task} has no text before its question; set late_question to false."
            )
        where = f"corpora.{name}: row {index}"
        prompt, choices = encode_choices(tokenizer, question.context, question.choices, where)
        late = question.late_from if params.late_question else None
        samples.append(
            Sample(
                sample_id=f"test-{index:05d}",
                corpus=name,
                task=question.subject or name,
                split="test",
                input_ids=(*prompt, *choices[question.gold]),
                prompt_len=len(prompt),
                question_start=None
                if late is None
                else first_token_after(tokenizer, question.context.rstrip(), late, templated=False),
                answers=question.choices,
                max_new_tokens=0,
                meta=json.dumps({"row": index}),
                metric=TASKS[params.task].metric,
                choices=choices,
                gold=question.gold,
            )
        )
    progress("test")
    return {"test": samples}


def _draw(questions: list[Question], count: int, seed: int) -> list[int]:
    """Places of ``count`` questions, subject by subject in turn."""
    by_subject: defaultdict[str, list[int]] = defaultdict(list)
    for index, question in enumerate(questions):
        by_subject[question.subject or ""].append(index)
    generator = random.Random(seed)
    subjects = sorted(by_subject)
    generator.shuffle(subjects)
    for subject in subjects:
        generator.shuffle(by_subject[subject])
    rounds = itertools.zip_longest(*(by_subject[subject] for subject in subjects))
    return [index for turn in rounds for index in turn if index is not None][:count]
