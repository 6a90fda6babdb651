"""How long the check of a model takes, and how much memory: SmolLM2, or a model of random weights (``--random``).

The check itself (``pipeline/evaluation/selfcheck.py``), loading aside: about ten forwards of a few hundred tokens in
float32, two greedy decodings, and once more in the dtype that is used. Beside it stands one plain forward of as many
tokens, in float32, by the model itself.
"""

import resource
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from perf.measure import benchmark_model, write_result
from pipeline.evaluation.selfcheck import check_model
from pipeline.models.forward import run_model


def main(
    model_directory: Annotated[Path, typer.Option(help="What the model stage wrote.")] = Path("models/smollm2-135m"),
    random: Annotated[str, typer.Option(help="A model of random weights instead (perf/measure.py).")] = "",
    device: str = "cpu",
    dtype: Annotated[str, typer.Option(help="What the model is used in.")] = "bfloat16",
) -> None:
    """Check one model once."""
    model = benchmark_model(random, model_directory, device)
    ids = torch.randint(model.config.vocab_size, (1, 184), generator=torch.Generator().manual_seed(0))
    run_model(model, ids, None, 0, 1)  # what the first call leaves is no part of it
    started = time.perf_counter()
    run_model(model, ids, None, 0, 1)
    plain = time.perf_counter() - started
    differences: dict[str, float] = {}
    started = time.perf_counter()
    found = check_model(model, random or model_directory.name, dtype, report=differences.__setitem__)
    seconds = time.perf_counter() - started
    on_gpu = torch.device(device).type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"{found.model}: {found.verdict} after {seconds:.1f} s, {seconds / plain:.0f} plain forwards of 184 tokens, "
        f"peak memory {peak / 1e9:.1f} GB; largest differences {differences}"
    )
    content = {"model": found.model, "dtype": dtype, "seconds": seconds, "plain_forward_seconds": plain}
    print(write_result("check", device, {**content, "peak_bytes": peak, "differences": differences}))


if __name__ == "__main__":
    typer.run(main)
