"""From params to the cost of every stage, and what was assumed on the way. It looks at no data."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import PipelineError
from pipeline.planning.devices import DEVICES
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
    stages: list[StageCost]
    assumptions: list[str]

    @property
    def total(self) -> dict[str, float]:
        """Sums over the stages, and the peaks of memory."""
        sums = ("seconds", "disk", "forward_tokens", "flops")
        peaks = ("device_memory", "host_memory")
        return {name: sum(getattr(stage, name) for stage in self.stages) for name in sums} | {
            name: max(getattr(stage, name) for stage in self.stages) for name in peaks
        }

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON-serialisable values, in seconds and bytes."""
        return asdict(self) | {"total": self.total, "paper_training": paper_training()}


def make_plan(params: "Params", device: str, models: Path) -> Plan:
    """The cost of every stage but sources, results and report, which take about a minute.

    Parameters
    ----------
    device
        Name in :data:`~pipeline.planning.devices.DEVICES`, or ``cpu``.
    models
        Where the model stage writes; the sizes of a model that is there are read from its config.json.

    Raises
    ------
    PipelineError
        The device has no rates, or the sizes of a model are not known.
    """
    name = "cpu-2-cores" if device == "cpu" else device
    if name not in DEVICES:
        raise PipelineError(f"--device {device} has no rates in the plan; choose cpu or one of {', '.join(DEVICES)}.")
    found = DEVICES[name]
    assumptions = [
        f"Rates of {name}: {found.source}.",
        "Stages run one after the other on one device. Time to download, and what downloads leave under .cache, is not "
        "counted; nor are results and report, about a minute.",
    ]
    stages: list[StageCost] = []
    for model_name in params.matrix.model:
        shape, source = model_shape(model_name, params.model_sources(model_name)["source"], models)
        stages += stage_costs(model_name, shape, params, found)
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
    return Plan(params.profile, name, stages, assumptions)
