"""Command `traces`: hidden states and traces of longer sequences, which the pipeline's traces do not hold."""

from stages import _paths as stage_paths
from stages._app import DeviceOption, ModelOption, TrainedOnOption, check_device, limit_threads, progress
from studies import _paths


def traces(model: ModelOption, trained_on: TrainedOnOption, device: DeviceOption = "cpu") -> None:
    """Capture with MODEL what the study needs besides the traces of TRAINED_ON, into studies/traces/."""
    from pipeline.benchmarks.ruler import Ruler
    from pipeline.closure import Code
    from pipeline.evaluation.verdict import read_verdict, require_readable
    from pipeline.models.load import load_model
    from pipeline.params import load_params
    from pipeline.samples.sample import Sample, read_samples
    from pipeline.section import entry
    from pipeline.work import publish, work_directory
    from studies.sensitivity.capture import capture, count_sequences
    from studies.sensitivity.longer import longer_samples
    from studies.sensitivity.params import read_study

    check_device(device)
    params = load_params()
    study, dtype = read_study(params), entry(params.models, model, "models").dtype
    benchmark = entry(params.benchmarks, trained_on, "benchmarks").samples
    sources = params.benchmark_sources(trained_on)
    weights = stage_paths.model(model)
    files = {split: stage_paths.samples(model, trained_on, split) for split in ("train", "validation")}
    splits = {split: read_samples(path) for split, path in files.items()}
    identity = {
        "dtype": dtype,
        "traces": params.traces.model_dump(mode="json"),
        "study": study.model_dump(mode="json", include={"layers", "inputs", "longer"}),
        "benchmark": benchmark.model_dump(mode="json"),
        "sources": {role: source.model_dump(mode="json") for role, source in sources.items()},
    }
    code = Code(__file__, {"pipeline/benchmarks": ("ruler",)})
    work = work_directory(f"study-traces-{model}-{trained_on}", identity, [weights, *files.values()], code)
    limit_threads()
    longer: list[Sample] = []
    if trained_on in study.longer and isinstance(benchmark, Ruler):
        asked = study.longer[trained_on]
        longer = longer_samples(benchmark, asked, trained_on, weights, sources, splits["train"], work / "samples")
    verdict = read_verdict(stage_paths.check(model), model, dtype)
    for rows in (*splits.values(), longer):
        require_readable(verdict, rows)
    language_model = load_model(weights, dtype, device)
    with progress(f"study traces {model} {trained_on}", count_sequences(splits, longer, study)) as advance:
        capture(work / "out", language_model, model, trained_on, splits, longer, study, params.traces, advance)
    publish(work / "out", _paths.traces(model, trained_on))
