"""What the DVC stages are multiplied by: ``matrix`` in params.yaml. It does not know what its names stand for."""

import itertools

from pydantic import model_validator

from pipeline.section import Names, Section


class MatrixParams(Section):
    """``trained_on`` names benchmarks that policies learn from, ``benchmark`` those that they are evaluated on."""

    model: Names
    trained_on: Names
    benchmark: Names
    estimator: Names

    @model_validator(mode="after")
    def _every_stage_has_a_name_of_its_own(self) -> "MatrixParams":
        for key in ("model", "trained_on", "benchmark", "estimator"):
            names = getattr(self, key)
            if len(set(names)) < len(names):
                raise ValueError(f"{key} names an entry twice")
        joined: dict[str, tuple[str, str]] = {}
        for pair in itertools.product(self.model, dict.fromkeys((*self.trained_on, *self.benchmark))):
            name = "-".join(pair)  # as DVC joins them: samples@model-benchmark
            if (other := joined.setdefault(name, pair)) != pair:
                raise ValueError(
                    f"model {other[0]} on {other[1]} and model {pair[0]} on {pair[1]} would both be the stage {name}; "
                    "rename one"
                )
        return self
