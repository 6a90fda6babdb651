"""Stage `train`: train one policy (all agents of a model) from traces."""

from typing import Annotated

import typer

from stages import _paths
from stages._app import DeviceOption, ModelOption, TrainedOnOption, check_device, limit_threads, progress, run


def main(
    model: ModelOption,
    trained_on: TrainedOnOption,
    estimator: Annotated[str, typer.Option(help="Name of an estimator in params.yaml.")],
    device: DeviceOption = "cpu",
    cache_gb: Annotated[float, typer.Option(envvar="KVP_CACHE_GB", min=0, help="Memory for decoded traces.")] = 3.0,
) -> None:
    """Train a policy for MODEL on TRAINED_ON with ESTIMATOR into policies/MODEL/TRAINED_ON/ESTIMATOR."""
    from pipeline.closure import Code
    from pipeline.files import hash_manifest, write_text
    from pipeline.policy.card import model_card
    from pipeline.policy.estimators.base import ESTIMATORS
    from pipeline.policy.train import TrainParams, describe, train_policy
    from pipeline.section import read
    from pipeline.traces.shards import ExampleReader
    from pipeline.tracking.trainings import log_finished_training
    from pipeline.work import publish, work_directory

    check_device(device)
    params, chosen = read("train", TrainParams), read(f"estimators.{estimator}", ESTIMATORS.load(estimator))
    traces, out = _paths.traces(model, trained_on), _paths.policy(model, trained_on, estimator)
    seen = hash_manifest(traces)
    identity = {"train": params.model_dump(mode="json"), "estimator": chosen.model_dump(mode="json"), "traces": seen}
    code = Code(__file__, {"pipeline/policy/estimators": (estimator,), "pipeline/policy/inputs": params.agent.inputs})
    work = work_directory(f"train-{model}-{trained_on}-{estimator}", identity, [], code)
    cache = int(cache_gb * 1e9)
    reader, validation = ExampleReader(traces, "train", cache), ExampleReader(traces, "validation", cache)
    config = describe(params, reader, chosen) | {"trace_fingerprint": seen}
    limit_threads()
    with progress(f"train {model} {trained_on} {estimator}", params.steps) as advance:
        train_policy(work, reader, validation, chosen, params, config, device, advance)
    write_text(work / "README.md", model_card(work))
    publish(work, out)
    log_finished_training(out)


if __name__ == "__main__":
    run(main)
