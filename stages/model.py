"""Stage `model`: fetch a model's source and write it as a safetensors directory."""

from pathlib import Path

from stages._app import ModelOption, run


def main(model: ModelOption) -> None:
    """Fetch MODEL and write models/MODEL."""
    from pipeline.models import export_model
    from pipeline.params import entry, load_params
    from pipeline.sources import fetch, record
    from pipeline.workdir import publish, work_directory, write_json

    params = entry(load_params().models, model, "models")
    source = fetch(params.source)
    work = work_directory(f"model-{model}", params.model_dump(mode="json"), [])
    export_model(source, work)
    write_json(work / "source.json", record(params.source, source))
    publish(work, Path("models") / model)


if __name__ == "__main__":
    run(main)
