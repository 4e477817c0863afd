"""What the pages say runs where is what `select` answers, and the loss is inside where it has to be."""

import pytest

from fpo_jax.logprobs import coverage
from tests.paths import REPO


@pytest.mark.parametrize("name", ["docs/performance.md", "kernels/README.md"])
def test_the_table_of_the_readme_is_what_choose_answers(name):
    text = REPO.joinpath(name).read_text()
    begin, end = "<!-- what runs where: python -m fpo_jax.logprobs.coverage -->\n", "\n<!-- end of what runs where -->"
    written = text.partition(begin)[2].partition(end)[0]
    assert written == coverage.table(), f"run python -m fpo_jax.logprobs.coverage and replace the table of {name}"


def test_the_loss_is_inside_on_every_mesh_and_layout_of_what_has_kernels():
    found = {(cell.target, cell.mesh, cell.layout): cell.choice for cell in coverage.cells()}
    meshes = ("one device", "fsdp", "zero2", "tensor", "fsdp+tensor")
    for target in ("H100", "H200", "v5e", "v5p", "v6e", "v7x"):
        for mesh in meshes:
            for layout in ("padded", "packed", "shared"):
                choice = found[target, mesh, layout]
                assert choice.fuse_loss and choice.implementation.startswith("pallas_"), (target, mesh, layout, choice)
