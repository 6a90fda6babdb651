"""From params to the cost of every stage, and what was assumed on the way. It looks at no data."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import PipelineError
from pipeline.planning.devices import DEVICES, Device, measured
from pipeline.planning.paper import paper_training
from pipeline.planning.shapes import model_shape
from pipeline.planning.stages import GENERATED_SHARE, TRACE_CACHE_BYTES, StageCost, policy_shape, stage_costs
from pipeline.samples.sample import SPLITS

if TYPE_CHECKING:
    from pipeline.params import Params


@dataclass(frozen=True)
class Plan:
    """Everything that ``python -m stages.plan`` shows."""

    profile: str
    device: str
    devices: int
    rates: dict[str, str]
    stages: list[StageCost]
    assumptions: list[str]

    @property
    def total(self) -> dict[str, float]:
        """Sums over the stages, and the peaks of memory; of disk also with DVC's cache, linked and copied."""
        sums = ("seconds", "commit", "disk", "forward_tokens", "flops")
        peaks = ("device_memory", "host_memory")
        total = {name: sum(getattr(stage, name) for stage in self.stages) for name in sums} | {
            name: max(getattr(stage, name) for stage in self.stages) for name in peaks
        }
        return total | {"disk_linked": total["disk"], "disk_copied": 2 * total["disk"]}

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON-serialisable values, in seconds and bytes."""
        return asdict(self) | {"total": self.total, "paper_training": paper_training()}


def make_plan(params: "Params", device: str, models: Path, results: Path, devices: int = 1) -> Plan:
    """The cost of every stage but sources, results and report, which take about a minute.

    Parameters
    ----------
    device
        Name in :data:`~pipeline.planning.devices.DEVICES`, or ``cpu``.
    models
        Where the model stage writes; the sizes of a model that is there are read from its config.json.
    results
        Where ``perf/rates.py`` writes; rates that were measured replace the estimates.
    devices
        How many of them one host has. Stages that the executor divides use all.

    Raises
    ------
    PipelineError
        The device has no rates, there are fewer than one, or the sizes of a model are not known.
    """
    name = "cpu-2-cores" if device == "cpu" else device
    if name not in DEVICES:
        raise PipelineError(f"--device {device} has no rates in the plan; choose cpu or one of {', '.join(DEVICES)}.")
    if devices < 1:
        raise PipelineError(f"--gpus {devices}: there must be one at least.")
    found = measured(DEVICES[name], results)
    assumptions = [
        "Stages run one after the other. Time to download, and what downloads leave under .cache, is not counted; nor "
        "are results and report, about a minute.",
        f"The host has {found.cores * devices} cores, over which RULER's samples are divided by tasks, and dialogues.",
    ]
    if devices > 1:
        assumptions.append(
            f"The executor divides over {devices} devices: traces by shards of sequences, training by layers, "
            "evaluation by samples. The slowest has the units that do not divide evenly. Other stages, and DVC, run on "
            "one."
        )
    stages: list[StageCost] = []
    for model_name in params.matrix.model:
        shape, source = model_shape(model_name, params.model_sources(model_name)["source"], models)
        stages += stage_costs(model_name, shape, params, found, devices)
        policy = policy_shape(shape, params.train.agent)
        assumptions.append(
            f"{model_name} has {source}: {shape.parameters:,} parameters, {policy.heads} agents of "
            f"{policy.parameters_per_agent:,}."
        )
    assumed: dict[str, list[str]] = {}
    for benchmark in params.matrix.benchmark:
        made = params.benchmarks[benchmark].samples
        groups = made.expected()
        tokens = ", ".join(f"{group.context:,} + {group.continuation}" for group in groups)
        train, validation, test = (sum(getattr(group, split) for group in groups) for split in SPLITS)
        assumptions.append(
            f"{benchmark}: {train:,} training, {validation:,} validation, {test:,} test samples of {tokens} tokens "
            f"(context + continuation)."
        )
        assumed.setdefault(made.assumed, []).append(benchmark)
    assumptions += [
        *(f"Samples of {', '.join(names)}: {said}." for said, names in assumed.items()),
        f"A row of the sweep generates {GENERATED_SHARE:.0%} of max_new_tokens, as measured on the default profile.",
        f"Training keeps {TRACE_CACHE_BYTES / 1e9:.0f} GB of decoded traces in memory per split (KVP_CACHE_GB) and "
        "reads the rest again.",
    ]
    rates = {rate: f"{_value(found, rate):.3g}, {origin}" for rate, origin in found.origins.items()}
    return Plan(params.profile, name, devices, rates, stages, assumptions)


def _value(device: Device, rate: str) -> float:
    kind, _, dtype = rate.partition(".")
    value: float = device.flops[dtype] if dtype else getattr(device, kind)
    return value
