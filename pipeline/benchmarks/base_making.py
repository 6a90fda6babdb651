"""From a benchmark and a model to samples: sources fetched, and what the model could not read refused."""

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path

from pipeline.benchmarks.base import Benchmark, Making
from pipeline.errors import PipelineError
from pipeline.executor.units import LOCAL, Advance, Executor, unseen
from pipeline.models.layers import readable_tokens
from pipeline.samples.config import language_value, read_config
from pipeline.samples.sample import Sample, Split
from pipeline.sources.fetch import CACHE, fetch
from pipeline.sources.pins import SourceParams, record


def make_samples(
    benchmark: Benchmark,
    name: str,
    model: Path,
    sources: Mapping[str, SourceParams],
    work: Path,
    progress: Advance = unseen,
    executor: Executor = LOCAL,
    cache: Path = CACHE,
) -> tuple[dict[Split, list[Sample]], dict[str, dict[str, str]]]:
    """The samples of a benchmark by split, and the record of what they come from.

    The record also holds what the chat template was told, where that matters
    (:func:`pipeline.samples.template.template_settings`). Arguments as in :class:`Making`.

    Raises
    ------
    PipelineError
        A text is longer than the model's window, a source cannot be had or does not suffice, or the model's
        tokenizer or chat template is none that prompts can be made with.
    """
    from pipeline.models.tokenizer import load_tokenizer
    from pipeline.samples.template import template_settings

    key = f"benchmarks.{name}.samples"
    if benchmark.tokens is not None:
        check_window(model, key, benchmark.tokens)
    paths = {role: fetch(source, cache) for role, source in sources.items()}
    recorded = {role: record(source, paths[role]) for role, source in sources.items()}
    tokenizer = load_tokenizer(model)
    if benchmark.templated:
        if not tokenizer.chat_template and (model / "chat_template.json").is_file():
            raise PipelineError(
                f"{model}/chat_template.json holds a template that its tokenizer does not have; save it as "
                "chat_template.jinja, or remove it to read the model as a base model."
            )
        if settings := template_settings(tokenizer):
            recorded["chat_template"] = settings
    samples = benchmark.build(Making(name, paths, model, tokenizer, work, progress, executor))
    if benchmark.tokens is None:
        check_window(model, key, max(sample.longest_text for sample in itertools.chain(*samples.values())))
    _check_vocabulary(model, itertools.chain(*samples.values()))
    return samples, recorded


def check_window(model: Path, key: str, length: int) -> None:
    """Raise where a model was not made for ``length`` tokens: it would answer, and its numbers mean nothing."""
    path = model / "config.json"
    config = read_config(path)
    try:
        window = readable_tokens(lambda name: language_value(config, name))
    except ValueError as error:
        raise PipelineError(
            f"{path}: max_position_embeddings or n_positions, or its rope_parameters, are no numbers ({error}); "
            "correct them."
        ) from None
    if window is not None and length > window:
        raise PipelineError(
            f"{key}: length {length} is above the {window} tokens that {model} reads "
            "(max_position_embeddings in its config.json); shorten it or take a model that reads more."
        )


def _check_vocabulary(model: Path, samples: Iterable[Sample]) -> None:
    """Raise where the tokenizer knows tokens that the model does not: reading them would end a later stage."""
    size = language_value(read_config(model / "config.json"), "vocab_size")
    for sample in samples:
        largest = max(max(ids, default=0) for ids in (sample.input_ids, *sample.choices))
        if isinstance(size, int) and largest >= size:
            raise PipelineError(
                f"{model}: its tokenizer gives token {largest} in sample {sample.sample_id}, but vocab_size in its "
                f"config.json is {size}; take the tokenizer that belongs to the model."
            )
