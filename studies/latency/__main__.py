"""Time rankings beside prefill and decode on this machine (figure 6).

``make studies STUDY=latency`` runs it for every model of the matrix; ``python -m studies.latency --model MODEL``, from
the repository root, for one.
"""

from stages import _paths as stage_paths
from stages._app import DeviceOption, ModelOption, check_device, limit_threads, progress, run
from studies import _paths


def main(model: ModelOption, device: DeviceOption = "cpu") -> None:
    """Time the ranking of MODEL's cache by its first policy into studies/reports/latency/MODEL."""
    from pipeline.closure import Code
    from pipeline.files import atomic_write
    from pipeline.models.load import load_model
    from pipeline.models.params import read_dtype
    from pipeline.policy.agents import load_policy
    from pipeline.reporting.drawing import save
    from pipeline.section import Names, read
    from pipeline.work import publish, work_directory
    from studies.latency.figures import latency_drawing
    from studies.latency.measure import measure_latency
    from studies.latency.params import StudyLatency

    check_device(device)
    params = read("latency", StudyLatency, _paths.PARAMS)
    dtype = read_dtype(model)
    trained_on, estimators = read("matrix.trained_on", Names), read("matrix.estimator", Names)
    weights, directory = stage_paths.model(model), stage_paths.policy(model, trained_on[0], estimators[0])
    identity = params.model_dump(mode="json") | {"dtype": dtype}
    work = work_directory(f"latency-{model}", identity, [weights, directory], Code(__file__))
    policy = load_policy(directory, model)[0].to(device)
    limit_threads()
    language_model = load_model(weights, dtype, device)
    with progress(f"latency {model}", len(params.lengths)) as advance:
        table = measure_latency(language_model, policy, params.lengths, params.repeats, advance)
    with atomic_write(work / "latency.parquet") as temporary:
        table.write_parquet(temporary)
    save(latency_drawing(table, model, device), work)
    publish(work, _paths.report("latency", model))


if __name__ == "__main__":
    run(main)
