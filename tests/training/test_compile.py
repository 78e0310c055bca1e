"""What a run compiles: how much, when, and nothing while it answers."""

from functools import partialmethod
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from sftlab.training.build import compiles
from sftlab.training.trainer import Trainer
from tests.runs import compose, run_here


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # inside Dynamo
def test_gauntlet_46_a_run_compiles_at_most_four_graphs_and_none_after_warm_up(
    tmp_path: Path, model_folder: Path, squad_files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dynamo's guards decide what is compiled, whatever the backend; a CPU's FlexAttention has no backward."""
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    graphs: list[int] = []
    real = Trainer.train_step

    def counted(self: Trainer, step: int, data: object) -> dict[str, float]:
        values = real(self, step, data)  # type: ignore[arg-type]
        graphs.append(counters["stats"]["unique_graphs"])
        return values

    monkeypatch.setattr(Trainer, "train_step", counted)
    torch.compiler.reset()
    counters.clear()
    config = compose(
        tmp_path / "run",
        model_folder,
        squad_files,
        "trainer.compile=true",
        "model.attention=sdpa",
        "trainer.batch_size=5",
        "trainer.max_steps=12",
        "trainer.eval_every=4",
        "data.row_length=256",
    )
    assert run_here(config).startswith("score")
    assert len(graphs) == 12 and graphs[0] >= 1 and counters["stats"]["unique_graphs"] <= 4
    assert graphs[4:] == [graphs[4]] * 8 and counters["stats"]["unique_graphs"] == graphs[-1]


def test_auto_compiles_on_cuda_where_triton_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    for there in (True, False):
        monkeypatch.setattr("sftlab.training.build.has_triton", lambda there=there: there)
        assert (compiles("auto", cpu), compiles("auto", cuda)) == (False, there)
        assert compiles(True, cpu) is True and compiles(False, cuda) is False
