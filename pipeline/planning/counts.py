"""Bytes, FLOPs and memory of the pipeline's pieces, from shapes. It knows neither devices' speed nor params files.

Bytes of traces, policies and evicted caches and the FLOPs of matrix products follow from the code they count and are
tested against it. Passes over memory are counted by reading that code, at whole tensors.
"""

import math
from collections.abc import Sequence

from pipeline.planning.devices import Work
from pipeline.planning.shapes import ModelShape
from pipeline.policy.agents import UNITS_PER_BLOCK, PolicyShape
from pipeline.policy.estimators.base import Estimator
from pipeline.policy.estimators.exact import DIRECT_UP_TO, PAIRS_PER_BLOCK, WEIGHTS_PER_BLOCK
from pipeline.traces.capture import ALIGNMENT, queries_at_once

# Share of a key or value that compression leaves in trace files: 0.90 to 0.93 on the default profile. Of a token
# besides: position, importance and probability. Of a head: its best cost. And the headers and metadata of a row group.
_COMPRESSED, _TOKEN_BYTES, _HEAD_BYTES, _ROW_GROUP_BYTES = 0.93, 9, 40, 1050
# Passes of a layer over its hidden states (norms, rotations, residuals) and over its MLP's (activation, product).
_HIDDEN_PASSES, _INTERMEDIATE_PASSES = 24, 6
# Operations of one layer of a transformers model, and what capture adds for a chunk of queries.
LAYER_KERNELS, _CHUNK_KERNELS = 45, 12
# Bytes moved per unit of an agent's input and hidden layers: scoring, and a training step's forward and backward.
_SCORE_BYTES, _STEP_BYTES = 16, 36
# Bytes moved per parameter by storing the gradient (8), clipping (20) and fused AdamW (28), and per token that is
# sorted, gathered and summed up.
_OPTIMIZER_BYTES, RANKING_BYTES = 56, 1000
# The exact estimator, float64: bytes moved per weight of a token on its grid nodes (powers, product, indices, spread
# and gathered back twice); bytes per place of a head's transforms, two there and three back, and the places where
# scores are spread over less than 31.
_WEIGHT_BYTES, _PLACE_BYTES, _PLACES, _GRID_KERNELS = 200, 160, 1024, 50
# The same pair by pair, float32: bytes moved per pair, and operations of a block.
_PAIR_BYTES, _DIRECT_KERNELS = 36, 25
_STEP_KERNELS, _SCORE_KERNELS = 150, 20


def example_bytes(shape: ModelShape, cache_size: float, known: float) -> float:
    """Bytes of one example in the trace files: all heads, all columns (``pipeline/traces/shards.py``).

    ``known`` tokens of each head lie in it, and the importance of all ``cache_size``.
    """
    head = known * (_COMPRESSED * 2 * 2 * shape.head_dim + _TOKEN_BYTES) + 4 * cache_size + _HEAD_BYTES
    return shape.heads * head + 2 * shape.ranked_layers * _ROW_GROUP_BYTES


def decoded_bytes(shape: ModelShape, known: float) -> float:
    """Bytes of an example as ``ExampleReader`` keeps it, the fullest head as long as the others."""
    return shape.heads * (known * (2 * 2 * shape.head_dim + 12) + 4)


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


def capture_work(shape: ModelShape, tokens: int, item_bytes: int, recorded: float, accelerator: bool) -> Work:
    """One run over a sequence (``pipeline/traces/capture.py``).

    ``recorded`` is the share of all pairs of a query and a token before it whose attention is added up.
    """
    together = 1 if accelerator else shape.kv_heads  # passes over the queries: all KV heads at once, or one by one
    plain = tokens * math.sqrt(1 - recorded)  # queries that go through the fused kernel
    rows = tokens - plain
    size = min(rows, _at_once(shape, tokens, accelerator))
    # A chunk looks at all keys up to its end, so at half a chunk's more than it needs, and the last one at some more.
    pairs = (rows * (tokens + plain) + rows * size) / 2 + (tokens % size or size if size else 0) * (-tokens % ALIGNMENT)
    chunked = shape.query_heads * shape.ranked_layers * pairs
    fused = shape.query_heads * (
        shape.ranked_layers * plain**2 / 2
        + (shape.layers - shape.ranked_layers) * min(tokens / 2, shape.window) * tokens
    )
    # Product, softmax in float32, product, maximum over the group's query heads, sum; in a lower precision also
    # scaling and a cast. What is fused stays in a processor's cache.
    pair_bytes = (20 if item_bytes == 4 else 28 + 2 * item_bytes) + 8 * shape.kv_heads / shape.query_heads
    token_bytes = item_bytes * (_HIDDEN_PASSES * shape.hidden + _INTERMEDIATE_PASSES * shape.intermediate)
    return Work(
        # The output embedding answers for the last token alone.
        flops=2 * shape.layers * shape.layer_weights * tokens
        + 4 * shape.head_dim * (chunked + fused)
        + 2 * shape.hidden * shape.vocabulary,
        moved=pair_bytes * chunked + shape.layers * tokens * token_bytes,
        kernels=shape.layers * LAYER_KERNELS
        + (shape.ranked_layers * together * math.ceil(rows / size) * _CHUNK_KERNELS if rows else 0),
    )


def capture_memory(shape: ModelShape, tokens: int, item_bytes: int, cuts: int, accelerator: bool) -> dict[str, int]:
    """Bytes of such a run at its peak, by part, with the importance at so many ``cuts``."""
    heads = shape.query_heads if accelerator else shape.query_heads // shape.kv_heads
    chunk = heads * tokens * min(tokens, _at_once(shape, tokens, accelerator))
    return {
        "weights": shape.parameters * item_bytes,
        # Layers that slide over a window keep every token during a capture, like the others.
        "cache": 2 * shape.layers * shape.kv_heads * shape.head_dim * tokens * item_bytes,
        "importances": 4 * cuts * shape.heads * tokens,
        # Logits in float32, where the weights will be, beside those of the chunk before, which are fewer, and as they
        # were cast.
        "one chunk of attention": chunk * (7 if item_bytes == 4 else 7 + item_bytes),
        "activations": tokens * (4 * shape.hidden + 3 * shape.intermediate) * item_bytes,
    }


def _at_once(shape: ModelShape, tokens: int, accelerator: bool) -> int:
    """Queries of a chunk: of all query heads on an accelerator, of one KV head's on a CPU."""
    heads = shape.query_heads if accelerator else shape.query_heads // shape.kv_heads
    return queries_at_once(heads * tokens, "cuda" if accelerator else "cpu")


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


def step_work(policy: PolicyShape, estimator: Estimator, examples: int, tokens: float, accelerator: bool) -> Work:
    """One training step in which every agent scores so many ``tokens`` of each of the ``examples``."""
    rows = policy.heads * examples * tokens
    step = Work(
        agent_flops=training_flops(policy) * rows,
        moved=_STEP_BYTES * sum(policy.widths) * rows + _OPTIMIZER_BYTES * policy.heads * policy.parameters_per_agent,
        kernels=_STEP_KERNELS,
    )
    if estimator.nodes and accelerator and tokens <= DIRECT_UP_TO["cuda"]:
        return step + Work(agent_flops=6 * tokens * rows, moved=_PAIR_BYTES * tokens * rows, kernels=_DIRECT_KERNELS)
    if nodes := estimator.nodes:
        moved = _WEIGHT_BYTES * nodes * rows + _PLACE_BYTES * _PLACES * policy.heads
        return step + Work(agent_flops=2 * nodes**2 * rows, moved=moved, kernels=_GRID_KERNELS)
    return step + Work(moved=RANKING_BYTES * _rankings(estimator) * rows)


def _rankings(estimator: Estimator) -> int:
    """Orders that are computed: what draws none still sorts once."""
    return max(1, estimator.rankings)


def step_memory(
    policy: PolicyShape, estimator: Estimator, examples: int, tokens: int, accelerator: bool
) -> dict[str, int]:
    """Bytes of a training step at its peak on the device, by part."""
    pairs = examples * tokens**2  # of one agent
    tokens *= examples
    device = "cuda" if accelerator else "cpu"
    heads = min(policy.heads, max(1, UNITS_PER_BLOCK[device] // (tokens * policy.agent.hidden_width)))
    rows = heads * tokens  # of one block of agents
    parts = {
        "agents, gradients, moments": 4 * 4 * policy.heads * policy.parameters_per_agent,
        "activations": 4 * rows * (2 * policy.widths[0] + 4 * sum(policy.widths[1:])),
    }
    if estimator.nodes and accelerator and tokens <= examples * DIRECT_UP_TO["cuda"]:
        # Their probabilities, which become slopes in place.
        return parts | {"one block of pairs": 4 * min(PAIRS_PER_BLOCK[device], heads * pairs)}
    if estimator.nodes:
        weights = min(WEIGHTS_PER_BLOCK[device], rows * estimator.nodes)
        # Powers, weights, their product with the importance, and the indices of the nodes.
        return parts | {"one block of the grid": 4 * 8 * weights}
    # The uniform numbers of all heads; int64 rankings, noise, ordered scores and their running sums of a block.
    return parts | {"rankings": 4 * _rankings(estimator) * (policy.heads * tokens + 8 * rows)}
