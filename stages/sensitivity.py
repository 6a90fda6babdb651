"""Stage `sensitivity` of studies/dvc.yaml: train small variants of the policies into results/sensitivity.parquet."""

from pathlib import Path
from typing import Annotated

import typer

from stages._app import DeviceOption, check_device, limit_threads, progress, run


def main(
    device: DeviceOption = "cpu",
    cache_gb: Annotated[
        float,
        typer.Option(envvar="KVP_CACHE_GB", min=0, help="Memory for decoded traces, per corpus, length and split."),
    ] = 1.0,
) -> None:
    """Train every variant of the sensitivity study from the stored traces."""
    import polars as pl

    from pipeline.params import load_params
    from pipeline.sensitivity.study import count_trainings, run_study
    from pipeline.sensitivity.trace_sets import longer_sets, trace_sets
    from pipeline.workdir import atomic_write, hash_manifest, publish, work_directory

    check_device(device)
    params = load_params()
    train, sensitivity = params.train, params.sensitivity
    limit_threads()
    frames = []
    for model in params.matrix.model:
        extra = Path("study_traces") / model
        trained, longer = trace_sets(params, Path("traces") / model, extra), longer_sets(params, extra)
        upstream = [found.traces for found in (*trained, *longer.values())]
        if "hidden" in sensitivity.inputs:
            upstream += [found.hidden for found in (*trained, *longer.values())]
        lengths = {found.corpus: found.length for found in trained}
        identity = {"layers": sensitivity.layers, "lengths": lengths, "traces": list(map(hash_manifest, upstream))}
        work = work_directory(f"sensitivity-{model}", identity, [])
        total = len(trained) * count_trainings(train, sensitivity)
        with progress(f"sensitivity {model}", total) as advance:
            frames.append(run_study(work, trained, longer, train, sensitivity, int(cache_gb * 1e9), device, advance))
    out = work_directory("sensitivity", {"models": params.matrix.model}, []) / "sensitivity.parquet"
    with atomic_write(out) as temporary:
        pl.concat(frames).write_parquet(temporary)
    publish(out, Path("results/sensitivity.parquet"))


if __name__ == "__main__":
    run(main)
