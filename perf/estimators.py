"""Steps and seconds that `exact` needs to reach the best held-out cost of `rloo`, on real traces.

    python -m perf.estimators --traces traces/smollm2-135m/ruler

Both train the same agents of some layers with the same draws and the ``train`` section of params.yaml, shortened, at
its learning rate and at ten times it. Seconds are steps times the mean time of a step without validation, which costs
both the same.
"""

import argparse
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import polars as pl

from perf.measure import write_result
from pipeline.errors import PipelineError
from pipeline.policy.estimators.base import ESTIMATORS, Estimator
from pipeline.policy.train import CURVES_FILE, TrainParams, describe, train_policy
from pipeline.section import read
from pipeline.traces.shards import ExampleReader

# Of train.learning_rate: at ten times it, so few steps get further.
RATE_FACTORS = (1, 10)


def train(
    estimator: Estimator, readers: list[ExampleReader], params: TrainParams, device: str
) -> tuple[pl.DataFrame, float]:
    """Mean held-out cost by number of steps, and mean seconds of a step without validation."""
    marks: list[tuple[float, bool]] = []

    def advance(count: int, status: str) -> None:
        marks.append((time.perf_counter(), status != ""))

    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        train_policy(work, *readers, estimator, params, describe(params, readers[0], estimator), device, advance)
        curves = pl.read_parquet(work / CURVES_FILE)
    steps = [end - start for (start, _), (end, validated) in itertools.pairwise(marks) if not validated]
    costs = curves.filter(pl.col("metric") == "validation_cost").group_by("step").agg(pl.col("value").mean())
    return costs.sort("step").select(steps=pl.col("step") + 1, cost="value"), sum(steps) / len(steps)


def compare(readers: list[ExampleReader], params: TrainParams, device: str) -> dict[str, Any]:
    """Train with both estimators; says what each needs to the least cost that rloo reaches."""
    costs, seconds = {}, {}
    for name in ("rloo", "exact"):
        estimator = read(f"estimators.{name}", ESTIMATORS.load(name))
        costs[name], seconds[name] = train(estimator, readers, params, device)
        print(f"{name:5s}  {seconds[name]:.3f} s per step; held-out cost by step:")
        print("       " + ", ".join(f"{row['steps']}: {row['cost']:.3f}" for row in costs[name].to_dicts()))
    target = costs["rloo"]["cost"].min()
    needed = {name: curve.filter(pl.col("cost") <= target)["steps"].min() for name, curve in costs.items()}
    row = {
        "learning_rate": params.learning_rate,
        "target": target,
        "steps": needed,
        "seconds_per_step": seconds,
        "curves": {name: curve.to_dicts() for name, curve in costs.items()},
    }
    if needed["exact"] is None:
        best = costs["exact"]["cost"].min()
        print(f"exact did not reach {target:.3f} in {params.steps} steps; its best is {best:.3f}")
    else:
        total = {name: needed[name] * seconds[name] for name in needed}
        row["seconds"], row["ratio"] = total, total["exact"] / total["rloo"]
        print(
            f"rate {params.learning_rate:g}, to rloo's best, {target:.3f}: rloo {needed['rloo']} steps, "
            f"{total['rloo']:.1f} s; exact {needed['exact']} steps, {total['exact']:.1f} s; ratio of the seconds "
            f"{row['ratio']:.2f}"
        )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--traces", type=Path, default=Path("traces/smollm2-135m/ruler"))
    parser.add_argument("--layers", type=int, nargs="+", default=[5, 15, 25])
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--validate-every", type=int, default=10)
    arguments = parser.parse_args()
    shortened = {"steps": arguments.steps, "validate_every": arguments.validate_every, "checkpoint_every": 10**6}
    params = read("train", TrainParams).model_copy(update=shortened)
    try:
        readers = [
            ExampleReader(arguments.traces, split, 4 << 30, arguments.layers) for split in ("train", "validation")
        ]
    except PipelineError as error:
        raise SystemExit(f"{error} `dvc repro` writes them; --traces names others.") from None
    for reader in readers:
        for index in range(len(reader.examples)):  # read once: what is compared is not the disk
            reader.read(index)
    rows = [
        compare(readers, params.model_copy(update={"learning_rate": factor * params.learning_rate}), arguments.device)
        for factor in RATE_FACTORS
    ]
    write_result("estimators", arguments.device, {"layers": arguments.layers, "rates": rows})


if __name__ == "__main__":
    main()
