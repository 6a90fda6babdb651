"""The report as one HTML file without network access: images, style and the one script inline. It makes no table.

The words of the page are in ``page.html.jinja``. Without scripts all of it can be read but the block of coloured
texts (``texts.html.jinja``).
"""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import polars as pl

from pipeline.reporting.drawing import Drawing
from pipeline.reporting.findings import headline
from pipeline.reporting.number_tables import number_tables
from pipeline.reporting.numbers import Numbers
from pipeline.reporting.run import Run
from pipeline.reporting.setup_tables import Records, licence_table, setup_tables, stand_ins

TEMPLATES = Path(__file__).parent
TITLE = "Learned KV-cache eviction: what this run shows"
INTRODUCTION = (
    "A small policy per attention head ranks the tokens of a key-value cache once, by how much attention they will "
    "still receive; any budget then keeps a prefix of that ranking (Moschella, Manduchi and Sener, Learning to Evict "
    "from Key-Value Cache, arXiv 2602.10238). This page compares such policies, KVP_R trained on RULER and KVP_S "
    "trained on dialogues, with other ways to evict. The rloo estimator is the paper's; the exact one computes the "
    "same policy gradient in closed form."
)


def render(
    run: Run,
    numbers: Numbers,
    prompts: pl.DataFrame,
    drawings: Sequence[tuple[Drawing, Path]],
    recorded: Records,
    texts: dict[str, Any],
) -> str:
    """The page.

    Parameters
    ----------
    prompts
        Lengths of prompts (``read.read_prompts``).
    drawings
        Figures with the PNG each was drawn to.
    texts
        The block of coloured texts (``texts.page_block``).
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    evaluated = dict(numbers.scores.group_by("benchmark").agg(pl.col("samples").max()).iter_rows())
    several_tasks = not numbers.tasks.is_empty()
    return environment.get_template("page.html.jinja").render(
        title=TITLE,
        introduction=INTRODUCTION,
        findings=headline(numbers, run.styles),
        confidence=f"{run.report.confidence:.0%}",
        resamples=f"{run.report.bootstrap_samples:,}",
        stratified=", drawn within each task, tasks of one sample together" if several_tasks else "",
        setup=setup_tables(run, evaluated, prompts, recorded),
        stand_ins=stand_ins(run),
        figures=[(drawing, base64.b64encode(path.read_bytes()).decode()) for drawing, path in drawings],
        texts=texts,
        tables=number_tables(numbers, run),
        licences=licence_table(run, recorded),
    )
