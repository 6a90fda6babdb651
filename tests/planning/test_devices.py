"""Work in seconds."""

import pytest

from pipeline.planning.devices import DEVICES, Device, Work

WORK = Work(flops=100, agent_flops=20, moved=300, kernels=4, written=50, read=700)


def device(accelerator: bool) -> Device:
    flops = {"float32": 10.0, "bfloat16": 50.0}
    return Device("made up", accelerator, flops, memory=100, kernel=0.5, write=25, read=100, commit=1, start=1)


def test_the_host_reads_before_it_computes() -> None:
    # 100/50 + 20/10 + 300/100 + 4 * 0.5 = 9 s of computing, 7 s of reading, 2 s of writing
    assert WORK.seconds(device(False), "bfloat16") == pytest.approx(9 + 7 + 2)
    assert WORK.seconds(device(False), "float32") == pytest.approx(17 + 7 + 2)


def test_an_accelerator_computes_while_the_host_reads() -> None:
    assert WORK.seconds(device(True), "bfloat16") == pytest.approx(9 + 2)
    assert (WORK + Work(read=700)).seconds(device(True), "bfloat16") == pytest.approx(14 + 2)


def test_work_adds_up() -> None:
    assert WORK * 3 == WORK + WORK + WORK
    assert Work() == WORK * 0


@pytest.mark.parametrize("name", DEVICES)
def test_every_device_has_rates_for_every_dtype_and_says_whence(name: str) -> None:
    assert set(DEVICES[name].flops) == {"float32", "bfloat16", "float16"}
    assert DEVICES[name].source.startswith(("measured", "an estimate, not measured"))
