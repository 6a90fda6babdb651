"""The model card that lies next to every policy, written from its config. It knows no results."""

import json
from pathlib import Path
from typing import Any

from pipeline.policy.agents import CONFIG_FILE


def model_card(directory: Path) -> str:
    """Markdown for a policy directory: what it is, what it was trained on, how to use it."""
    config = json.loads((directory / CONFIG_FILE).read_text())
    train, agent = config["params"], config["agent"]
    rows: dict[str, Any] = {
        "agents": f"{config['layers']} layers x {config['kv_heads']} KV heads",
        **_ranked_layers(config["trace_shape"]["layer_numbers"]),
        "parameters per agent": f"{config['parameters_per_agent']:,}",
        "agent": f"MLP, {agent['hidden_layers']} hidden layers of {agent['hidden_width']}",
        "sees of a token": ", ".join(agent["inputs"]),
        "estimator": config["estimator"],
        "training": f"{train['steps']} steps, learning rate {train['learning_rate']:g}, seed {train['seed']}",
        "training sequences": config["training_sequences"],
        "fingerprint of the traces": config["trace_fingerprint"][:16],
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""# Eviction policy for {config["model"]}, trained on {config["trained_on"]} ({config["estimator"]})

Ranks the tokens of each KV head's cache from keys, values and positions alone, as in "Learning to Evict
from Key-Value Cache" (arXiv 2602.10238). One ranking serves every budget.

| | |
|---|---|
{table}

```python
from pipeline.eviction.press import KVPPress

directory = "policies/{config["model"]}/{config["trained_on"]}/{config["estimator"]}"
with KVPPress(compression_ratio=0.75, policy_directory=directory)(model):
    model(input_ids, past_key_values=cache)
```

It fits the cache of this model only. Rankings learned on one kind of text carry over to others to the
degree that the project's report shows.
"""


def _ranked_layers(numbers: list[int]) -> dict[str, str]:
    # Only worth a line where the model has other layers in between, which slide over a window.
    if list(numbers) == list(range(len(numbers))):
        return {}
    return {"ranked layers": f"{', '.join(map(str, numbers))} of the model; the others slide over a window and keep it"}
