"""Train all agents of a model from stored traces (paper, Algorithm 1). The language model is never run.

Each step draws a sequence and a cache size, scores its tokens with every agent, and follows the gradient
of the expected cost: sampled (``rloo``, as published) or in closed form (``exact``); ``softrank`` is the
sorting surrogate that the paper compares them with (figure 5b). Every draw depends on (seed, step) only, so
a run resumed from a checkpoint ends with the same bytes. This file knows no MLflow: curves go to Parquet.
"""

import hashlib
import json
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Queue
from typing import Any, Literal

import polars as pl
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.params import TrainParams
from pipeline.policy.agents import Policy, PolicyShape, run_agents, save_policy
from pipeline.policy.pairs import expected_cost
from pipeline.policy.ranking import optimal_total_cost, rank, rloo_loss, total_cost
from pipeline.policy.soft_rank import soft_rank_loss
from pipeline.traces.importance import future_importance
from pipeline.traces.shards import TraceReader, remove_unfinished
from pipeline.workdir import atomic_write

Estimator = Literal["exact", "rloo", "softrank"]
CURVES_FILE = "curves.parquet"
CHECKPOINT_FILE = "checkpoint.safetensors"
# Statistics of keys and values need no more than this many, taken evenly: a corpus may be sorted by task.
NORMALISATION_SEQUENCES = 32


@dataclass(frozen=True)
class Draw:
    """What one training step looks at: a sequence and how much of it is the cache."""

    sequence: int
    cache_size: int


def learning_rate(step: int, params: TrainParams) -> float:
    """Linear warm-up from ``warmup_factor``, then cosine to ``final_learning_rate`` (paper, section "Training")."""
    if step < params.warmup_steps:
        progress = step / params.warmup_steps
        return params.learning_rate * (params.warmup_factor + (1 - params.warmup_factor) * progress)
    progress = (step - params.warmup_steps) / max(1, params.steps - params.warmup_steps)
    amplitude = params.learning_rate - params.final_learning_rate
    return params.final_learning_rate + 0.5 * amplitude * (1 + math.cos(math.pi * progress))


def train_policy(
    work: Path,
    reader: TraceReader,
    validation: TraceReader,
    estimator: Estimator,
    params: TrainParams,
    config: dict[str, Any],
    device: str,
    advance: Callable[[int, str], None],
) -> None:
    """Train, checkpointing into ``work``, and leave there the policy, its config and its curves.

    Parameters
    ----------
    work
        Directory that survives an interruption; training continues from its checkpoint.
    reader, validation
        Traces to learn from, and held-out traces for ``validation_cost``.
    config
        Provenance for the policy's config.json.
    advance
        Called after each step (and once for the steps found done) with the count and a short status.

    Raises
    ------
    PipelineError
        The traces are too short for a single block, the checkpoint is damaged, or the training diverges.
    """
    trace = reader.shape
    shape = PolicyShape(trace.layers, trace.kv_heads, trace.head_dim, params.agent)
    for source in (reader, validation):
        shortest = min(source.sequences, key=lambda sequence: sequence.tokens)
        if shortest.tokens <= trace.block_size:
            raise PipelineError(
                f"{source.root}: sample {shortest.sample_id} has {shortest.tokens} tokens, not more than "
                f"traces.block_size = {trace.block_size}; lower the block size or use longer samples."
            )
    policy = Policy(shape, _generator(params.seed, "weights")).to(device)
    _normalise(policy, reader)
    # Fused: one pass over parameters, gradients and moments instead of one for each operation.
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=params.learning_rate, weight_decay=params.weight_decay, fused=True
    )
    curves = _Curves(shape, trace.layer_numbers)
    done = _resume(work, policy, optimizer, curves)
    advance(done, "resumed" if done else "starting")
    for step, (keys, values, importance, uniform) in _prefetch(reader, estimator, params, done, device):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, params)
        loss = compute_gradients(policy, keys, values, loss_function(estimator, importance, uniform))
        norms = clip_gradients(policy, params.gradient_clip)
        optimizer.step()
        curves.add(step, "loss", loss)
        curves.add(step, "gradient_norm", norms)
        status = ""
        if (step + 1) % params.validate_every == 0 or step + 1 == params.steps or step == 0:
            cost = validation_cost(policy, validation, device)
            _check_finite(step, estimator, params, loss, norms, cost)
            curves.add(step, "validation_cost", cost)
            status = f"validation cost {cost.mean():.3f}"
        if (step + 1) % params.checkpoint_every == 0 and step + 1 < params.steps:
            _save_checkpoint(work, policy, optimizer, curves, step + 1)
        advance(1, status)
    with atomic_write(work / CURVES_FILE) as temporary:
        curves.table().write_parquet(temporary)
    save_policy(work, policy, config)
    (work / CHECKPOINT_FILE).unlink(missing_ok=True)
    remove_unfinished(work)


def loss_function(estimator: Estimator, importance: Tensor, uniform: Tensor) -> Callable[[Tensor, slice], Tensor]:
    """The loss of one step: of scores (some heads, n) and which heads they are -> (some heads,).

    ``importance`` is (heads, n), ``uniform`` what :func:`draw_uniform` drew for it.
    """
    if estimator == "exact":
        return lambda scores, heads: expected_cost(scores, importance[heads]) / optimal_total_cost(importance[heads])
    if estimator == "softrank":
        return lambda scores, heads: soft_rank_loss(scores, importance[heads])
    return lambda scores, heads: rloo_loss(scores, importance[heads], uniform[:, heads])


def draw_uniform(estimator: Estimator, params: TrainParams, step: int, heads: int, tokens: int) -> Tensor:
    """What the rankings of a step are made of: (samples, heads, tokens) in [0, 1); no samples but for ``rloo``.

    It depends on seed and step only. Drawn on the CPU, because a GPU's generators draw other numbers.
    """
    samples = params.rloo_samples if estimator == "rloo" else 0
    return torch.rand(samples, heads, tokens, generator=_generator(params.seed, "rankings", step))


def compute_gradients(
    policy: Policy, keys: Tensor, values: Tensor, loss_of: Callable[[Tensor, slice], Tensor]
) -> Tensor:
    """Put each agent's gradient into the parameters' ``grad``; returns the losses, (heads,).

    Agents share nothing, so blocks of them go forward and backward in turn (``Policy.blocks``). ``keys`` and ``values``
    are (heads, n, head_dim), of any floating dtype.
    """
    parameters = [*policy.weights, *policy.biases]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
    losses = []
    for heads in policy.blocks(keys.shape[1]):
        leaves = [parameter.detach()[heads].requires_grad_() for parameter in parameters]
        weights, biases = leaves[: len(policy.weights)], leaves[len(policy.weights) :]
        loss = loss_of(run_agents(weights, biases, policy.inputs(keys[heads], values[heads], heads)), heads)
        # The gradient of the sum is each agent's own gradient.
        gradients = torch.autograd.grad(loss.sum(), leaves)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad[heads] = gradient
        losses.append(loss.detach())
    return torch.cat(losses)


@torch.no_grad()
def clip_gradients(policy: Policy, limit: float) -> Tensor:
    """Clip each agent's gradient to norm ``limit``; returns the norms before, (heads,)."""
    gradients = [parameter.grad for parameter in policy.parameters() if parameter.grad is not None]
    norms = torch.stack([gradient.square().sum(dim=(1, 2)) for gradient in gradients]).sum(0).sqrt()
    factor = (limit / (norms + 1e-6)).clamp(max=1.0)[:, None, None]
    for gradient in gradients:
        gradient.mul_(factor)
    return norms


@torch.no_grad()
def validation_cost(policy: Policy, reader: TraceReader, device: str) -> Tensor:
    """Normalised cost of the policy's ranking on held-out sequences, (heads,); 1.0 = best order.

    Each sequence is cut once, in its middle: the cache is its first half, the importance comes from its
    second half. A head whose scores are not all finite costs NaN.
    """
    block = reader.shape.block_size
    costs = []
    for index, sequence in enumerate(reader.sequences):
        keys, values, record = reader.read(index)
        cache_size = max(1, sequence.tokens // 2 // block) * block
        importance = _importance(record, cache_size, block, device)
        scores = policy(keys[:, :cache_size].to(device), values[:, :cache_size].to(device))
        cost = total_cost(importance, rank(scores)) / optimal_total_cost(importance)
        # A ranking exists of any scores. Without a look at each of them, which would wait for the device each time:
        costs.append(torch.where(scores.isfinite().all(-1), cost, torch.nan))
    return torch.stack(costs).mean(0)


def _check_finite(step: int, estimator: Estimator, params: TrainParams, *values: Tensor) -> None:
    """Stop a training that has diverged: ``values`` are (heads,) each. It waits for the device."""
    finite = torch.stack([value.isfinite() for value in values]).all(0)
    if not finite.all():
        raise PipelineError(
            f"The training with {estimator} has diverged: at step {step + 1} the scores, losses or gradients of "
            f"{int((~finite).sum())} of {len(finite)} heads are not finite; lower train.learning_rate "
            f"({params.learning_rate:g}) in params.yaml."
        )


def _importance(record: Tensor, cache_size: int, block_size: int, device: str) -> Tensor:
    # A token nobody looks at again may round to 0 in float16; the floor keeps the normaliser above 0.
    return future_importance(record, cache_size, block_size).clamp_min(1e-10).to(device)


@torch.no_grad()
def _normalise(policy: Policy, reader: TraceReader) -> None:
    available = len(reader.sequences)
    count = min(NORMALISATION_SEQUENCES, available)
    total, squares, tokens = torch.zeros(()), torch.zeros(()), 0
    for sequence in (place * available // count for place in range(count)):
        keys, values, _ = reader.read(sequence)
        states = policy.states(keys, values).double()  # (heads, n, channels)
        total = total + states.sum(1, keepdim=True)
        squares = squares + states.square().sum(1, keepdim=True)
        tokens += states.shape[1]
    mean = total / tokens
    deviation = (squares / tokens - mean.square()).clamp_min(1e-12).sqrt()
    policy.mean.copy_(mean.float())
    policy.std.copy_(deviation.clamp_min(1e-4).float())


def _generator(seed: int, purpose: str, step: int = 0) -> torch.Generator:
    # Hashed, because torch's CPU generator looks at the low 32 bits of a seed only.
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4]))


def draw_cut(reader: TraceReader, params: TrainParams, step: int) -> Draw:
    """What a step trains on: a sequence and a cache size, both uniform, decided by the seed and the step alone."""
    generator = _generator(params.seed, "draws", step)
    sequence = int(torch.randint(len(reader.sequences), (), generator=generator))
    block = reader.shape.block_size
    # Cache sizes are multiples of the block size with at least one token of future.
    largest = (reader.sequences[sequence].tokens - 1) // block
    return Draw(sequence, block * (1 + int(torch.randint(largest, (), generator=generator))))


def _prefetch(
    reader: TraceReader, estimator: Estimator, params: TrainParams, first: int, device: str
) -> Iterator[tuple[int, tuple[Tensor, Tensor, Tensor, Tensor]]]:
    # One thread reads and draws ahead, so that a step waits neither for the disk nor for the way to the device.
    queue: Queue[tuple[int, tuple[Tensor, Tensor, Tensor, Tensor]] | Exception] = Queue(maxsize=4)
    stop = threading.Event()

    def produce() -> None:
        try:
            for step in range(first, params.steps):
                draw = draw_cut(reader, params, step)
                keys, values, record = reader.read(draw.sequence)
                importance = _importance(record, draw.cache_size, reader.shape.block_size, device)
                keys, values = (_moved(states[:, : draw.cache_size], device) for states in (keys, values))
                uniform = _moved(draw_uniform(estimator, params, step, *importance.shape), device)
                item = (step, (keys, values, importance, uniform))
                if stop.is_set():
                    return
                queue.put(item)
        except Exception as error:  # handed to the consumer, which raises it
            queue.put(error)

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    try:
        for _ in range(first, params.steps):
            item = queue.get()
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        stop.set()
        while thread.is_alive():
            while not queue.empty():
                queue.get_nowait()
            thread.join(timeout=0.05)


def _moved(states: Tensor, device: str) -> Tensor:
    if torch.device(device).type != "cuda":
        return states.to(device)
    # From pinned memory: several times the speed, and the thread does not wait for it.
    return states.contiguous().pin_memory().to(device, non_blocking=True)


class _Curves:
    """Per-head training curves in memory: (step, metric) -> (heads,) float32."""

    def __init__(self, shape: PolicyShape, layer_numbers: tuple[int, ...]) -> None:
        self.shape, self.layer_numbers = shape, layer_numbers
        self.points: list[tuple[int, str, Tensor]] = []

    def add(self, step: int, metric: str, values: Tensor) -> None:
        self.points.append((step, metric, values.float().cpu()))

    def table(self) -> pl.DataFrame:
        heads = self.shape.heads
        layer = torch.tensor(self.layer_numbers).repeat_interleave(self.shape.kv_heads)
        kv_head = torch.arange(heads) % self.shape.kv_heads
        frames = [
            pl.DataFrame(
                {
                    "step": pl.Series([step] * heads, dtype=pl.Int32),
                    "layer": pl.Series(layer.tolist(), dtype=pl.Int32),
                    "kv_head": pl.Series(kv_head.tolist(), dtype=pl.Int32),
                    "metric": [metric] * heads,
                    "value": pl.Series(values.tolist(), dtype=pl.Float32),
                }
            )
            for step, metric, values in self.points
        ]
        return pl.concat(frames)


def _save_checkpoint(work: Path, policy: Policy, optimizer: torch.optim.AdamW, curves: _Curves, step: int) -> None:
    tensors = {f"policy.{name}": tensor for name, tensor in policy.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
    tensors["curves"] = torch.stack([values for _, _, values in curves.points])
    metadata = {"step": str(step), "points": json.dumps([point[:2] for point in curves.points])}
    with atomic_write(work / CHECKPOINT_FILE) as temporary:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata=metadata)


def _resume(work: Path, policy: Policy, optimizer: torch.optim.AdamW, curves: _Curves) -> int:
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
            curves.points.append((step, metric, values))
        return int(metadata["step"])
    except (SafetensorError, RuntimeError, KeyError, ValueError, OSError) as error:
        raise PipelineError(f"{path} is damaged ({error}); delete it to train from the start.") from None


def describe(params: TrainParams, reader: TraceReader, estimator: Estimator) -> dict[str, Any]:
    """Provenance of a training for the policy's config.json."""
    return {
        "estimator": estimator,
        "model": reader.shape.model,
        "corpus": reader.shape.corpus,
        "params": params.model_dump(mode="json"),
        "trace_shape": asdict(reader.shape),
        "training_sequences": len(reader.sequences),
    }
