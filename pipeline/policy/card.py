"""The model card that lies next to every policy, written from its config. It knows no results."""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from pipeline.files import atomic_write
from pipeline.policy.agents import CONFIG_FILE

# What a policy's config must say beside the shapes of its tensors.
CARD_KEYS = (
    "model",
    "trained_on",
    "estimator",
    "params",
    "trace_shape",
    "training_sequences",
    "trace_fingerprint",
    "held_out_cost",
)


def model_card(directory: Path, licence: str | None = None) -> str:
    """Markdown for a policy directory: what it is, what it was trained on, how to use it.

    ``licence`` is the hub's name of one, for a policy that is given to others.
    """
    config = json.loads((directory / CONFIG_FILE).read_text())
    train, agent, costs = config["params"], config["agent"], config["held_out_cost"]
    rows: dict[str, Any] = {
        "agents": f"{config['layers']} layers x {config['kv_heads']} KV heads of dimension {config['head_dim']}",
        **_ranked_layers(config["trace_shape"]["layer_numbers"]),
        "parameters per agent": f"{config['parameters_per_agent']:,}",
        "agent": f"MLP, {agent['hidden_layers']} hidden layers of {agent['hidden_width']}",
        "sees of a token": ", ".join(agent["inputs"]),
        "estimator": config["estimator"],
        "training": f"{train['steps']} steps, learning rate {train['learning_rate']:g}, seed {train['seed']}",
        "training sequences": config["training_sequences"],
        "fingerprint of the traces": config["trace_fingerprint"][:16],
        "held-out cost, 1 = the best order": f"{fmean(costs):.3f} (heads: {min(costs):.3f} to {max(costs):.3f})",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    trained_on = f"{config['trained_on']} ({config['estimator']})"
    return f"""{_front_matter(licence)}# Eviction policy for {config["model"]}, trained on {trained_on}

Ranks the tokens of each KV head's cache from keys, values and positions alone, as in "Learning to Evict
from Key-Value Cache" (arXiv 2602.10238). One ranking serves every budget.

| | |
|---|---|
{table}
{_figure(directory)}
```python
from pipeline.eviction.cache import KVPCache
from pipeline.policy.agents import Policy

policy = Policy.from_pretrained("policies/{config["model"]}/{config["trained_on"]}/{config["estimator"]}")
model.generate(**inputs, past_key_values=KVPCache(policy, budget=512, model=model))
```

It fits the cache of this model only. Rankings learned on one kind of text carry over to others to the
degree that the project's report shows.

<details><summary>Held-out cost of each head</summary>

{_cost_table(config)}
</details>
"""


def draw_costs(config: Mapping[str, Any], path: Path) -> None:
    """The held-out cost of every head, layers from left to right, as a PNG."""
    from matplotlib.figure import Figure

    layers, kv_heads = config["layers"], config["kv_heads"]
    figure = Figure(figsize=(1.5 + 0.22 * layers, 1.2 + 0.22 * kv_heads), layout="constrained")
    axes = figure.subplots()
    costs = config["held_out_cost"]
    image = axes.imshow([costs[head::kv_heads] for head in range(kv_heads)], vmin=1, cmap="viridis_r", aspect="equal")
    numbers = config["trace_shape"]["layer_numbers"]
    axes.set_xticks(range(0, layers, 5), [str(number) for number in numbers[::5]])
    axes.set_yticks(range(kv_heads))
    axes.set_xlabel("layer")
    axes.set_ylabel("KV head")
    figure.colorbar(image, label="held-out cost, 1 = best order")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _front_matter(licence: str | None) -> str:
    # What the hub files a repository under.
    named = f"license: {licence}\n" if licence else ""
    return f"---\n{named}tags:\n- kv-cache\n- kv-cache-eviction\n---\n\n"


def _figure(directory: Path) -> str:
    return "\n![held-out cost of each head](costs.png)\n" if (directory / "costs.png").is_file() else ""


def _cost_table(config: Mapping[str, Any]) -> str:
    kv_heads, costs = config["kv_heads"], config["held_out_cost"]
    lines = [
        " | ".join(["| layer", *(f"KV head {head}" for head in range(kv_heads))]) + " |",
        "|---" * (kv_heads + 1) + "|",
    ]
    for index, number in enumerate(config["trace_shape"]["layer_numbers"]):
        row = costs[index * kv_heads : (index + 1) * kv_heads]
        lines.append(" | ".join([f"| {number}", *(f"{cost:.3f}" for cost in row)]) + " |")
    return "\n".join(lines)


def _ranked_layers(numbers: list[int]) -> dict[str, str]:
    # Only worth a line where the model has other layers in between, which slide over a window.
    if list(numbers) == list(range(len(numbers))):
        return {}
    return {"ranked layers": f"{', '.join(map(str, numbers))} of the model; the others slide over a window and keep it"}
