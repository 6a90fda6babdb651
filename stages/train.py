"""Stage `train`: train one policy (all agents of a model) from traces."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from stages._app import CorpusOption, DeviceOption, ModelOption, check_device, limit_threads, progress, run


def main(
    model: ModelOption,
    corpus: CorpusOption,
    estimator: Annotated[Literal["exact", "rloo"], typer.Option(help="Gradient estimator.")],
    device: DeviceOption = "cpu",
    cache_gb: Annotated[float, typer.Option(envvar="KVP_CACHE_GB", min=0, help="Memory for decoded traces.")] = 3.0,
) -> None:
    """Train a policy for MODEL on CORPUS with ESTIMATOR into policies/MODEL/CORPUS/ESTIMATOR."""
    from pipeline.params import load_params
    from pipeline.policy.card import model_card
    from pipeline.policy.train import describe, train_policy
    from pipeline.traces.shards import TraceReader
    from pipeline.tracking import log_finished_training
    from pipeline.workdir import hash_manifest, publish, work_directory, write_text

    check_device(device)
    params = load_params()
    traces, out = Path("traces") / model / corpus, Path("policies") / model / corpus / estimator
    seen = hash_manifest(traces)
    identity = params.train.model_dump(mode="json") | {"estimator": estimator, "traces": seen}
    work = work_directory(f"train-{model}-{corpus}-{estimator}", identity, [])
    cache = int(cache_gb * 1e9)
    reader, validation = TraceReader(traces, "train", cache), TraceReader(traces, "validation", cache)
    config = describe(params.train, reader, estimator)
    config |= {"fingerprint": work.name, "trace_fingerprint": seen}
    limit_threads()
    with progress(f"train {model} {corpus} {estimator}", params.train.steps) as advance:
        train_policy(work, reader, validation, estimator, params.train, config, device, advance)
    write_text(work / "README.md", model_card(work))
    publish(work, out)
    log_finished_training(out)


if __name__ == "__main__":
    run(main)
