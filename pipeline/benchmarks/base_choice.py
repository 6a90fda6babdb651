"""What multiple choices share: the prompts, the splits and the tokenisation of the EleutherAI harness.

They are those of lm-eval 0.4.13 without examples. A choice follows its context after a space; both are encoded as one
text without a chat template and cut where the context alone ends (``_encode_pair`` in ``api/model.py``).
"""

import itertools
import json
import random
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator

from pipeline.benchmarks.base import Answer, Benchmark, EvaluationSize, Making
from pipeline.errors import PipelineError
from pipeline.metrics import most_likely
from pipeline.samples.rows import SUFFIXES, FilledText, Row, RowModel, Text, WholeNumber, read_placed_rows, validated
from pipeline.samples.sample import Sample, Split
from pipeline.samples.text import encode_choices, first_token_after

LETTERS = tuple("ABCDEFGHIJ")


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


def place(value: Any) -> Any:
    """Index of a choice from its letter; other values as they are."""
    return ord(value) - ord("A") if isinstance(value, str) and value in LETTERS else value


class PlainRow(RowModel):
    """A question of any data set."""

    question: FilledText
    choices: list[Text]
    answer: Annotated[WholeNumber, BeforeValidator(place)]


class MultipleChoice(Benchmark):
    """Questions with choices, for evaluation only.

    ``late_question`` puts the question behind the compressed context.
    """

    templated: ClassVar[bool] = False
    repository: ClassVar[str]
    """The data set on the hub."""
    files: ClassVar[tuple[str, ...]]
    """Its evaluated split, as the start of file names; the first pattern that matches is taken."""
    normalised: ClassVar[bool] = False
    """Whether log-likelihoods are divided by the characters of their choice."""
    form: ClassVar[type[RowModel]] = PlainRow
    """What every row must hold, where :meth:`columns` does not tell rows apart."""

    late_question: bool
    sizes: EvaluationSize

    @classmethod
    def columns(cls, row: Row) -> type[RowModel]:
        """What a row must hold: the columns of ``repository``, or a plain form.

        That has ``choices`` as a list and ``answer`` as an index counted from 0 or as the choice's letter.
        """
        return cls.form

    @classmethod
    @abstractmethod
    def render(cls, row: Row) -> Question:
        """A row that holds it in the harness's words."""

    @classmethod
    def read_rows(cls, source: Path) -> Iterator[tuple[Row, Question]]:
        """All rows of a source, in its order, every value as what it stands for, and the questions they ask.

        ``source`` is a ``.parquet``, ``.jsonl`` or ``.jsonl.gz`` file, or a directory laid out like the hub's
        repository.

        Raises
        ------
        PipelineError
            There is no such file, it cannot be read, or a row lacks a column or a right answer.
        """
        kind = cls.__module__.rpartition(".")[2]
        schema = f"{cls.repository}, or question, choices and answer"
        for file in cls._evaluated_files(source):
            for number, (place, raw) in enumerate(read_placed_rows(file)):
                where = f"{place}: row {number}"
                row = validated(cls.columns(raw), raw, where, kind, schema).model_dump()
                question = cls.render(row)
                if not question.context.strip() or not 0 <= question.gold < len(question.choices):
                    raise PipelineError(f"{where} has no right answer; use the split that {kind} evaluates.")
                yield row, question

    @classmethod
    def _evaluated_files(cls, source: Path) -> list[Path]:
        if source.is_file():
            return [source]
        for start in cls.files:
            if found := sorted(file for file in source.glob(f"{start}*") if file.name.endswith(SUFFIXES)):
                return found
        raise PipelineError(
            f"{source} holds none of {', '.join(f'{start}*' for start in cls.files)}; name the file of the evaluated "
            f"split, or lay the directory out like {cls.repository}."
        )

    def build(self, making: Making) -> dict[Split, list[Sample]]:
        """All samples: test only.

        Where the data set has subjects, they are the samples' ``task``, and each gives as many samples as the others,
        to one.

        Raises
        ------
        PipelineError
            The source is unusable or too small, or there is nothing before the question that a late question could
            come after.
        """
        questions = [question for _, question in self.read_rows(making.sources["source"])]
        wanted = self.sizes.test
        if wanted > len(questions):
            raise PipelineError(
                f"benchmarks.{making.name}: the source has {len(questions)} rows, {wanted} are wanted; lower "
                "sizes.test."
            )
        drawn = _draw(questions, wanted, self.seed)
        samples = [self._sample(making, index, questions[index]) for index in drawn]
        making.progress(1, "test")
        return {"test": samples}

    def score(self, sample: Sample, answer: Answer) -> dict[str, float]:
        """Accuracy as the harness counts it."""
        if sample.gold is None:
            raise PipelineError(f"Sample {sample.sample_id} has no right choice; build the samples again.")
        lengths = [len(choice) for choice in sample.answers]
        if len(answer.nll) != len(lengths):
            raise PipelineError(
                f"{len(lengths)} choices have {len(answer.nll)} likelihoods, choice {sample.gold} is right; build the "
                "samples again."
            )
        if self.normalised:
            return {"accuracy_norm": most_likely(answer.nll, sample.gold, lengths)}
        return {"accuracy": most_likely(answer.nll, sample.gold)}

    def _sample(self, making: Making, index: int, question: Question) -> Sample:
        where, tokenizer = f"benchmarks.{making.name}: row {index}", making.tokenizer
        start = None
        if self.late_question:
            if question.late_from is None:
                raise PipelineError(
                    f"benchmarks.{making.name}: {self.kind} has no text before its question; set late_question to "
                    "false."
                )
            start = first_token_after(tokenizer, question.context.rstrip(), question.late_from, templated=False)
        prompt, choices = encode_choices(tokenizer, question.context, question.choices, where)
        return Sample(
            sample_id=f"test-{index:05d}",
            benchmark=making.name,
            task=question.subject or making.name,
            split="test",
            input_ids=(*prompt, *choices[question.gold]),
            prompt_len=len(prompt),
            question_start=start,
            answers=question.choices,
            meta=json.dumps({"row": index}),
            ask=("choice",),
            choices=choices,
            gold=question.gold,
        )


def _draw(questions: Sequence[Question], count: int, seed: int) -> list[int]:
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
