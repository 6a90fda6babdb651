"""Train the variants of the sensitivity study from stored traces. It knows no figures and no language model."""

import itertools
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import polars as pl

from pipeline.params import SensitivityParams, TrainParams
from pipeline.policy.agents import load_policy
from pipeline.policy.train import CURVES_FILE, describe, train_policy, validation_cost
from pipeline.sensitivity.variants import Training, Variant, variants
from pipeline.traces.shards import TraceReader
from pipeline.workdir import atomic_write

COST_SCHEMA = {"corpus": pl.String, "step": pl.Int32, "layer": pl.Int32, "kv_head": pl.Int32, "cost": pl.Float32}
STUDY_COLUMNS = ("axis", "value", "seed", "model", "trained_on", *COST_SCHEMA)


def run_study(
    work: Path,
    traces: dict[str, Path],
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
    traces
        corpus -> trace directory, all of the same model.
    cache_bytes
        Memory for decoded traces, for each corpus and split.
    advance
        Called with 1 and a short status after each of the :func:`count_trainings` trainings of a corpus, and
        with 0 during them.

    Returns
    -------
    pl.DataFrame
        The columns ``STUDY_COLUMNS``. ``cost`` is normalised (1 = best order), on the validation sequences of
        ``corpus``, after ``step`` updates; steps before the last only where corpus is trained_on.

    Raises
    ------
    PipelineError
        Traces are missing, damaged or too short, or lack one of the layers.
    """

    def reader(corpus: str, split: str, sequences: Sequence[int] | None = None) -> TraceReader:
        return TraceReader(traces[corpus], split, cache_bytes, sensitivity.layers, sequences)

    validations = {corpus: reader(corpus, "validation") for corpus in traces}
    frames = []
    for corpus in traces:
        everything = reader(corpus, "train")
        for seed in range(train.seed, train.seed + sensitivity.seeds):
            found = variants(train, sensitivity, seed)
            trained: dict[Training, pl.DataFrame] = {}
            for training in unique_trainings(found):
                finished = work / corpus / f"{training.fingerprint}.parquet"
                if not finished.is_file():
                    chosen = everything
                    if training.fraction < 1:
                        chosen = reader(corpus, "train", subset(len(everything.sequences), training.fraction, seed))
                    costs = _train(finished.with_suffix(""), training, corpus, chosen, validations, device, advance)
                    with atomic_write(finished) as temporary:
                        costs.write_parquet(temporary)
                    shutil.rmtree(finished.with_suffix(""))
                trained[training] = pl.read_parquet(finished)
                advance(1, f"{corpus}, seed {seed}")
            columns = {"seed": pl.lit(seed, pl.Int32), "model": pl.lit(everything.shape.model)}
            columns |= {"trained_on": pl.lit(corpus)}
            frames += [
                trained[variant.training].with_columns(
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
    corpus: str,
    reader: TraceReader,
    validations: dict[str, TraceReader],
    device: str,
    advance: Callable[[int, str], None],
) -> pl.DataFrame:
    params, estimator, own = training.params, training.estimator, validations[corpus]
    directory.mkdir(parents=True, exist_ok=True)
    config = describe(params, reader, estimator)
    # Called at every step, so that Ctrl-C is heard within a training too.
    train_policy(directory, reader, own, estimator, params, config, device, lambda _count, _status: advance(0, ""))
    curves = pl.scan_parquet(directory / CURVES_FILE).filter(pl.col("metric") == "validation_cost")
    frames = [
        curves.select(
            pl.lit(corpus).alias("corpus"), pl.col("step") + 1, "layer", "kv_head", pl.col("value").alias("cost")
        ).collect()
    ]
    policy = load_policy(directory)[0].to(device)
    for other, validation in validations.items():
        if other != corpus:
            heads = list(itertools.product(validation.shape.layer_numbers, range(validation.shape.kv_heads)))
            rows = [
                (other, params.steps, *head, cost)
                for head, cost in zip(heads, validation_cost(policy, validation, device).tolist(), strict=True)
            ]
            frames.append(pl.DataFrame(rows, schema=COST_SCHEMA, orient="row"))
    return pl.concat(frames)
