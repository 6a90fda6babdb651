"""Stage `check`: hold what we compute with a model against transformers' own numbers, before any hour is spent."""

from pathlib import Path

from stages._app import DeviceOption, ModelOption, check_device, limit_threads, run


def main(model: ModelOption, device: DeviceOption = "cpu") -> None:
    """Check MODEL in float32, run it once in its own dtype, and write checks/MODEL.json."""
    import logging

    from pipeline.evaluation.selfcheck import check_model
    from pipeline.models.load import load_model
    from pipeline.params import entry, load_params
    from pipeline.workdir import publish, work_directory, write_json

    check_device(device)
    dtype = entry(load_params().models, model, "models").dtype
    limit_threads()

    def report(what: str, difference: float) -> None:
        logging.getLogger(__name__).info("check %s: %s: largest difference %.1e", model, what, difference)

    found = check_model(load_model(Path("models") / model, "float32", device), model, dtype, report=report)
    written = work_directory(f"check-{model}", {}, []) / f"{model}.json"
    write_json(written, found.model_dump(mode="json"))
    publish(written, Path("checks") / written.name)


if __name__ == "__main__":
    run(main)
