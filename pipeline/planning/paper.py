"""The paper's own training in our code, counted. It knows no params file."""

from pipeline.planning.counts import example_bytes, step_work, training_flops
from pipeline.planning.shapes import SHAPES
from pipeline.policy.agents import AgentParams, PolicyShape
from pipeline.policy.estimators.exact import Exact
from pipeline.policy.estimators.rloo import Rloo


def paper_training() -> dict[str, float]:
    """The paper's own training in our code: 112 agents, 4,000 steps, sequences of 4,500 tokens (section "Training").

    Returns
    -------
    FLOPs of the agents if every step took the whole sequence, FLOPs with cache sizes drawn uniformly, FLOPs of the
    exact estimator besides, and bytes of traces that the steps read.
    """
    shape, steps, tokens = SHAPES["Qwen2.5-7B-Instruct"], 4000, 4500
    policy = PolicyShape(
        shape.ranked_layers,
        shape.kv_heads,
        shape.head_dim,
        AgentParams(hidden_width=256, hidden_layers=2, inputs=("key", "value", "position")),
    )
    whole = float(steps * policy.heads * tokens * training_flops(policy))
    rloo, exact = (
        step_work(policy, estimator, 1, tokens / 2, accelerator=False).agent_flops * steps
        for estimator in (Rloo(samples=8), Exact())
    )
    return {
        "agents": policy.heads,
        "parameters_per_agent": policy.parameters_per_agent,
        "steps": steps,
        "tokens": tokens,
        "whole_sequence_flops": whole,
        "drawn_cache_flops": rloo,
        "exact_sums_flops": exact - rloo,
        "read_bytes": float(steps * example_bytes(shape, tokens / 2, tokens / 2)),
    }
