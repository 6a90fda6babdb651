"""No result depends on the device that a random number was drawn on: torch's generators differ between devices."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "pipeline"
DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "Generator"}
IN_PLACE = {"normal_", "uniform_", "bernoulli_", "exponential_", "random_"}


def device_draws(source: str) -> list[int]:
    """Lines that draw on a device of the caller's choice, or from the global generator."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        name, keywords = node.func.attr, {keyword.arg for keyword in node.keywords}
        of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
        if (of_torch and name == "Generator" and (node.args or keywords)) or (
            ((of_torch and name in DRAWS - {"Generator"}) or name in IN_PLACE)
            and ("device" in keywords or "generator" not in keywords)
        ):
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_random_numbers_are_drawn_on_the_cpu(file: Path) -> None:
    assert device_draws(file.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.Generator(device=device)",
        "torch.Generator('cuda')",
        "torch.rand(3, generator=generator, device=keys.device)",
        "torch.rand(3)",
        "weight.normal_(0, 1)",
    ],
)
def test_a_draw_on_a_device_is_found(line: str) -> None:
    assert device_draws(line) == [1]
    assert device_draws("torch.rand(3, generator=torch.Generator().manual_seed(0)).to(device)") == []
