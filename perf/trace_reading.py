"""Reading examples into training against Arrow and Polars reading the same files, and how long training waits for it.

Random examples at SmolLM2's shapes are written. ``first`` is a new ``ExampleReader`` that reads every example: it also
checks each file's checksum. ``later`` is the same reader again, with nothing kept in memory. ``arrow`` and ``polars``
read the same files whole, and make no tensors of them. All files stay in the system's page cache.

Then training is run on these examples, or on real ones (``--traces``), and the time that its loop waits for its next
batch is set against the whole.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import torch

from perf.measure import interleaved, median_ratio, write_result
from perf.trace_size import SMOLLM2, finish, write_examples
from pipeline.policy import train
from pipeline.policy.estimators.base import ESTIMATORS
from pipeline.section import read
from pipeline.traces.params import TracesParams
from pipeline.traces.shards import ExampleReader

COMPARED = ("exact", "rloo")


def read_all(reader: ExampleReader) -> None:
    for index in range(len(reader.examples)):
        reader.read(index)


def measure_reading(root: Path, repeats: int) -> dict[str, Any]:
    files = sorted((root / "train").rglob("tokens-*.parquet"))
    size = sum(file.stat().st_size for file in files)
    reader = ExampleReader(root, "train", cache_bytes=0)
    works: dict[str, Callable[[], object]] = {
        "arrow": lambda: [pq.read_table(file, partitioning=None) for file in files],
        "polars": lambda: [pl.read_parquet(file, hive_partitioning=False) for file in files],
        "first": lambda: read_all(ExampleReader(root, "train", cache_bytes=0)),
        "later": lambda: read_all(reader),
    }
    seconds = interleaved(works, repeats)
    for name in works:
        print(f"{name}: {size / min(seconds[name]) / 1e9:.2f} GB/s at best")
    rates = {
        f"{other} / {name}": median_ratio(seconds[other], seconds[name])
        for name in ("first", "later")
        for other in ("arrow", "polars")
    }
    for name, (middle, smallest, largest) in rates.items():
        print(f"seconds, {name}: {middle:.2f} ({smallest:.2f} .. {largest:.2f})")
    return {"bytes": size, "files": len(files), "seconds": seconds, "ratios": rates}


class Waiting:
    """``read_batches`` that adds up how long its caller waits for a batch."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._read = train.read_batches

    def __call__(self, *arguments: Any) -> Iterator[Any]:
        batches = self._read(*arguments)
        while True:
            started = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.seconds += time.perf_counter() - started
            yield batch


def timed_training(
    readers: tuple[Any, Any], estimator: Any, params: train.TrainParams, device: str, synchronize: Callable[[], None]
) -> list[tuple[float, float]]:
    """After each step, starting with none: the time, and the seconds waited until then."""
    waiting, marks = Waiting(), list[tuple[float, float]]()

    def advance(count: int, status: str) -> None:
        synchronize()
        marks.append((time.perf_counter(), waiting.seconds))

    original = train.read_batches
    train.read_batches = waiting  # type: ignore[assignment]
    try:
        with tempfile.TemporaryDirectory() as work:
            train.train_policy(Path(work), *readers, estimator, params, {}, device, advance)
    finally:
        train.read_batches = original
    return marks


def measure_waiting(root: Path, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """estimator -> seconds of training after its first step, and how many of them its loop waited for data."""
    params = read("train", train.TrainParams)
    params = params.model_copy(update={"steps": arguments.steps, "validate_every": arguments.steps})
    results = {}
    for name in COMPARED:
        readers = tuple(ExampleReader(root, split, arguments.cache_bytes) for split in ("train", "validation"))
        estimator = read(f"estimators.{name}", ESTIMATORS.load(name))
        marks = timed_training(readers, estimator, params, arguments.device, lambda: None)
        # The last mark follows a validation; the second one the first step, which also fills the queue.
        (started, before), (ended, after) = marks[1], marks[-2]
        total, waited = ended - started, after - before
        results[name] = {"seconds": total, "waited": waited, "share": waited / total}
        print(f"{name}: {len(marks) - 3} steps in {total:.1f} s, of which {100 * waited / total:.2f}% waiting")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="where training runs; files are read by the CPU")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--traces", type=Path, help="real traces of one benchmark, to train on")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--cache-bytes", type=int, default=0, help="0: every example is read from its files again")
    parser.add_argument("--threads", type=int, default=1, help="more of them wait for each other on a busy machine")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    params = read("traces", TracesParams)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        for split, sequences in (("train", arguments.sequences), ("validation", 2)):
            write_examples(root, SMOLLM2, arguments.layers, sequences, params, split)
        finish(root, SMOLLM2, arguments.layers, {"train": 1, "validation": 1})
        reading = measure_reading(root, arguments.repeats)
        waiting = measure_waiting(arguments.traces or root, arguments)
    options = {name: getattr(arguments, name) for name in ("layers", "sequences", "cache_bytes", "steps")}
    result = {**options, "traces": str(arguments.traces or "random"), "reading": reading, "waiting": waiting}
    print(write_result("trace_reading", arguments.device, result))


if __name__ == "__main__":
    main()
