"""Command `train`: small variants of the policies, trained from stored traces."""

from typing import Annotated

import typer

from stages import _paths as stage_paths
from stages._app import DeviceOption, check_device, limit_threads, progress
from studies import _paths


def train(
    device: DeviceOption = "cpu",
    cache_gb: Annotated[
        float,
        typer.Option(envvar="KVP_CACHE_GB", min=0, help="Memory for decoded traces, per benchmark, length and split."),
    ] = 1.0,
) -> None:
    """Train every variant of the study from the stored traces into studies/results/sensitivity.parquet."""
    import polars as pl

    from pipeline.closure import Code
    from pipeline.files import atomic_write, hash_manifest
    from pipeline.params import load_params
    from pipeline.work import publish, work_directory
    from studies.sensitivity.params import read_study
    from studies.sensitivity.study import count_trainings, run_study
    from studies.sensitivity.trace_sets import longer_sets, trace_sets

    check_device(device)
    params = load_params()
    study, estimators = read_study(params), params.estimators
    limit_threads()
    code = Code(__file__, {"pipeline/policy/estimators": tuple(estimators)})
    frames = []
    for model in params.matrix.model:
        extra = _paths.traces(model)
        trained, longer = trace_sets(params, stage_paths.traces(model), extra), longer_sets(study, extra)
        upstream = [found.traces for found in (*trained, *longer.values())]
        if "hidden" in study.inputs:
            upstream += [found.hidden for found in (*trained, *longer.values())]
        lengths = {found.benchmark: found.length for found in trained}
        identity = {"layers": study.layers, "lengths": lengths, "traces": list(map(hash_manifest, upstream))}
        work = work_directory(f"sensitivity-{model}", identity, [], code)
        total = len(trained) * count_trainings(params.train, estimators, study)
        with progress(f"sensitivity {model}", total) as advance:
            cache = int(cache_gb * 1e9)
            frames.append(run_study(work, trained, longer, params.train, estimators, study, cache, device, advance))
    out = work_directory("sensitivity", {"models": params.matrix.model}, [], code) / "sensitivity.parquet"
    with atomic_write(out) as temporary:
        pl.concat(frames).write_parquet(temporary)
    publish(out, _paths.SENSITIVITY)
