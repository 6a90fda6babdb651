"""LongBench's English tasks: rows to prompts as its own ``pred.py`` makes them, for evaluation only.

Templates, lengths of answers and metrics are those of github.com/THUDM/LongBench (``dataset2prompt.json``,
``dataset2maxlen.json``, ``eval.py``); a task is one line of the table. A prompt that is too long loses its
middle; chat models get it as a user's turn except where LongBench gives it as plain text. It knows no
model but its tokenizer. Not followed: ``pred.py`` also ends a SAMSum summary at the first newline, which
changes no score, because only its first line counts.
"""

import json
import random
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.benchmarks.base import Answer, Benchmark, EvaluationSize, Making, SampleGroup
from pipeline.errors import PipelineError
from pipeline.metrics import classification, code_similarity, count, qa_f1, retrieval, rouge_l
from pipeline.samples.rows import FilledText, Row, RowModel, Text, is_null, read_placed_rows, validated
from pipeline.samples.sample import Sample, Split
from pipeline.samples.template import chat_prompt, end_of_turn, reply_gap
from pipeline.samples.text import encode, encode_pair, first_token_after
from pipeline.section import PositiveInt


@dataclass(frozen=True)
class Task:
    """One line of LongBench's configuration.

    Attributes
    ----------
    template
        With ``{context}`` and, after it, perhaps ``{input}``.
    max_new_tokens
        Tokens that the answer may have.
    metric
        A metric of ``pipeline/metrics.py``.
    chat
        Whether the prompt goes through the chat template.
    """

    template: str
    max_new_tokens: int
    metric: str
    chat: bool = True


# Only the first line of these texts counts: a model goes on with a further example.
FIRST_LINE_TASKS = ("trec", "triviaqa", "samsum")
_METRICS = {metric.__name__: metric for metric in (rouge_l, qa_f1, retrieval, count, code_similarity)}

_PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n"
    "\nThe following are given passages.\n{context}\n\n"
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n"
    "\nQuestion: {input}\nAnswer:"
)

TASKS = {
    "narrativeqa": Task(
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
        "asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\n"
        "Story: {context}\n\n"
        "Now, answer the question based on the story asconcisely as you can, using a single phrase if possible. Do "
        "not provide any explanation.\n\nQuestion: {input}\n\nAnswer:",
        128,
        "qa_f1",
    ),
    "qasper": Task(
        "You are given a scientific article and a question. Answer the question as concisely as you can, using a "
        "single phrase or sentence if possible. If the question cannot be answered based on the information in the "
        'article, write "unanswerable". If the question is a yes/no question, answer "yes", "no", or '
        '"unanswerable". Do not provide any explanation.\n\nArticle: {context}\n\n'
        " Answer the question based on the above article as concisely as you can, using a single phrase or "
        "sentence if possible. If the question cannot be answered based on the information in the article, write "
        '"unanswerable". If the question is a yes/no question, answer "yes", "no", or "unanswerable". Do '
        "not provide any explanation.\n\nQuestion: {input}\n\nAnswer:",
        128,
        "qa_f1",
    ),
    "multifieldqa_en": Task(
        "Read the following text and answer briefly.\n\n{context}\n\n"
        "Now, answer the following question based on the above text, only give me the answer and do not output any "
        "other words.\n\nQuestion: {input}\nAnswer:",
        64,
        "qa_f1",
    ),
    "hotpotqa": Task(_PASSAGES, 32, "qa_f1"),
    "2wikimqa": Task(_PASSAGES, 32, "qa_f1"),
    "musique": Task(_PASSAGES, 32, "qa_f1"),
    "gov_report": Task(
        "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n"
        "{context}\n\nNow, write a one-page summary of the report.\n\nSummary:",
        512,
        "rouge_l",
    ),
    "qmsum": Task(
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in "
        "one or more sentences.\n\nTranscript:\n{context}\n\n"
        "Now, answer the query based on the above meeting transcript in one or more sentences.\n\nQuery: {input}\n"
        "Answer:",
        512,
        "rouge_l",
    ),
    "multi_news": Task(
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\n"
        "Now, write a one-page summary of all the news.\n\nSummary:",
        512,
        "rouge_l",
    ),
    "trec": Task(
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}",
        64,
        "classification",
        chat=False,
    ),
    "triviaqa": Task(
        "Answer the question based on the given passage. Only give me the answer and do not output any other "
        "words. The following are some examples.\n\n{context}\n\n{input}",
        32,
        "qa_f1",
        chat=False,
    ),
    "samsum": Task(
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}",
        128,
        "rouge_l",
        chat=False,
    ),
    "passage_count": Task(
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully "
        "read these paragraphs and determine how many unique paragraphs there are after removing duplicates. In "
        "other words, how many non-repeating paragraphs are there in total?\n\n{context}\n\n"
        "Please enter the final count of unique paragraphs after removing duplicates. The output format should "
        "only contain the number, such as 1, 2, 3, and so on.\n\nThe final answer is: ",
        32,
        "count",
    ),
    "passage_retrieval_en": Task(
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the "
        "abstract is from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\n"
        "Please enter the number of the paragraph that the abstract is from. The answer format must be like "
        '"Paragraph 1", "Paragraph 2", etc.\n\nThe answer is: ',
        32,
        "retrieval",
    ),
    "lcc": Task(
        "Please complete the code given below. \n{context}Next line of code:\n",
        64,
        "code_similarity",
        chat=False,
    ),
    "repobench-p": Task(
        "Please complete the code given below. \n{context}{input}Next line of code:\n",
        64,
        "code_similarity",
        chat=False,
    ),
}


@dataclass(frozen=True)
class Document:
    """One row of a task.

    Attributes
    ----------
    prompt
        The filled template.
    late_from
        Character of ``prompt`` behind the context; None where a ready-made prompt does not show it.
    answers
        References; the first is the true continuation.
    classes
        All class names of a classification, else None.
    """

    prompt: str
    late_from: int | None
    answers: tuple[str, ...]
    classes: tuple[str, ...] | None


class LongBench(Benchmark):
    """LongBench's English tasks, ``sizes.test`` rows of each.

    Prompts longer than ``length`` tokens lose their middle, as in LongBench's own code. No text is longer than
    ``max_new_tokens``, whatever LongBench allows its task. ``late_question`` puts the question behind the compressed
    context.
    """

    assumed: ClassVar[str] = "prompts and answers are as long as they may be"

    kind: Literal["longbench"]
    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    length: PositiveInt
    max_new_tokens: PositiveInt
    late_question: bool
    sizes: EvaluationSize

    @field_validator("tasks")
    @classmethod
    def _known_tasks(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        for task in tasks:
            if task not in TASKS:
                raise ValueError(f"'{task}' is no task of LongBench; known: {', '.join(TASKS)}")
        if len(set(tasks)) < len(tasks):
            raise ValueError("a task is named twice")
        return tasks

    @property
    def tokens(self) -> int:
        """Where prompts are cut."""
        return self.length

    @property
    def tasks_of(self) -> tuple[str, ...]:
        """LongBench's own names."""
        return self.tasks

    def pieces(self) -> int:
        """Tasks."""
        return len(self.tasks)

    def expected(self) -> list[SampleGroup]:
        """Every prompt is cut, every text and answer as long as may be."""
        return [self._group(self.length, self.max_new_tokens, self.max_new_tokens)]

    def build(self, making: Making) -> dict[Split, list[Sample]]:
        """All samples: test only.

        Raises
        ------
        PipelineError
            The source is unusable or too small, or a late question cannot be told apart.
        """
        end = end_of_turn(making.model, making.tokenizer)
        samples = []
        for task in self.tasks:
            documents = read_documents(task, making.sources["source"])
            wanted = self.sizes.test
            if wanted > len(documents):
                raise PipelineError(
                    f"benchmarks.{making.name}: the source has {len(documents)} rows of {task}, {wanted} are wanted; "
                    "lower sizes.test or use a larger source."
                )
            for index in random.Random(f"{self.seed} {task}").sample(range(len(documents)), wanted):
                samples.append(self._sample(making, task, index, documents[index], end))
            making.progress(1, task)
        return {"test": samples}

    def score(self, sample: Sample, answer: Answer) -> dict[str, float]:
        """The metric that LongBench gives the task; the best score over all references."""
        if sample.task not in TASKS or not sample.answers:
            raise PipelineError(
                f"Sample {sample.sample_id} is of no task of LongBench or has no answers; build the samples again."
            )
        metric, text = TASKS[sample.task].metric, answer.text or ""
        if sample.task in FIRST_LINE_TASKS:
            text = text.lstrip("\n").split("\n")[0]
        if metric == "classification":
            classes = json.loads(sample.meta).get("all_classes")
            if not classes:
                raise PipelineError(
                    f"classification needs the classes of '{sample.task}'; its rows must carry all_classes."
                )
            scores = [classification(text, reference, classes) for reference in sample.answers]
        else:
            scores = [_METRICS[metric](text, reference) for reference in sample.answers]
        return {metric: max(scores)}

    def _sample(self, making: Making, task: str, index: int, document: Document, end: int | None) -> Sample:
        definition, tokenizer = TASKS[task], making.tokenizer
        where = f"benchmarks.{making.name}: row {index} of {task}"
        chat = definition.chat and bool(tokenizer.chat_template)
        shortened = _without_middle(tokenizer, document.prompt, self.length)
        try:
            text = chat_prompt(tokenizer, [{"role": "user", "content": shortened}]) if chat else shortened
        except PipelineError as error:
            raise PipelineError(f"{where}: {error}") from None
        space = "" if shortened[-1:].isspace() else " "
        answer = f"{reply_gap(tokenizer) if chat else space}{document.answers[0]}"
        ids, prompt_len = encode_pair(tokenizer, text, answer, end if chat else None, templated=chat)
        return Sample(
            sample_id=f"{task}-{index:04d}",
            benchmark=making.name,
            task=task,
            split="test",
            input_ids=ids,
            prompt_len=prompt_len,
            question_start=first_token_after(tokenizer, text, _late_from(document, shortened, text, where), chat)
            if self.late_question
            else None,
            answers=document.answers,
            max_new_tokens=min(self.max_new_tokens, definition.max_new_tokens),
            meta=json.dumps({"row": index, "all_classes": document.classes}),
            ask=("text",),
        )


def read_documents(task: str, source: Path) -> list[Document]:
    """All rows of one task, in the source's order.

    Parameters
    ----------
    task
        A key of ``TASKS``.
    source
        The hub's ``data.zip``, a directory that holds it, a directory with ``<task>.jsonl`` or
        ``data/<task>.jsonl``, or one file of rows that name their task in ``dataset`` or ``task``. Rows have
        LongBench's columns, or a ready-made ``prompt`` in place of ``context`` and ``input``.

    Raises
    ------
    PipelineError
        There is no such file, it cannot be read, or a row lacks a column or an answer.
    """
    file, mixed = _locate(task, source)
    rows = read_placed_rows(file)
    if mixed:
        rows = [(place, row) for place, row in rows if _task_of(row, place) == task]
    return [_document(task, row, f"{place}: row {number} of {task}") for number, (place, row) in enumerate(rows)]


def _locate(task: str, source: Path) -> tuple[Path | zipfile.Path, bool]:
    """The file that holds a task, and whether it holds others too."""
    archive = source if source.suffix == ".zip" else source / "data.zip"
    if source.is_file() and source != archive:
        return source, True
    for file in (source / f"{task}.jsonl", source / f"data/{task}.jsonl"):
        if file.is_file():
            return file, False
    if zipfile.is_zipfile(archive):
        member = zipfile.Path(archive, f"data/{task}.jsonl")
        if member.is_file():
            return member, False
    raise PipelineError(
        f"{source} holds neither {task}.jsonl nor data/{task}.jsonl, not in a readable data.zip either; name the file "
        "or lay the directory out like THUDM/LongBench."
    )


class _Columns(RowModel):
    answers: Annotated[list[Text], Field(min_length=1)]
    all_classes: list[FilledText] | None = None

    @model_validator(mode="before")
    @classmethod
    def _unnested(cls, row: Row) -> Row:
        # Some editions put the classes beside the answers.
        return row | row["answers"] if isinstance(row.get("answers"), dict) else row


class _PublishedRow(_Columns):
    context: FilledText
    input: Text


class _ReadyRow(_Columns):
    prompt: FilledText


_SENTENCES = dict.fromkeys(("context", "input", "prompt"), ": context, input and prompt must be text") | {
    "answers": " has no answers as a list of strings"
}


def _task_of(row: Row, place: str) -> Any:
    named = next((row[name] for name in ("task", "dataset") if not is_null(row.get(name))), None)
    if named is None:
        raise PipelineError(f"{place}: this row names no task, in neither task nor dataset; name it, or drop the row.")
    return named


def _document(task: str, row: Row, where: str) -> Document:
    template = TASKS[task].template
    # Where tables of both kinds were joined, one kind's columns are null in the other's rows.
    ready_made = "prompt" in row and (not is_null(row["prompt"]) or "context" not in row)
    if not ready_made and "{input}" not in template and is_null(row.get("input")):
        row = row | {"input": ""}
    expected = (where, "LongBench", "LongBench: context, input, answers and all_classes", _SENTENCES)
    checked: _ReadyRow | _PublishedRow
    if ready_made:
        checked = validated(_ReadyRow, row, *expected)
        prompt = checked.prompt
        late_from = _question_in(prompt, task)
    else:
        checked = validated(_PublishedRow, row, *expected)
        before, after = template.split("{context}")
        question = after.format(input=checked.input)
        prompt = f"{before}{checked.context}{question}"
        late_from = len(prompt) - len(question)
    classes = tuple(checked.all_classes) if checked.all_classes else None
    if TASKS[task].metric == "classification" and not classes:
        raise PipelineError(f"{where} has no all_classes; a classification needs them.")
    return Document(prompt, late_from, tuple(checked.answers), classes)


def _question_in(prompt: str, task: str) -> int | None:
    """Where the template's words behind the context begin in a ready-made prompt, if it has any."""
    words = TASKS[task].template.partition("{context}")[2].partition("{input}")[0]
    found = prompt.rfind(words) if words.strip() else -1
    return None if found < 0 else found


def _without_middle(tokenizer: Any, prompt: str, length: int) -> str:
    """The prompt, or the text of its first and last ``length // 2`` tokens where it has more than ``length``."""
    ids = encode(tokenizer, prompt, templated=False)
    if len(ids) <= length:
        return prompt
    half = length // 2
    head, tail = (
        tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for part in (ids[:half], ids[len(ids) - half :])
    )
    return f"{head}{tail}"


def _late_from(document: Document, shortened: str, text: str, where: str) -> int:
    """Character of ``text`` at which the question begins."""
    if document.late_from is None:
        raise PipelineError(
            f"{where}: the end of the context cannot be told from this ready-made prompt; give context and input as "
            "columns, or set late_question to false."
        )
    question = document.prompt[document.late_from :]
    if not shortened.endswith(question):
        raise PipelineError(f"{where}: half of length does not hold its question; raise length.")
    # A chat template may strip what it wraps.
    core = shortened.strip()
    return text.rindex(core) + len(core) - len(question.rstrip())
