"""The training of a policy as units of work: a unit is the agents of some layers, which share nothing with others."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import polars as pl
import torch

from pipeline.closure import Code
from pipeline.errors import PipelineError
from pipeline.executor.units import Advance
from pipeline.files import atomic_write, remove
from pipeline.policy.agents import CONFIG_FILE, Policy, load_policy, save_policy
from pipeline.policy.estimators.base import Estimator
from pipeline.policy.train import CURVES_FILE, TrainParams, train_policy
from pipeline.traces.shards import ExampleReader

# Whole layers, so that a unit reads no file of another's; few, so that there are enough units for several GPUs.
LAYERS_PER_UNIT = 4


@dataclass(frozen=True)
class TrainingJob:
    """See :class:`pipeline.executor.units.Job`; a unit leaves a policy of its layers, the config last.

    Attributes
    ----------
    traces
        Directory of the traces, of the layers ``layer_numbers``.
    cache_bytes
        Memory for decoded traces of each split.
    config
        Provenance for the policy's config.json.
    """

    together: ClassVar[int] = 1

    name: str
    directory: Path
    code: Code
    device: str
    traces: Path
    layer_numbers: tuple[int, ...]
    estimator: Estimator
    params: TrainParams
    cache_bytes: int
    config: Mapping[str, Any]

    @property
    def memory(self) -> int:
        """Decoded traces, and what torch and a step take."""
        return 2 * self.cache_bytes + 2 * 2**30

    def units(self) -> Mapping[str, int]:
        """Some layers each, named by the first, by the steps."""
        return {f"layer-{layers[0]:03d}": self.params.steps for layers in self._blocks()}

    def is_done(self, unit: str) -> bool:
        """Whether the policy of the layers is there."""
        return (self.directory / unit / CONFIG_FILE).is_file()

    @contextmanager
    def open(self) -> Iterator[None]:
        """Units share nothing."""
        yield

    def run(self, state: None, unit: str, advance: Advance) -> None:
        """Train the agents of some layers, from their last checkpoint on."""
        (layers,) = (layers for layers in self._blocks() if unit == f"layer-{layers[0]:03d}")
        reader, validation = (
            ExampleReader(self.traces, split, self.cache_bytes, layers) for split in ("train", "validation")
        )
        work = self.directory / unit
        work.mkdir(parents=True, exist_ok=True)
        train_policy(work, reader, validation, self.estimator, self.params, dict(self.config), self.device, advance)

    def gather(self) -> Path:
        """One policy and one table of curves of all layers; returns their directory.

        Raises
        ------
        PipelineError
            A unit's policy is damaged.
        """
        out, parts = self.directory / "policy", [self.directory / unit for unit in self.units()]
        out.mkdir(exist_ok=True)
        # Agents of hidden states are for studies, which train without a job.
        policies = [self._trained(part) for part in parts]
        whole = Policy(replace(policies[0].shape, layers=sum(policy.shape.layers for policy in policies)))
        states = [policy.state_dict() for policy in policies]
        whole.load_state_dict({name: torch.cat([state[name] for state in states]) for name in states[0]})
        curves = pl.concat([pl.read_parquet(part / CURVES_FILE) for part in parts])
        with atomic_write(out / CURVES_FILE) as temporary:
            curves.sort("step", "metric", "layer", "kv_head").write_parquet(temporary)
        costs = [cost for policy in policies for cost in policy.provenance["held_out_cost"]]
        save_policy(out, whole, dict(self.config) | {"held_out_cost": costs})
        return out

    def _trained(self, part: Path) -> Policy:
        try:
            return load_policy(part)[0]
        except PipelineError:
            # Not done after all: the next run trains it again.
            remove(part / CONFIG_FILE)
            raise

    def _blocks(self) -> list[tuple[int, ...]]:
        numbers = self.layer_numbers
        return [numbers[first : first + LAYERS_PER_UNIT] for first in range(0, len(numbers), LAYERS_PER_UNIT)]
