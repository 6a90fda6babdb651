"""The stages results and report, from files to files."""

import json
import re
import shutil
from pathlib import Path

import polars as pl
import pytest

from pipeline.errors import PipelineError
from stages.report import main as report
from stages.results import main as results
from tests.reporting.synthetic import MODEL, REPOSITORY, TOKENS


def test_results_merge_and_summarise(run_directory: Path) -> None:
    results()
    merged = pl.read_parquet("results/evaluation.parquet")
    assert merged.height == sum(pl.read_parquet(path).height for path in run_directory.glob("scores/*/*"))
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
    results()
    files = [path for name in ("metrics", "plots", "results") for path in sorted(Path(name).iterdir())]
    first = [path.read_bytes() for path in files]
    results()
    assert first == [path.read_bytes() for path in files]


def test_the_page_stands_alone_and_says_what_it_shows(run_directory: Path) -> None:
    results()
    Path("reports/figures").mkdir(parents=True)
    Path("reports/figures/stale.png").write_bytes(b"")
    report()
    page = Path("reports/index.html").read_text()
    figures = sorted(Path("reports/figures").iterdir())
    assert page.count('src="data:image/png;base64,') == len(figures) == 13
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|<script[^>]* src", page)
    (block,) = re.findall(r'<script type="application/json" id="token-data">(.*?)</script>', page, re.DOTALL)
    assert [one["tokens"] for one in json.loads(block)["texts"]] == [TOKENS] * 3
    for text in (
        "The model smollm2-135m stands in for Qwen2.5-7B-Instruct.",
        "The benchmark Doc2Dial dialogues stands in for OASST2-4k.",
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
        report()


def keep_only(benchmark: str, estimator: str) -> None:
    """A smaller matrix, and its tables as the stages score, evaluate and texts would have written them."""
    text = Path("params.yaml").read_text()
    text = re.sub(r"(?m)^  (trained_on|benchmark): .*$", rf"  \1: [{benchmark}]", text)
    Path("params.yaml").write_text(re.sub(r"(?m)^  estimator: .*$", f"  estimator: [{estimator}]", text))
    for name in ("scores/{}/{}", "answers/{}/{}/cost", "texts/{}/{}/tokens"):
        path = Path(f"{name.format(MODEL, benchmark)}.parquet")
        kept = ~pl.col("policy").str.starts_with("kvp-") | (
            (pl.col("policy") == f"kvp-{estimator}") & (pl.col("trained_on") == benchmark)
        )
        pl.read_parquet(path).filter(kept).write_parquet(path)


def test_one_benchmark_and_one_estimator_are_enough(run_directory: Path) -> None:
    keep_only("ruler", "rloo")
    results()
    report()
    page = Path("reports/index.html").read_text()
    assert "KVP_R rloo minus baseline" in page
    assert "KVP_S rloo" not in page
    assert pl.read_csv("plots/perplexity_vs_budget.csv").is_empty()


def test_only_entries_of_the_matrix_are_read(run_directory: Path) -> None:
    shutil.copy(f"scores/{MODEL}/ruler.parquet", f"scores/{MODEL}/dropped.parquet")
    keep_only("dialogues", "exact")
    results()
    assert pl.read_parquet("results/evaluation.parquet")["benchmark"].unique().to_list() == ["dialogues"]
    assert pl.read_parquet("results/cost.parquet")["benchmark"].unique().to_list() == ["dialogues"]


def test_an_unknown_policy_stops_both_stages(run_directory: Path) -> None:
    path = Path(f"scores/{MODEL}/ruler.parquet")
    table = pl.read_parquet(path)
    table.with_columns(pl.col("policy").replace({"lagkv": "h2o"})).write_parquet(path)
    with pytest.raises(PipelineError, match=r"policy h2o, which is not in params\.yaml; known: full, oracle, kvp-"):
        results()
    table.write_parquet(path)
    results()
    path = Path("results/evaluation.parquet")
    pl.read_parquet(path).with_columns(pl.col("policy").replace({"lagkv": "h2o"})).write_parquet(path)
    with pytest.raises(PipelineError, match=r"policy h2o, which is not in params\.yaml; known: full, oracle, kvp-"):
        report()
