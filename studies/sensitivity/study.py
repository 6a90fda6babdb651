"""Train the variants of the sensitivity study from stored traces. It knows no figures and no language model."""

import itertools
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import polars as pl

from pipeline.files import atomic_write
from pipeline.policy.agents import load_policy
from pipeline.policy.estimators.base import Estimator
from pipeline.policy.train import CURVES_FILE, TrainParams, describe, train_policy, validation_cost
from pipeline.traces.shards import ExampleReader
from studies.sensitivity.columns import BASE, COST_SCHEMA, STUDY_COLUMNS
from studies.sensitivity.params import StudySensitivity
from studies.sensitivity.trace_sets import TraceSet
from studies.sensitivity.variants import Training, Variant, variants


def run_study(
    work: Path,
    trained: Sequence[TraceSet],
    longer: Mapping[str, TraceSet],
    train: TrainParams,
    estimators: Mapping[str, Estimator],
    sensitivity: StudySensitivity,
    cache_bytes: int,
    device: str,
    advance: Callable[[int, str], None],
) -> pl.DataFrame:
    """Train every variant on every benchmark with every seed.

    Parameters
    ----------
    work
        Directory that survives an interruption: finished trainings in it are not made again. They are named by
        what decides them, so a value added to an axis trains only what is new.
    trained
        What is trained on, all of the same model.
    longer
        benchmark -> longer sequences, on which those of its policies are evaluated that see other inputs or other
        positions than the base variant, and the base itself.
    estimators
        All of params.yaml, by name.
    cache_bytes
        Memory for decoded traces, for each benchmark, length and split, and as much again with hidden states.
    advance
        Called with 1 and a short status after each of the :func:`count_trainings` trainings of a benchmark, and
        with 0 during them.

    Returns
    -------
    pl.DataFrame
        The columns ``STUDY_COLUMNS``. ``cost`` is normalised (1 = best order), on the validation sequences of
        ``benchmark`` that are made to ``length`` tokens, after ``step`` updates; steps before the last only where
        these are those of the training.

    Raises
    ------
    PipelineError
        Traces or hidden states are missing, damaged or too short, or lack one of the layers.
    """

    @cache
    def reader(source: TraceSet, split: str, hidden: bool) -> ExampleReader:
        return source.reader(split, hidden, cache_bytes, sensitivity.layers)

    frames = []
    for source in trained:
        for seed in range(train.seed, train.seed + sensitivity.seeds):
            found = variants(train, estimators, sensitivity, seed)
            far = {v.training for v in found if v.axis == "inputs" or (v.axis, v.value) == BASE}
            finished: dict[Training, Path] = {}
            for training in unique_trainings(found):
                path = finished[training] = work / source.benchmark / f"{training.fingerprint}.parquet"
                if not path.is_file():
                    # One reader, and so one memory, for all that sees the cache.
                    hidden = training.sees_hidden
                    chosen = reader(source, "train", hidden)
                    if training.fraction < 1:
                        kept = subset(chosen.sequences, training.fraction, seed)
                        chosen = source.reader("train", hidden, cache_bytes, sensitivity.layers, kept)
                    others = [other for other in trained if other != source]
                    if training in far and source.benchmark in longer:
                        others.append(longer[source.benchmark])
                    validations = {other: reader(other, "validation", hidden) for other in (source, *others)}
                    costs = _train(path.with_suffix(""), training, source, chosen, validations, device, advance)
                    with atomic_write(path) as temporary:
                        costs.write_parquet(temporary)
                    shutil.rmtree(path.with_suffix(""))
                advance(1, f"{source.benchmark}, seed {seed}")
            columns = {"seed": pl.lit(seed, pl.Int32), "model": pl.lit(reader(source, "train", False).shape.model)}
            columns |= {"trained_on": pl.lit(source.benchmark), "trained_length": pl.lit(source.length, pl.Int32)}
            frames += [
                pl.read_parquet(finished[variant.training]).with_columns(
                    **columns, axis=pl.lit(variant.axis), value=pl.lit(variant.value)
                )
                for variant in found
            ]
    return pl.concat(frames).select(STUDY_COLUMNS)


def count_trainings(train: TrainParams, estimators: Mapping[str, Estimator], sensitivity: StudySensitivity) -> int:
    """How many trainings :func:`run_study` makes for each benchmark."""
    return sensitivity.seeds * len(unique_trainings(variants(train, estimators, sensitivity, train.seed)))


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
    reader: ExampleReader,
    validations: dict[TraceSet, ExampleReader],
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
            pl.lit(source.benchmark).alias("benchmark"),
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
                (other.benchmark, other.length, params.steps, *head, cost)
                for head, cost in zip(heads, validation_cost(policy, validation, device).tolist(), strict=True)
            ]
            frames.append(pl.DataFrame(rows, schema=COST_SCHEMA, orient="row"))
    return pl.concat(frames)
