"""Stage `sensitivity` of studies/dvc.yaml: train small variants of the policies into results/sensitivity.parquet."""

from pathlib import Path
from typing import Annotated

import typer

from stages._app import DeviceOption, check_device, limit_threads, progress, run


def main(
    device: DeviceOption = "cpu",
    cache_gb: Annotated[
        float, typer.Option(envvar="KVP_CACHE_GB", min=0, help="Memory for decoded traces, per corpus and split.")
    ] = 1.0,
) -> None:
    """Train every variant of the sensitivity study from the stored traces."""
    import polars as pl

    from pipeline.params import load_params
    from pipeline.sensitivity.study import count_trainings, run_study
    from pipeline.workdir import atomic_write, work_directory

    check_device(device)
    params = load_params()
    train, sensitivity = params.train, params.sensitivity
    limit_threads()
    frames = []
    for model in params.matrix.model:
        traces = {corpus: Path("traces") / model / corpus for corpus in params.matrix.corpus}
        work = work_directory(f"sensitivity-{model}", {"layers": sensitivity.layers}, list(traces.values()))
        total = len(traces) * count_trainings(train, sensitivity)
        with progress(f"sensitivity {model}", total) as advance:
            frames.append(run_study(work, traces, train, sensitivity, int(cache_gb * 1e9), device, advance))
    with atomic_write(Path("results/sensitivity.parquet")) as temporary:
        pl.concat(frames).write_parquet(temporary)


if __name__ == "__main__":
    run(main)
