"""Work in seconds."""

import json
from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.planning.devices import DEVICES, Device, Work, measured

WORK = Work(flops=100, agent_flops=20, moved=300, kernels=4, written=50, read=700)


def device(accelerator: bool) -> Device:
    flops = {"float32": 10.0, "bfloat16": 50.0}
    return Device(
        "made-up", {}, accelerator, flops, memory=100, kernel=0.5, write=25, read=100, commit=1, start=1, cores=2
    )


def test_the_host_reads_before_it_computes() -> None:
    # 100/50 + 20/10 + 300/100 + 4 * 0.5 = 9 s of computing, 7 s of reading, 2 s of writing
    assert WORK.seconds(device(False), "bfloat16") == pytest.approx(9 + 7 + 2)
    assert WORK.seconds(device(False), "float32") == pytest.approx(17 + 7 + 2)


def test_an_accelerator_computes_while_the_host_reads_and_writes() -> None:
    assert (WORK + Work(moved=100)).seconds(device(True), "bfloat16") == pytest.approx(10)
    assert WORK.seconds(device(True), "bfloat16") == pytest.approx(7 + 2)
    assert (WORK + Work(read=700)).seconds(device(True), "bfloat16") == pytest.approx(14 + 2)


def test_starting_operations_hides_behind_an_accelerator_s_work() -> None:
    # 7 s of computing hide 2 s of starting operations, and of 20 s they leave 13.
    queued = WORK.queued(device(True), "bfloat16")
    assert queued == Work(flops=100, agent_flops=20, moved=300, written=50, read=700)
    assert (WORK + Work(kernels=36)).queued(device(True), "bfloat16").kernels == pytest.approx(13 / 0.5)
    assert WORK.queued(device(False), "bfloat16") == WORK


def test_a_share_starts_as_many_operations() -> None:
    assert WORK.shared(0.25) + Work(kernels=-3) == WORK * 0.25


def test_work_adds_up() -> None:
    assert WORK * 3 == WORK + WORK + WORK
    assert Work() == WORK * 0


@pytest.mark.parametrize("name", DEVICES)
def test_every_device_has_rates_for_every_dtype_and_says_whence(name: str) -> None:
    assert set(DEVICES[name].flops) == {"float32", "bfloat16", "float16"}
    rates = {f"flops.{dtype}" for dtype in DEVICES[name].flops}
    assert set(DEVICES[name].origins) == rates | {"memory", "kernel", "write", "read", "commit", "start"}
    for origin in DEVICES[name].origins.values():
        assert origin.startswith(("measured", "estimated"))


def test_measured_rates_replace_estimates(tmp_path: Path) -> None:
    before = DEVICES["h100"]
    assert measured(before, tmp_path) == before
    content = {"machine": {"gpu": "H100 PCIe", "processor": "x"}, "rates": {"memory": 1.5e12, "flops.bfloat16": 3e14}}
    (tmp_path / "rates-h100.json").write_text(json.dumps(content))
    after = measured(before, tmp_path)
    assert (after.memory, after.flops["bfloat16"]) == (1.5e12, 3e14)
    assert (after.kernel, after.flops["float32"]) == (before.kernel, before.flops["float32"])
    assert after.origins["memory"] == "measured on H100 PCIe by perf/rates.py (rates-h100.json)"
    assert after.origins["kernel"] == before.origins["kernel"]


@pytest.mark.parametrize("content", ["", "[]", '{"machine": {}, "rates": {}}', '{"machine": {"gpu": "x"}}'])
def test_a_damaged_file_of_rates_is_one_sentence(content: str, tmp_path: Path) -> None:
    (tmp_path / "rates-cpu.json").write_text(content)
    with pytest.raises(PipelineError, match=r"rates-cpu\.json holds no rates .* python -m perf\.rates\.$"):
        measured(DEVICES["cpu-2-cores"], tmp_path)
