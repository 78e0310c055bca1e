"""What a run compiles: how much, when, and nothing while it answers."""

import re
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from sftlab.training.arriving import Arriving
from sftlab.training.sharded_model import compiles
from sftlab.training.trainer import Trainer
from tests.runs import compose, run_here


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # inside Dynamo
def test_gauntlet_46_a_run_compiles_its_blocks_once_and_nothing_after_warm_up(
    tmp_path: Path, model_folder: Path, squad_files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dynamo's guards decide what is compiled, whatever the backend; a CPU's FlexAttention has no backward."""
    compiled: list[Any] = []

    def op_by_op(graph: Any, given: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=op_by_op))  # of blocks
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))  # the loss
    graphs: list[int] = []
    laid_out: list[Any] = []
    real = Trainer.train_step

    def counted(self: Trainer, step: int, data: object) -> Arriving:
        laid_out.append(data)
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
        "trainer.batch_size=11",
        "data.layout=packed",
        "data.row_length=512",
        "trainer.max_steps=12",
        "trainer.eval_every=4",
    )
    assert run_here(config).startswith("score")
    assert graphs == [counters["stats"]["unique_graphs"]] * 12, "all is compiled before the first step"
    assert len(compiled) == 1, "the blocks, for every length, for training and for evaluation"
    log = (tmp_path / "run" / "train.log").read_text()
    assert re.findall(r"compiled .*", log) == [re.search(r"compiled 2 graphs in \d+ s", log)[0]]  # type: ignore[index]
    lengths = {len(b.tokens[0]) for step in laid_out for b in step.microbatches}
    assert len(lengths) > 2, f"the lengths of the run differ: {lengths}"


def test_auto_compiles_on_cuda_where_triton_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    for there in (True, False):
        monkeypatch.setattr("sftlab.training.sharded_model.has_triton", lambda there=there: there)
        assert (compiles("auto", cpu), compiles("auto", cuda)) == (False, there)
        assert compiles(True, cpu) is True and compiles(False, cuda) is False
