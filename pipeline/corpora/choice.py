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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.corpora.chat import encode, first_token_after
from pipeline.corpora.rows import SUFFIXES, Row, read_rows
from pipeline.corpora.samples import Sample, Split
from pipeline.errors import PipelineError
from pipeline.params import ChoiceParams


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
    render
        A row in the harness's words; accepts the columns of ``repository`` and a plain form with ``choices``
        as a list and ``answer`` as an index.
    """

    repository: str
    files: tuple[str, ...]
    render: Callable[[Row], Question]
    metric: str = "accuracy"


def _boolq(row: Row) -> Question:
    passage = row["passage"]
    label = row["label"] if "label" in row else row["answer"]
    return Question(
        f"{passage}\nQuestion: {row['question']}?\nAnswer:", ("no", "yes"), int(label), late_from=len(passage)
    )


def _arc_challenge(row: Row) -> Question:
    choices = row["choices"]
    if isinstance(choices, dict):
        texts, gold = choices["text"], choices["label"].index(row["answerKey"])
    else:
        texts, gold = choices, row["answer"]
    return Question(f"Question: {row['question']}\nAnswer:", tuple(texts), gold)


def _mmlu(row: Row) -> Question:
    subject, letters = row["subject"], ("A", "B", "C", "D")
    listed = "".join(f"{letter}. {text}\n" for letter, text in zip(letters, row["choices"], strict=True))
    context = (
        f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        f"{row['question'].strip()}\n{listed}Answer:"
    )
    return Question(context, letters, row["answer"], subject)


def _hellaswag(row: Row) -> Question:
    if "ctx_a" in row:
        query = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        choices, gold = row["endings"], int(row["label"])
    else:
        # The plain form has lost the activity's label.
        query, choices, gold = row["question"], row["choices"], row["answer"]
    return Question(_without_brackets(query), tuple(map(_without_brackets, choices)), gold)


def _without_brackets(text: str) -> str:
    # Marks of the WikiHow part; the order of the steps matters.
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


TASKS = {
    "boolq": Task("aps/super_glue", ("boolq/validation", "data/validation", "validation"), _boolq),
    "arc_challenge": Task("allenai/ai2_arc", ("ARC-Challenge/test", "test"), _arc_challenge),
    "mmlu": Task("cais/mmlu", ("all/test", "*/test", "test"), _mmlu),
    "hellaswag": Task("Rowan/hellaswag", ("data/validation", "validation"), _hellaswag, "accuracy_norm"),
}


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
    definition = TASKS[task]
    questions = []
    for file in evaluated_files(task, source):
        for number, row in enumerate(read_rows(file)):
            try:
                question = definition.render(row)
            except KeyError as error:
                raise PipelineError(
                    f"{file}: row {number} lacks the column {error}; the source must have the columns of "
                    f"{definition.repository}, or question, choices and answer."
                ) from None
            except (AttributeError, TypeError, ValueError) as error:
                raise PipelineError(
                    f"{file}: row {number} is no row of {task} ({error}); correct or drop it."
                ) from None
            if not isinstance(question.gold, int) or not 0 <= question.gold < len(question.choices):
                raise PipelineError(f"{file}: row {number} has no right answer; use the split that {task} evaluates.")
            questions.append(question)
    return questions


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
    from pipeline.models import load_tokenizer

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
        prompt = encode(tokenizer, question.context.rstrip(), templated=False)
        choices = tuple(
            tuple(encode(tokenizer, f"{question.context} {choice}", templated=False)[len(prompt) :])
            for choice in question.choices
        )
        if not all(choices):
            raise PipelineError(f"corpora.{name}: row {index} has a choice without tokens of its own; drop the row.")
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
