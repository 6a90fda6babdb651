"""Train the variants of the sensitivity study from stored traces. It knows no figures and no language model."""

import itertools
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import polars as pl

from pipeline.params import Inputs, SensitivityParams, TrainParams
from pipeline.policy.agents import load_policy
from pipeline.policy.train import CURVES_FILE, describe, train_policy, validation_cost
from pipeline.sensitivity.trace_sets import TraceSet
from pipeline.sensitivity.variants import BASE, Training, Variant, variants
from pipeline.traces.shards import TraceReader
from pipeline.workdir import atomic_write

COST_SCHEMA = {
    "corpus": pl.String,
    "length": pl.Int32,
    "step": pl.Int32,
    "layer": pl.Int32,
    "kv_head": pl.Int32,
    "cost": pl.Float32,
}
STUDY_COLUMNS = ("axis", "value", "seed", "model", "trained_on", "trained_length", *COST_SCHEMA)


def run_study(
    work: Path,
    trained: Sequence[TraceSet],
    longer: Mapping[str, TraceSet],
    train: TrainParams,
    sensitivity: SensitivityParams,
    cache_bytes: int,
    device: str,
    advance: Callable[[int, str], None],
) -> pl.DataFrame:
    """Train every variant on every corpus with every seed.

    Parameters
    ----------
    work
        Directory that survives an interruption: finished trainings in it are not made again. They are named by
        what decides them, so a value added to an axis trains only what is new.
    trained
        What is trained on, all of the same model.
    longer
        corpus -> longer sequences, on which those of its policies are evaluated that see other inputs or other
        positions than the base variant, and the base itself.
    cache_bytes
        Memory for decoded traces, for each corpus, length and split, and as much again with hidden states.
    advance
        Called with 1 and a short status after each of the :func:`count_trainings` trainings of a corpus, and
        with 0 during them.

    Returns
    -------
    pl.DataFrame
        The columns ``STUDY_COLUMNS``. ``cost`` is normalised (1 = best order), on the validation sequences of
        ``corpus`` that are made to ``length`` tokens, after ``step`` updates; steps before the last only where
        these are those of the training.

    Raises
    ------
    PipelineError
        Traces or hidden states are missing, damaged or too short, or lack one of the layers.
    """

    @cache
    def reader(source: TraceSet, split: str, inputs: Inputs) -> TraceReader:
        return source.reader(split, inputs, cache_bytes, sensitivity.layers)

    frames = []
    for source in trained:
        for seed in range(train.seed, train.seed + sensitivity.seeds):
            found = variants(train, sensitivity, seed)
            far = {v.training for v in found if v.axis == "inputs" or (v.axis, v.value) == BASE}
            finished: dict[Training, Path] = {}
            for training in unique_trainings(found):
                path = finished[training] = work / source.corpus / f"{training.fingerprint}.parquet"
                if not path.is_file():
                    # One reader, and so one memory, for all that sees the cache.
                    seen: Inputs = "hidden" if training.params.agent.inputs == "hidden" else "both"
                    chosen = reader(source, "train", seen)
                    if training.fraction < 1:
                        kept = subset(len(chosen.sequences), training.fraction, seed)
                        chosen = source.reader("train", seen, cache_bytes, sensitivity.layers, kept)
                    others = [other for other in trained if other != source]
                    if training in far and source.corpus in longer:
                        others.append(longer[source.corpus])
                    validations = {other: reader(other, "validation", seen) for other in (source, *others)}
                    costs = _train(path.with_suffix(""), training, source, chosen, validations, device, advance)
                    with atomic_write(path) as temporary:
                        costs.write_parquet(temporary)
                    shutil.rmtree(path.with_suffix(""))
                advance(1, f"{source.corpus}, seed {seed}")
            columns = {"seed": pl.lit(seed, pl.Int32), "model": pl.lit(reader(source, "train", "both").shape.model)}
            columns |= {"trained_on": pl.lit(source.corpus), "trained_length": pl.lit(source.length, pl.Int32)}
            frames += [
                pl.read_parquet(finished[variant.training]).with_columns(
                    **columns, axis=pl.lit(variant.axis), value=pl.lit(variant.value)
                )
                for variant in found
            ]
    return pl.concat(frames).select(STUDY_COLUMNS)


def count_trainings(train: TrainParams, sensitivity: SensitivityParams) -> int:
    """How many trainings :func:`run_study` makes for each corpus."""
    return sensitivity.seeds * len(unique_trainings(variants(train, sensitivity, train.seed)))


def unique_trainings(found: Sequence[Variant]) -> list[Training]:
    """The trainings behind variants, each once, in order."""
    return list(dict.fromkeys(variant.training for variant in found))


def subset(count: int, fraction: float, seed: int) -> list[int]:
    """Indices of ``fraction`` of ``count`` sequences, at least one; the subsets of one seed are nested."""
    shuffled = random.Random(f"{seed}/training sequences").sample(range(count), count)
    return sorted(shuffled[: max(1, round(fraction * count))])


def _train(
    directory: Path,
    training: Training,
    source: TraceSet,
    reader: TraceReader,
    validations: dict[TraceSet, TraceReader],
    device: str,
    advance: Callable[[int, str], None],
) -> pl.DataFrame:
    params, estimator = training.params, training.estimator
    directory.mkdir(parents=True, exist_ok=True)
    config = describe(params, reader, estimator)
    # Called at every step, so that Ctrl-C is heard within a training too.
    train_policy(
        directory,
        reader,
        validations[source],
        estimator,
        params,
        config,
        device,
        lambda _count, _status: advance(0, ""),
    )
    curves = pl.scan_parquet(directory / CURVES_FILE).filter(pl.col("metric") == "validation_cost")
    frames = [
        curves.select(
            pl.lit(source.corpus).alias("corpus"),
            pl.lit(source.length, pl.Int32).alias("length"),
            pl.col("step") + 1,
            "layer",
            "kv_head",
            pl.col("value").alias("cost"),
        ).collect()
    ]
    policy = load_policy(directory, hidden_states=True)[0].to(device)
    for other, validation in validations.items():
        if other != source:
            heads = list(itertools.product(validation.shape.layer_numbers, range(validation.shape.kv_heads)))
            rows = [
                (other.corpus, other.length, params.steps, *head, cost)
                for head, cost in zip(heads, validation_cost(policy, validation, device).tolist(), strict=True)
            ]
            frames.append(pl.DataFrame(rows, schema=COST_SCHEMA, orient="row"))
    return pl.concat(frames)
