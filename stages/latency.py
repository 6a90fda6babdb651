"""Stage `latency` of studies/dvc.yaml: time rankings beside prefill and decode on this machine (figure 6)."""

from pathlib import Path

from stages._app import DeviceOption, ModelOption, check_device, limit_threads, progress, run


def main(model: ModelOption, device: DeviceOption = "cpu") -> None:
    """Time the ranking of MODEL's cache by its first policy into reports/latency/MODEL."""
    from pipeline.evaluation.latency import measure_latency
    from pipeline.evaluation.sweep import policy_directories
    from pipeline.models.load import load_model
    from pipeline.params import entry, load_params
    from pipeline.policy.agents import load_policy
    from pipeline.reporting import figures
    from pipeline.workdir import atomic_write, publish, work_directory

    check_device(device)
    params = load_params()
    dtype = entry(params.models, model, "models").dtype
    weights = Path("models") / model
    directory = next(iter(policy_directories(Path("policies") / model, params.matrix).values()))
    work = work_directory(f"latency-{model}", params.latency.model_dump(mode="json"), [weights, directory])
    policy = load_policy(directory, model)[0].to(device)
    limit_threads()
    language_model = load_model(weights, dtype, device)
    with progress(f"latency {model}", len(params.latency.lengths)) as advance:
        table = measure_latency(language_model, policy, params.latency.lengths, params.latency.repeats, advance)
    with atomic_write(work / "latency.parquet") as temporary:
        table.write_parquet(temporary)
    figures.save(figures.latency_drawing(table, model, device), work)
    publish(work, Path("reports/latency") / model)


if __name__ == "__main__":
    run(main)
