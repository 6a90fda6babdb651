"""Compare the uncompressed model's multiple choice with lm-eval's own numbers. It is no stage of DVC.

``python -m studies.harness --model MODEL`` runs it, from the repository root, once the model stage has run.
"""

from pathlib import Path
from typing import Annotated

import typer

from stages import _paths
from stages._app import DeviceOption, ModelOption, check_device, limit_threads, progress, run


def main(
    model: ModelOption,
    params_file: Annotated[Path, typer.Option("--params", help="The params file.")] = Path("params.yaml"),
    rows: Annotated[int | None, typer.Option(min=1, help="Rows per benchmark in place of sizes.test.")] = None,
    device: DeviceOption = "cpu",
) -> None:
    """Run lm-eval and the sweep's uncompressed model on the same rows of every multiple choice of the matrix."""
    import tempfile

    import torch

    from pipeline.benchmarks.base import EvaluationSize, Making
    from pipeline.benchmarks.base_choice import MultipleChoice
    from pipeline.errors import PipelineError
    from pipeline.models.load import load_model
    from pipeline.models.tokenizer import load_tokenizer
    from pipeline.params import load_params
    from pipeline.section import entry
    from pipeline.sources.fetch import fetch
    from studies.harness.compare import DEFINITIONS, TOLERANCE, compare, harness_answers, own_answers

    params = load_params(params_file)
    check_device(device)
    limit_threads()
    dtype, weights = entry(params.models, model, "models").dtype, _paths.model(model)
    language_model, tokenizer = load_model(weights, dtype, device), load_tokenizer(weights)
    columns = "{:<16}{:>6}{:>10}{:>10}{:>14}{:>14}{:>18}{:>14}"
    titles = ("rows", "lm-eval", "ours", "same tokens", "same outcome", "same likelihoods", "largest diff")
    typer.echo(columns.format("benchmark", *titles))
    complete = []
    for name in params.matrix.benchmark:
        benchmark = params.benchmarks[name].samples
        if not isinstance(benchmark, MultipleChoice) or benchmark.kind not in DEFINITIONS:
            continue
        if rows is not None:
            benchmark = benchmark.model_copy(update={"sizes": EvaluationSize(test=rows)})
        source = fetch(params.benchmark_sources(name)["source"])
        with tempfile.TemporaryDirectory() as directory:
            scratch = Path(directory)
            making = Making(name, {"source": source}, weights, tokenizer, scratch / "samples")
            samples = benchmark.build(making)["test"]
            with progress(f"harness {name}", len(samples)) as advance:
                ours = own_answers(benchmark, samples, language_model, tokenizer, params.evaluation, advance)
            harness = harness_answers(benchmark, source, samples, weights, dtype, device, scratch / "harness")
        found = compare(harness, ours, TOLERANCE[getattr(torch, dtype)])
        counts = (found.same_tokens, found.same_outcome, found.same_likelihoods)
        accuracies = (f"{found.harness:.4f}", f"{found.ours:.4f}")
        typer.echo(columns.format(name, found.rows, *accuracies, *counts, f"{found.largest_difference:.1e}"))
        complete.append(found.complete)
    if not complete:
        raise PipelineError(
            f"{params_file}: matrix.benchmark has no multiple choice that lm-eval knows; write the profile local-data "
            "(python -m stages.profile local-data)."
        )
    if not all(complete):
        raise PipelineError("Some rows differ from lm-eval's; see the table above.")


if __name__ == "__main__":
    run(main, checked=False)
