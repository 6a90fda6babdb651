"""A plan as tables on a terminal. It computes nothing but units."""

from rich.console import Console
from rich.table import Table

from pipeline.planning.paper import paper_training
from pipeline.planning.plan import Plan
from pipeline.planning.stages import StageCost


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _amount(value: float, unit: str = "") -> str:
    """Three digits and a decimal prefix; nothing for nothing."""
    if not value:
        return ""
    prefixes = ["", "k", "M", "G", "T", "P", "E"]
    while value >= 999.5:
        value /= 1000
        prefixes.pop(0)
    return f"{value:.3g} {prefixes[0]}{unit}".strip()


def print_plan(plan: Plan) -> None:
    """Print the costs of all stages, the large parts of their memory, the paper's training, and the assumptions."""
    console, total = Console(), plan.total
    # The names of columns that are not empty: a CPU has no memory of its own.
    columns = {
        "disk": ("disk", "B"),
        "device": ("device_memory", "B"),
        "host": ("host_memory", "B"),
        "tokens": ("forward_tokens", ""),
        "FLOPs": ("flops", ""),
    }
    shown = {title: column for title, column in columns.items() if total[column[0]]}
    models = {stage.entry.partition(" ")[0] for stage in plan.stages}

    def name(stage: StageCost) -> str:
        model, _, rest = stage.entry.partition(" ")
        return f"{stage.stage} {rest or model}" if len(models) == 1 else f"{stage.stage} {stage.entry}"

    devices = plan.device if plan.devices == 1 else f"{plan.devices} x {plan.device}"
    console.print(f"{plan.profile} on {devices}; device and host are peaks of memory\n")
    costs = Table(box=None, pad_edge=False)
    costs.add_column("stage", no_wrap=True)
    for column in ("time", *shown):
        costs.add_column(column, justify="right", no_wrap=True)
    rows = [(name(stage), vars(stage)) for stage in plan.stages]
    for label, cost in [*rows, ("total", total)]:
        costs.add_row(label, _time(cost["seconds"]), *(_amount(cost[key], unit) for key, unit in shown.values()))
    console.print(costs)
    console.print(
        f"\nWith DVC's cache {_amount(total['disk_linked'], 'B')} in all where the file system can link (reflinks, or "
        f"cache.type in .dvc/config), {_amount(total['disk_copied'], 'B')} where it copies. Checksums and copies take "
        f"{_time(total['commit'])} of the time; without DVC's cache the run takes "
        f"{_time(total['seconds'] - total['commit'])}.\n"
    )

    parts = Table("stage", "large parts of its memory on the device", box=None, pad_edge=False)
    for planned in plan.stages:
        if planned.parts:
            text = ", ".join(f"{name} {_amount(size, 'B')}" for name, size in planned.parts.items())
            parts.add_row(name(planned), text)
    console.print(parts)

    paper = paper_training()
    console.print(
        f"\nThe paper's training, {paper['agents']:.0f} agents for {paper['steps']:,.0f} steps on sequences of "
        f"{paper['tokens']:,.0f} tokens: {_amount(paper['whole_sequence_flops'], 'FLOP')} if every step took the whole "
        f"sequence, {_amount(paper['drawn_cache_flops'], 'FLOP')} with cache sizes drawn uniformly, "
        f"{_amount(paper['exact_sums_flops'], 'FLOP')} more for the sums of the exact estimator; the steps read "
        f"{_amount(paper['read_bytes'], 'B')} of traces.\n"
    )
    rates = Table("rate", "FLOP/s, bytes/s; seconds of kernel and start", box=None, pad_edge=False)
    for rate, text in plan.rates.items():
        rates.add_row(rate, text)
    console.print(rates)
    console.print()
    for assumption in plan.assumptions:
        console.print(f"- {assumption}", highlight=False)
