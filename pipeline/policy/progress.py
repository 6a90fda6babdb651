"""What a training in progress keeps: its curves, and a checkpoint to take it up again. It knows no estimator."""

import json
from pathlib import Path

import polars as pl
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.files import atomic_write
from pipeline.policy.agents import Policy, PolicyShape
from pipeline.tables import CURVES

CHECKPOINT_FILE = "checkpoint.safetensors"


class Curves:
    """Per-head training curves in memory: (step, metric) -> (heads,) float32.

    ``points`` are on the CPU, and may be appended to; what was added since they were last asked for stays on its
    device, so that adding does not wait for it.
    """

    def __init__(self, shape: PolicyShape, layer_numbers: tuple[int, ...]) -> None:
        self.shape, self.layer_numbers = shape, layer_numbers
        self._points: list[tuple[int, str, Tensor]] = []
        self._added: list[tuple[int, str, Tensor]] = []

    def add(self, step: int, metric: str, values: Tensor) -> None:
        """One point: ``values`` are (heads,)."""
        self._added.append((step, metric, values.float()))

    @property
    def points(self) -> list[tuple[int, str, Tensor]]:
        """All points, in the order in which they were added."""
        if self._added:
            fetched = torch.stack([values for _, _, values in self._added]).cpu()
            self._points += [
                (step, metric, values) for (step, metric, _), values in zip(self._added, fetched, strict=True)
            ]
            self._added = []
        return self._points

    def table(self) -> pl.DataFrame:
        """The columns of ``CURVES`` (``pipeline/tables.py``)."""
        heads = self.shape.heads
        layer = torch.tensor(self.layer_numbers).repeat_interleave(self.shape.kv_heads)
        kv_head = torch.arange(heads) % self.shape.kv_heads
        frames = [
            pl.DataFrame(
                {
                    "step": [step] * heads,
                    "layer": layer.tolist(),
                    "kv_head": kv_head.tolist(),
                    "metric": [metric] * heads,
                    "value": values.tolist(),
                },
                schema=CURVES,
            )
            for step, metric, values in self.points
        ]
        return pl.concat(frames)


def save_checkpoint(work: Path, policy: Policy, optimizer: torch.optim.AdamW, curves: Curves, step: int) -> None:
    """Write down where a training stands after ``step`` steps, atomically."""
    tensors = {f"policy.{name}": tensor for name, tensor in policy.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
    tensors["curves"] = torch.stack([values for _, _, values in curves.points])
    metadata = {"step": str(step), "points": json.dumps([point[:2] for point in curves.points])}
    with atomic_write(work / CHECKPOINT_FILE) as temporary:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata=metadata)


def resume(work: Path, policy: Policy, optimizer: torch.optim.AdamW, curves: Curves) -> int:
    """Take a training up where :func:`save_checkpoint` left it; returns the steps done, 0 without a checkpoint.

    Raises
    ------
    PipelineError
        The checkpoint is damaged.
    """
    path = work / CHECKPOINT_FILE
    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt") as stored:
            metadata = stored.metadata()
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a mapping
        policy.load_state_dict(
            {name.removeprefix("policy."): tensor for name, tensor in tensors.items() if name.startswith("policy.")}
        )
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, field = name.split(".")
                state.setdefault(int(index), {})[field] = tensor
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
        for (step, metric), values in zip(json.loads(metadata["points"]), tensors["curves"], strict=True):
            curves.points.append((step, metric, values))  # on the CPU, where those to come may not be
        return int(metadata["step"])
    except (SafetensorError, RuntimeError, KeyError, ValueError, OSError) as error:
        raise PipelineError(f"{path} is damaged ({error}); delete it to train from the start.") from None
