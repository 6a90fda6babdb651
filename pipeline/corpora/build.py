"""From an entry of params.yaml to samples: one call for every kind of corpus. It knows none from inside."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from pipeline.corpora import choice, dialogues, longbench, oasst, ruler
from pipeline.errors import PipelineError
from pipeline.models.layers import readable_tokens
from pipeline.params import AnyCorpusParams, LongerParams, RulerParams
from pipeline.samples.chat import language_value, read_config, template_settings
from pipeline.samples.sample import SPLITS, Sample, Split
from pipeline.sources import CACHE, fetch, record

# How configurations call the number of tokens that a model was made for.


def build_samples(
    params: AnyCorpusParams,
    name: str,
    model: Path,
    work: Path,
    progress: Callable[[str], None] = lambda _: None,
    cache: Path = CACHE,
) -> tuple[dict[Split, list[Sample]], dict[str, dict[str, str]]]:
    """The samples of a corpus by split, and the record of the sources they come from.

    The record also holds what the chat template was told, where that matters
    (:func:`pipeline.samples.chat.template_settings`).

    Parameters
    ----------
    name
        Name of the corpus in params.yaml, which becomes the samples' ``corpus``.
    model
        Exported model directory; its tokenizer and chat template are used.
    work
        Directory for intermediate results that an interrupted run continues from.
    progress
        Called with a line for each finished piece, :func:`count_pieces` in all.

    Raises
    ------
    PipelineError
        The corpus is longer than the model's window, its source cannot be had or does not suffice, or the model's
        tokenizer or chat template is none that prompts can be made with.
    """
    from pipeline.models.load import load_tokenizer

    if params.kind != "choice":
        task_lengths = params.task_lengths if params.kind == "ruler" else {}
        _check_window(model, f"corpora.{name}", max([params.length, *task_lengths.values()]))
    source = fetch(params.source, cache)
    sources = {"source": record(params.source, source)}
    if params.kind != "choice":
        tokenizer = load_tokenizer(model)
        if not tokenizer.chat_template and (model / "chat_template.json").is_file():
            raise PipelineError(
                f"{model}/chat_template.json holds a template that its tokenizer does not have; save it as "
                "chat_template.jinja, or remove it to read the model as a base model."
            )
        if settings := template_settings(tokenizer):
            sources["chat_template"] = settings
    match params.kind:
        case "dialogues":
            samples = dialogues.build(params, name, source, model, progress)
        case "oasst":
            samples = oasst.build(params, name, source, model, progress)
        case "choice":
            samples = choice.build(params, name, source, model, progress)
        case "longbench":
            samples = longbench.build(params, name, source, model, progress)
        case "ruler":
            splitter = fetch(params.sentence_splitter, cache)
            sources["sentence_splitter"] = record(params.sentence_splitter, splitter)
            samples = ruler.build(params, name, source, splitter, model, work, progress)
    if params.kind == "choice":  # as long as its rows are
        longest = max(sample.longest_text for sample in samples["test"])
        _check_window(model, f"corpora.{name}", longest)
    _check_vocabulary(model, itertools.chain(*samples.values()))
    return samples, sources


def build_longer_samples(
    params: RulerParams,
    longer: LongerParams,
    name: str,
    model: Path,
    train: Sequence[Sample],
    work: Path,
    cache: Path = CACHE,
) -> list[Sample]:
    """Validation samples of a corpus at another length, which share nothing with its training samples ``train``."""
    _check_window(model, f"sensitivity.longer.{name}", longer.length)
    source, splitter = fetch(params.source, cache), fetch(params.sentence_splitter, cache)
    return ruler.build_longer(params, longer, name, source, splitter, model, train, work)


def _check_window(model: Path, key: str, length: int) -> None:
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


def count_pieces(params: AnyCorpusParams) -> int:
    """How often ``progress`` will be called for this corpus."""
    splits = len([split for split in SPLITS if getattr(params.samples, split, 0)])
    return splits * len(params.tasks) if params.kind in ("ruler", "longbench") else splits
