"""The generator's rows for splits that share nothing: no needle, variable, coded word or document.

The test split comes from the unmodified wheel with the seed of params.yaml and so equals what NVIDIA's prepare.py
writes; validation and train come from copies of the package whose data leave out whatever an earlier split has used.
"""

import hashlib
import json
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.files import temporary_name
from pipeline.ruler.generator import FirstDrawError, Host, generate
from pipeline.ruler.wheel import Task
from pipeline.samples.rows import Row
from pipeline.samples.sample import Split

# The order in which splits are made: each leaves out what the ones before it hold.
ORDER: tuple[Split, ...] = ("test", "validation", "train")
# The generator first tries this many words of an essay, so that each split must own at least as many.
_FIRST_ESSAY_WORDS = 500
# It first tries ten documents, and never fewer.
_FIRST_DOCUMENTS = 10
_MAX_ROUNDS = 8
_NEEDLE = re.compile(r"One of the special magic \w+ for (.+?) is: (.+?)\.")
_ASSIGNMENT = re.compile(r"VAR ([A-Z]+) = (?:VAR ([A-Z]+)|(\d+))")


@dataclass(frozen=True)
class Wanted:
    """What is asked of the generator: see :class:`pipeline.benchmarks.ruler.Ruler`. ``sizes`` are per task."""

    name: str
    tasks: tuple[str, ...]
    length: int
    task_lengths: Mapping[str, int]
    sizes: Mapping[Split, int]
    seed: int


def units(task: Task, text: str) -> frozenset[str]:
    """What two splits must not share: needle keys and values, variables, coded words, documents.

    The common word list of cwe and the repeated noise sentences are not among them.
    """
    if task.script == "qa":
        return frozenset(part for part in re.split(r"(?:^|\n\n)Document \d+:\n", _context(task, text)) if part)
    if task.script == "niah":
        return frozenset(part for needle in _NEEDLE.findall(text) for part in needle)
    if task.script == "variable_tracking":
        return frozenset(part for match in _ASSIGNMENT.findall(text) for part in match if part)
    if task.script == "freq_words_extraction":
        return frozenset(word for word in _context(task, text).split() if word.strip("."))
    return frozenset()


@dataclass(frozen=True)
class Plan:
    """What the tasks of one split have in common.

    ``taken`` are the units that it must not hold. ``essay_words``: the essays' first words, where the split has
    these and not its own portion.
    """

    wanted: Wanted
    split: Split
    taken: frozenset[str]
    wheel: Path
    model: Path
    essay_words: int | None = None

    def length(self, task: Task) -> int:
        """The generator's max_seq_length for a task."""
        return self.wanted.task_lengths.get(task.name, self.wanted.length)


def fresh_rows(plan: Plan, task: Task, tokenizer: Any, jobs: Host, scratch: Path) -> list[Row]:
    """The rows of one task and split, generated until none holds a taken unit.

    Parameters
    ----------
    tokenizer
        That of the plan's model.
    jobs
        As for :func:`pipeline.ruler.generator.generate`.
    scratch
        For directories of this call, which a failure leaves there.

    Raises
    ------
    PipelineError
        The task does not fit its length, or there are too few rows that the split may hold.
    """
    wanted: int = plan.wanted.sizes[plan.split]
    official = plan.split == "test"
    rows: list[Row] = []
    for attempt in range(1 if official else _MAX_ROUNDS):
        missing = wanted - len(rows)
        # Another worker, taken for dead, may be making the same rows.
        directory = temporary_name(scratch / f"{plan.split}-{task.name}-{attempt}")
        if official:
            package, seed, count = plan.wheel, plan.wanted.seed, wanted
        else:
            # A few more than wanted, for those that share a unit with another split.
            package, count = directory, missing + missing // 4 + 2
            seed = _seed(plan.wanted.seed, plan.split, task.name, attempt)
            _prepare(plan, task, tokenizer, package, seed, count)
        if task.script == "qa":
            _check_questions(plan, task, package, count)
        key = f"benchmarks.{plan.wanted.name}.samples.task_lengths"
        try:
            made = generate(
                task, package, plan.model, jobs, directory,
                length=plan.length(task), samples=count, seed=seed, official=official, key=key,
            )  # fmt: skip
        except FirstDrawError:
            # The test split fitted, so this is bad luck with the first documents drawn.
            if official or attempt == _MAX_ROUNDS - 1:
                raise
            made = []
        # A network disk keeps files that a script which is being killed has open.
        shutil.rmtree(directory, ignore_errors=True)
        fresh = [{**row, "seed": seed} for row in made if not units(task, row["input"]) & plan.taken]
        rows += fresh[:missing]
        if len(rows) == wanted:
            return rows
    raise PipelineError(
        f"benchmarks.{plan.wanted.name}: {wanted} {plan.split} samples of {task.name} that share nothing with the "
        f"other splits cannot be made; lower samples.sizes.{plan.split} or the task's length."
    )


def _prepare(plan: Plan, task: Task, tokenizer: Any, package: Path, seed: int, count: int) -> None:
    """Copy the generator's code into ``package`` with data that no earlier split has used."""
    wheel = plan.wheel
    shutil.copytree(wheel / "long_context_eval", package / "long_context_eval", ignore=shutil.ignore_patterns("json"))
    source = wheel / "long_context_eval/data/synthetic/json"
    target = package / "long_context_eval/data/synthetic/json"
    target.mkdir()
    if task.uses_essays:
        text = json.loads((source / "PaulGrahamEssays.json").read_text())["text"]
        if plan.essay_words is None:
            portion = _essay_portion(plan.wanted, plan.split, seed, text)
        else:
            portion = " ".join(_words(text)[: plan.essay_words])
        (target / "PaulGrahamEssays.json").write_text(json.dumps({"text": portion}))
    if task.script == "qa":
        name = f"{task.arguments[-1]}.json"
        data = json.loads((source / name).read_text())
        without = _squad_without if name == "squad.json" else _hotpot_without
        (target / name).write_text(json.dumps(without(data, plan, task, tokenizer, seed, count)))


def _essay_portion(wanted: Wanted, split: Split, seed: int, text: str) -> str:
    """The words a split may use: test owns the start of the essays, validation what follows, train the rest.

    The generator takes a prefix of what it is given. Every call on the train split therefore starts at
    a sentence of its own choice, so that its samples do not all share one haystack.
    """
    words, reach = _words(text), essay_reach(wanted)
    if len(words) < 3 * reach:
        raise PipelineError(
            f"benchmarks.{wanted.name}: the essays have {len(words)} words, too few for disjoint splits at this "
            f"length; lengths up to {len(words) // 3 - _FIRST_ESSAY_WORDS} are possible."
        )
    if split == "validation":
        return " ".join(words[reach : 2 * reach])
    latest = len(words) - reach
    start = random.Random(seed).randint(2 * reach, latest)
    while start < latest and not words[start - 1].endswith("."):
        start += 1
    return " ".join(words[start : start + reach])


def _words(text: str) -> list[str]:
    """As the generator cuts its essays."""
    return re.sub(r"\s+", " ", text).split(" ")


def essay_reach(wanted: Wanted) -> int:
    """Words of the essays that a split owns. A word is at least a token, so no haystack can be longer."""
    return max([wanted.length, *wanted.task_lengths.values()]) + _FIRST_ESSAY_WORDS


def _squad_without(
    data: dict[str, Any], plan: Plan, task: Task, tokenizer: Any, seed: int, count: int
) -> dict[str, Any]:
    """SQuAD without the taken paragraphs, its questions dealt one per article in turn.

    The generator asks the questions in file order, which would put all of a small split on one paragraph.
    It draws ten paragraphs of the question's article until they fit; questions of articles whose average
    paragraphs do not would keep it busy for ever.
    """
    generator = random.Random(seed)
    articles = [[p for p in article["paragraphs"] if p["context"] not in plan.taken] for article in data["data"]]
    articles = [paragraphs for paragraphs in articles if paragraphs]
    generator.shuffle(articles)

    def tokens(text: str) -> int:
        return len(tokenizer.tokenize(text))

    room = plan.length(task) - task.tokens_to_generate - tokens(task.template + task.answer_prefix)
    questions = []
    for paragraphs in articles:
        sizes = [tokens(f"Document 10:\n{p['context']}\n\n") for p in paragraphs]
        others = (_FIRST_DOCUMENTS - 1) * sum(sizes) / len(sizes)
        asked = [
            (p["context"], qa)
            for p, size in zip(paragraphs, sizes, strict=True)
            for qa in p["qas"]
            if not qa["is_impossible"] and size + others + tokens(qa["question"]) <= room
        ]
        questions.append(generator.sample(asked, len(asked)))
    dealt: list[dict[str, Any]] = []
    for turn in range(max(len(asked) for asked in questions)):
        for paragraphs, asked in zip(articles, questions, strict=True):
            if turn < len(asked) and len(dealt) < count:
                context, qa = asked[turn]
                blank = [{"context": p["context"], "qas": [qa] if p["context"] == context else []} for p in paragraphs]
                dealt.append({"paragraphs": blank})
    return {"data": dealt}


def _hotpot_without(
    data: list[dict[str, Any]], plan: Plan, task: Task, tokenizer: Any, seed: int, count: int
) -> list[dict[str, Any]]:
    """HotpotQA without the rows that hold a taken paragraph, in seeded order, those that fit first.

    Each question brings its own ten documents. One whose documents exceed the length would keep the
    generator busy for ever.
    """
    rows = [row for row in data if not any(_hotpot_document(*part) in plan.taken for part in row["context"])]
    random.Random(seed).shuffle(rows)
    room = plan.length(task) - task.tokens_to_generate
    fitting: list[dict[str, Any]] = []
    for place, row in enumerate(rows):
        context = "\n\n".join(f"Document 10:\n{_hotpot_document(*part)}" for part in row["context"])
        text = (task.template + task.answer_prefix).format(context=context, query=row["question"])
        # The generator shuffles the documents, which may change a token or two where they meet.
        if len(tokenizer.tokenize(text)) <= room - len(row["context"]):
            fitting.append(row)
        if len(fitting) == count:
            return fitting + rows[place + 1 :]
    return fitting


def _hotpot_document(title: str, sentences: list[str]) -> str:
    return f"{title}\n{''.join(sentences)}"


def _check_questions(plan: Plan, task: Task, package: Path, count: int) -> None:
    # Past its last question the generator would loop forever.
    name = f"{task.arguments[-1]}.json"
    data = json.loads((package / "long_context_eval/data/synthetic/json" / name).read_text())
    if name == "squad.json":
        data = [qa for a in data["data"] for p in a["paragraphs"] for qa in p["qas"] if not qa["is_impossible"]]
    if len(data) < count:
        raise PipelineError(
            f"benchmarks.{plan.wanted.name}: {task.name} has {len(data)} questions left for {plan.split}, {count} are "
            f"needed; lower samples.sizes.{plan.split}."
        )


def _context(task: Task, text: str) -> str:
    before, after = (part.split("{")[0] for part in task.template.split("{context}"))
    return text[text.index(before) + len(before) : text.rindex(after)]


def _seed(seed: int, split: str, task: str, attempt: int) -> int:
    # Its own stream for each call: with one seed for all, every task would hide the same needles.
    digest = hashlib.sha256(f"{seed} {split} {task} {attempt}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % 2**31
