"""Stage `check`: hold what we compute with a model against transformers' own numbers, before any hour is spent."""

from stages import _paths
from stages._app import DeviceOption, ModelOption, check_device, limit_threads, run


def main(model: ModelOption, device: DeviceOption = "cpu") -> None:
    """Check MODEL in float32, run it once in its own dtype, and write checks/MODEL.json."""
    import logging

    from pipeline.closure import Code
    from pipeline.evaluation.selfcheck import check_model
    from pipeline.files import write_json
    from pipeline.models.load import load_model
    from pipeline.models.params import read_dtype
    from pipeline.work import publish, work_directory

    check_device(device)
    dtype = read_dtype(model)
    limit_threads()

    def report(what: str, difference: float) -> None:
        logging.getLogger(__name__).info("check %s: %s: largest difference %.1e", model, what, difference)

    found = check_model(load_model(_paths.model(model), "float32", device), model, dtype, report=report)
    written = work_directory(f"check-{model}", {}, [], Code(__file__)) / f"{model}.json"
    write_json(written, found.model_dump(mode="json"))
    publish(written, _paths.check(model))


if __name__ == "__main__":
    run(main)
