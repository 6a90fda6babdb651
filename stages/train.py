"""Stage `train`: train one policy (all agents of a model) from traces."""

from typing import Annotated

import typer

from stages import _paths
from stages._app import DeviceOption, ExecutorOption, ModelOption, TrainedOnOption, WorkersOption, run, run_job


def main(
    model: ModelOption,
    trained_on: TrainedOnOption,
    estimator: Annotated[str, typer.Option(help="Name of an estimator in params.yaml.")],
    device: DeviceOption = "cpu",
    executor: ExecutorOption = "local",
    workers: WorkersOption = None,
    cache_gb: Annotated[
        float, typer.Option(envvar="KVP_CACHE_GB", min=0, help="Memory for decoded traces, per worker and split.")
    ] = 3.0,
) -> None:
    """Train a policy for MODEL on TRAINED_ON with ESTIMATOR into policies/MODEL/TRAINED_ON/ESTIMATOR."""
    from pipeline.closure import Code
    from pipeline.executor.units import Executor
    from pipeline.files import hash_manifest, remove, write_text
    from pipeline.policy.card import model_card
    from pipeline.policy.estimators.base import ESTIMATORS
    from pipeline.policy.job import TrainingJob
    from pipeline.policy.train import TrainParams, describe
    from pipeline.section import read
    from pipeline.traces.shards import ExampleReader
    from pipeline.tracking.trainings import log_finished_training
    from pipeline.work import publish, work_directory

    who = Executor(executor, workers)
    who.check(device)
    params, chosen = read("train", TrainParams), read(f"estimators.{estimator}", ESTIMATORS.load(estimator))
    traces, out = _paths.traces(model, trained_on), _paths.policy(model, trained_on, estimator)
    seen = hash_manifest(traces)
    identity = {"train": params, "estimator": chosen, "traces": seen}
    code = Code(__file__, {"pipeline/policy/estimators": (estimator,), "pipeline/policy/inputs": params.agent.inputs})
    work = work_directory(f"train-{model}-{trained_on}-{estimator}", identity, [], code)
    reader = ExampleReader(traces, "train", 0)
    config = describe(params, reader, chosen) | {"trace_fingerprint": seen}
    layers = reader.shape.layer_numbers
    job = TrainingJob(
        f"train {model} {trained_on} {estimator}", work, code, device, traces, layers, chosen, params,
        int(cache_gb * 1e9), config,
    )  # fmt: skip
    run_job(job, who)
    policy = job.gather()
    write_text(policy / "README.md", model_card(policy))
    publish(policy, out)
    remove(work)  # the units, which are whole now
    log_finished_training(out)


if __name__ == "__main__":
    run(main)
