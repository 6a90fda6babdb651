import math
from pathlib import Path

import polars as pl
import pytest

from pipeline.errors import PipelineError
from pipeline.reporting.read import read_records, read_table, read_tables
from pipeline.tables import COST, CURVES, EVALUATION


def test_missing_files_and_columns_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="does not exist; run the stage"):
        read_tables([tmp_path / "none.parquet"], EVALUATION)
    pl.DataFrame({"model": ["x"]}).write_parquet(tmp_path / "short.parquet")
    with pytest.raises(PipelineError, match="lacks the columns cost, layer"):
        read_table(tmp_path / "short.parquet", ["model", "layer", "cost"])
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    with pytest.raises(PipelineError, match="cannot be read"):
        read_table(tmp_path / "torn.parquet", ["model"])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None, "0.5"])
@pytest.mark.parametrize(
    ("columns", "name", "where"),
    [
        (EVALUATION, "value", "policy p1, trained_on t, budget 1, benchmark 1, sample_id s1"),
        (EVALUATION, "n_tokens", "policy p1"),
        (COST, "cost", "policy p1, trained_on t, benchmark 1, sample_id s1"),
        (COST, "optimal_cost", "policy p1"),
        (CURVES, "value", "metric 1, step 1, layer 1, kv_head 1"),
    ],
)
def test_what_is_no_number_is_named_and_not_averaged(
    columns: dict[str, object], name: str, where: str, bad: float | str | None, tmp_path: Path
) -> None:
    def write(value: float | str | None) -> Path:
        rows = [
            dict.fromkeys(columns, 1) | {"policy": f"p{i}", "sample_id": f"s{i}", "trained_on": "t"} for i in range(3)
        ]
        frame = pl.DataFrame([{column: row[column] for column in columns} for row in rows])
        values = [0.5, value, 0.5] if not isinstance(value, str) else ["0.5", value, "0.5"]
        frame.with_columns(pl.Series(name, values)).write_parquet(tmp_path / "table.parquet")
        return tmp_path / "table.parquet"

    assert read_table(write(0.5), columns).height == 3
    message = f"its column {name} is String" if isinstance(bad, str) else f"{name} is not finite but {bad} for {where}"
    with pytest.raises(PipelineError, match=message) as caught:
        read_table(write(bad), columns)
    assert str(caught.value).startswith(str(tmp_path / "table.parquet"))


def test_a_torn_record_is_one_sentence_and_a_missing_one_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "there.json").write_text('{"uri": "file:x"}')
    (tmp_path / "torn.json").write_text('{"uri":')
    paths = {"there": tmp_path / "there.json", "missing": tmp_path / "missing.json"}
    assert read_records(paths) == {"there": {"uri": "file:x"}}
    with pytest.raises(PipelineError, match=r"torn\.json is no JSON"):
        read_records({"torn": tmp_path / "torn.json"})
