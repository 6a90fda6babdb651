"""Bytes, FLOPs and memory of the pipeline's pieces, from shapes. It knows neither devices' speed nor params files.

Bytes of traces, policies and evicted caches and the FLOPs of matrix products follow from the code they count and are
tested against it. Passes over memory are counted by reading that code, at whole tensors.
"""

from collections.abc import Sequence

from pipeline.planning.devices import Work
from pipeline.planning.shapes import ModelShape
from pipeline.policy.agents import UNITS_PER_BLOCK, PolicyShape
from pipeline.policy.estimators.base import Estimator
from pipeline.policy.estimators.exact import WEIGHTS_PER_BLOCK
from pipeline.traces.importance import TracesParams

# Parquet's marks of where the lists of a row begin, per list, and its headers and metadata of one row group.
_LIST_BYTES, _ROW_GROUP_BYTES = 3, 1100
# Passes of a layer over its hidden states (norms, rotations, residuals) and over its MLP's (activation, product).
_HIDDEN_PASSES, _INTERMEDIATE_PASSES = 24, 6
# Operations of one layer of a transformers model; what capture adds for a chunk of queries, and for each block in it.
LAYER_KERNELS, _CHUNK_KERNELS, _BLOCK_KERNELS = 45, 10, 2
# Bytes moved per unit of an agent's input and hidden layers: scoring, and a training step's forward and backward.
_SCORE_BYTES, _STEP_BYTES = 16, 36
# Bytes moved per parameter by storing the gradient (8), clipping (20) and fused AdamW (28), and per token that is
# sorted, gathered and summed up.
_OPTIMIZER_BYTES, RANKING_BYTES = 56, 1000
# The exact estimator, float64: bytes moved per weight of a token on its grid nodes (powers, product, indices, spread
# and gathered back twice); bytes per place of a head's transforms, two there and three back, and the places where
# scores are spread over less than 31.
_WEIGHT_BYTES, _PLACE_BYTES, _PLACES, _GRID_KERNELS = 200, 160, 1024, 50
_STEP_KERNELS, _SCORE_KERNELS = 150, 20


def trace_bytes(shape: ModelShape, tokens: int, block_size: int) -> int:
    """Bytes of one sequence of ``tokens`` in the trace files: all heads, all columns (``pipeline/traces/shards.py``).

    Keys, values and the stored part of the record are float16; sequence, head and position take no room.
    """
    blocks = -(-tokens // block_size)
    stored = block_size * blocks * (blocks - 1) // 2
    row = 2 * 2 * shape.head_dim + 3 * _LIST_BYTES
    return shape.heads * (tokens * row + 2 * stored + _ROW_GROUP_BYTES)


def decoded_bytes(shape: ModelShape, tokens: int, block_size: int) -> int:
    """Bytes of one sequence as ``TraceReader`` keeps it: float16 keys, values and the whole record, all heads."""
    return 2 * shape.heads * tokens * (2 * shape.head_dim + -(-tokens // block_size))


def policy_bytes(policy: PolicyShape) -> int:
    """Bytes of a policy's float32 tensors: parameters, and mean and standard deviation of what it sees."""
    return 4 * policy.heads * (policy.parameters_per_agent + 2 * policy.channels)


def evicted_bytes(
    shape: ModelShape, policies: int, budgets: Sequence[int], context: int, reserve: int, item_bytes: int
) -> int:
    """Bytes of the evicted caches that decode together (``EvictedCache.nbytes``).

    Every policy at every budget, and the whole cache once. The last of the ``context`` tokens is left out, since it is
    fed again; ``reserve`` slots are for new tokens. Layers that slide over a window add little: all rows share it.
    """
    kept = policies * sum(min(budget, context) - 1 + reserve for budget in budgets)
    return (kept + context - 1 + reserve) * shape.ranked_numbers * item_bytes


def capture_work(shape: ModelShape, tokens: int, item_bytes: int, traces: TracesParams) -> Work:
    """Prefill of one sequence with its attention captured (``pipeline/traces/capture.py``)."""
    chunks, rest = divmod(tokens, traces.query_chunk)
    # A chunk's queries look at all tokens up to its end; what is masked is computed all the same.
    visible = traces.query_chunk**2 * chunks * (chunks + 1) // 2 + rest * tokens
    within = min(visible, tokens * (shape.window + traces.query_chunk))
    pairs = shape.query_heads * (shape.ranked_layers * visible + (shape.layers - shape.ranked_layers) * within)
    # Product, softmax in float32, cast, product, maximum over the group's query heads, sum over the block.
    cast = 0 if item_bytes == 4 else 4 + item_bytes
    pair_bytes = 3 * item_bytes + 8 + cast + 8 * shape.kv_heads / shape.query_heads
    token_bytes = item_bytes * (_HIDDEN_PASSES * shape.hidden + _INTERMEDIATE_PASSES * shape.intermediate)
    chunk_kernels = _CHUNK_KERNELS + _BLOCK_KERNELS * traces.query_chunk / traces.block_size
    return Work(
        # The output embedding answers for the last token alone.
        flops=2 * shape.layers * shape.layer_weights * tokens
        + 4 * shape.head_dim * pairs
        + 2 * shape.hidden * shape.vocabulary,
        moved=pair_bytes * pairs + shape.layers * tokens * token_bytes,
        kernels=shape.layers * (LAYER_KERNELS + chunk_kernels * (chunks + bool(rest))),
    )


def capture_memory(
    shape: ModelShape, tokens: int, item_bytes: int, traces: TracesParams, blocks: int | None = None
) -> dict[str, int]:
    """Bytes of such a prefill at its peak, by part.

    ``blocks`` of each token's record: None for those of the traces, whose bytes grow with tokens squared.
    """
    softmax = 4 + (0 if item_bytes == 4 else item_bytes)
    chunk = shape.query_heads * min(traces.query_chunk, tokens) * tokens * (item_bytes + softmax)
    return {
        "weights": shape.parameters * item_bytes,
        # Layers that slide over a window keep every token during a capture, like the others.
        "cache": 2 * shape.layers * shape.kv_heads * shape.head_dim * tokens * item_bytes,
        "records": 4 * shape.heads * tokens * (blocks or -(-tokens // traces.block_size)),
        "one chunk of attention": chunk,
        "activations": tokens * (4 * shape.hidden + 3 * shape.intermediate) * item_bytes,
    }


def agent_weights(policy: PolicyShape) -> list[int]:
    """Weights of the matrices of one agent, layer by layer."""
    return [fan_in * fan_out for fan_in, fan_out in zip(policy.widths, policy.widths[1:], strict=False)]


def training_flops(policy: PolicyShape) -> int:
    """FLOPs of one training step per token and agent: forward, gradients of weights and of hidden units.

    The input needs no gradient, so the first layer has one product less.
    """
    first, *others = agent_weights(policy)
    return 4 * first + 6 * sum(others)


def score_work(policy: PolicyShape, tokens: float) -> Work:
    """All agents score so many tokens each."""
    rows = policy.heads * tokens
    return Work(
        agent_flops=2 * sum(agent_weights(policy)) * rows,
        moved=_SCORE_BYTES * sum(policy.widths) * rows,
        kernels=_SCORE_KERNELS,
    )


def step_work(policy: PolicyShape, estimator: Estimator, tokens: int, block_size: int) -> Work:
    """One training step, on average over the cache sizes at which a sequence of ``tokens`` is cut."""
    cuts = (tokens - 1) // block_size
    mean = block_size * (cuts + 1) / 2
    rows = policy.heads * mean
    step = Work(
        agent_flops=training_flops(policy) * rows,
        moved=_STEP_BYTES * sum(policy.widths) * rows + _OPTIMIZER_BYTES * policy.heads * policy.parameters_per_agent,
        kernels=_STEP_KERNELS,
    )
    if nodes := estimator.nodes:
        moved = _WEIGHT_BYTES * nodes * rows + _PLACE_BYTES * _PLACES * policy.heads
        return step + Work(agent_flops=2 * nodes**2 * rows, moved=moved, kernels=_GRID_KERNELS)
    return step + Work(moved=RANKING_BYTES * _rankings(estimator) * rows)


def _rankings(estimator: Estimator) -> int:
    """Orders that are computed: what draws none still sorts once."""
    return max(1, estimator.rankings)


def step_memory(policy: PolicyShape, estimator: Estimator, tokens: int, accelerator: bool) -> dict[str, int]:
    """Bytes of a training step at its peak on the device, by part."""
    device = "cuda" if accelerator else "cpu"
    heads = min(policy.heads, max(1, UNITS_PER_BLOCK[device] // (tokens * policy.agent.hidden_width)))
    rows = heads * tokens  # of one block of agents
    parts = {
        "agents, gradients, moments": 4 * 4 * policy.heads * policy.parameters_per_agent,
        "activations": 4 * rows * (2 * policy.widths[0] + 4 * sum(policy.widths[1:])),
    }
    if estimator.nodes:
        weights = min(WEIGHTS_PER_BLOCK[device], rows * estimator.nodes)
        # Powers, weights, their product with the importance, and the indices of the nodes.
        return parts | {"one block of the grid": 4 * 8 * weights}
    # The uniform numbers of all heads; int64 rankings, noise, ordered scores and their running sums of a block.
    return parts | {"rankings": 4 * _rankings(estimator) * (policy.heads * tokens + 8 * rows)}
