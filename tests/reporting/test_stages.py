"""The stages results and report, from files to files."""

import json
import re
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from pipeline.errors import PipelineError
from stages.report import report
from stages.results import results
from tests.reporting.synthetic import MODEL, REPOSITORY, TOKENS

DIRECTORIES = (Path("evaluations"), Path("policies"))


def _results() -> None:
    results(*DIRECTORIES, Path("params.yaml"))


def _report() -> None:
    directories = (Path(name) for name in ("results", "policies", "samples", "models", "examples"))
    report(*directories, Path("params.yaml"))


def test_results_merge_and_summarise(run_directory: Path) -> None:
    _results()
    merged = pl.read_parquet("results/evaluation.parquet")
    assert merged.height == sum(pl.read_parquet(path).height for path in run_directory.glob("evaluations/*/*/eval*"))
    scores = json.loads(Path("metrics/scores.json").read_text())
    expected = merged.filter(pl.col("benchmark") == "ruler", policy="snapkv", budget=256)["value"].mean()
    assert scores[MODEL]["ruler"]["accuracy"]["snapkv"]["budget_256"] == pytest.approx(expected, rel=1e-5)
    assert json.loads(Path("metrics/cost.json").read_text())[MODEL]["ruler"]["pooled"]["oracle"]["mean"] == 1
    assert json.loads(Path("metrics/training.json").read_text())[MODEL]["ruler"]["exact_steps_to_rloo"] <= 60
    accuracy = pl.read_csv("plots/accuracy_vs_budget.csv")
    assert accuracy.filter(policy="full").height == 6
    template = json.loads((REPOSITORY / "plots/templates/policies.json").read_text())
    assert template["data"]["values"] == "<DVC_METRIC_DATA>"
    for file in Path("plots").glob("*.csv"):
        assert {"panel", "series"} <= set(pl.read_csv(file).columns)


def test_results_twice_give_the_same_bytes(run_directory: Path) -> None:
    _results()
    files = [path for name in ("metrics", "plots", "results") for path in sorted(Path(name).iterdir())]
    first = [path.read_bytes() for path in files]
    _results()
    assert first == [path.read_bytes() for path in files]


def test_the_page_stands_alone_and_says_what_it_shows(run_directory: Path) -> None:
    _results()
    Path("reports/figures").mkdir(parents=True)
    Path("reports/figures/stale.png").write_bytes(b"")
    _report()
    page = Path("reports/index.html").read_text()
    figures = sorted(Path("reports/figures").iterdir())
    assert page.count('src="data:image/png;base64,') == len(figures) == 13
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|<script[^>]* src", page)
    (block,) = re.findall(r'<script type="application/json" id="token-data">(.*?)</script>', page, re.DOTALL)
    assert [one["tokens"] for one in json.loads(block)["texts"]] == [TOKENS] * 3
    for text in (
        "The model smollm2-135m stands in for Qwen2.5-7B-Instruct.",
        "The corpus Doc2Dial dialogues stands in for OASST2-4k.",
        "Regenerates the paper's figure 13.",
        "niah_multikey_3",
        "CC BY-SA 4.0",
        "KVP_R exact minus baseline",
        "48, 96, 160, 256, 384, 512",
    ):
        assert text in page
    accuracy = json.loads(Path("metrics/scores.json").read_text())[MODEL]["ruler"]["accuracy"]["snapkv"]["budget_96"]
    row = page[page.index("RULER: accuracy per budget") :].partition("<td>SnapKV</td>")[2].partition("</tr>")[0]
    assert f"<td>{accuracy:.2f}<small>" in row


def test_the_report_without_results_is_one_sentence(run_directory: Path) -> None:
    with pytest.raises(PipelineError, match=r"evaluation\.parquet does not exist"):
        _report()


def test_help_is_instant_and_imports_nothing_heavy() -> None:
    for stage in ("results", "report", "track"):
        code = (
            f"import sys, stages.{stage}; sys.exit(any(m in sys.modules for m in ('polars', 'mlflow', 'matplotlib')))"
        )
        assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


def test_one_corpus_and_one_estimator_are_enough(run_directory: Path) -> None:
    text = Path("params.yaml").read_text()
    text = re.sub(r"(?m)^  (corpus|benchmark): .*$", r"  \1: [ruler]", text)
    Path("params.yaml").write_text(re.sub(r"(?m)^  estimator: .*$", "  estimator: [rloo]", text))
    # As the stages evaluate and examples would have written it.
    for name in ("evaluations/{}/ruler/evaluation", "evaluations/{}/ruler/cost", "examples/{}/ruler/tokens"):
        path = Path(f"{name.format(MODEL)}.parquet")
        frame = pl.read_parquet(path)
        frame.filter(pl.col("policy") != "kvp-exact", pl.col("trained_on").fill_null("") != "dialogues").write_parquet(
            path
        )
    _results()
    _report()
    page = Path("reports/index.html").read_text()
    assert "KVP_R rloo minus baseline" in page
    assert "KVP_S rloo" not in page
    assert pl.read_csv("plots/perplexity_vs_budget.csv").is_empty()
