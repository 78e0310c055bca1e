"""TensorBoard's own reader on what the tracker wrote."""

from pathlib import Path
from typing import Any

import pytest

from sftlab.common.tracker import About
from sftlab.trackers.tensorboard import markdown, tensorboard


def accumulated(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


@pytest.mark.parametrize(("step", "kept"), [(2, [0, 1, 2]), (0, [])])
def test_tensorboard_forgets_what_a_resume_makes_again(tmp_path: Path, step: int, kept: list[int]) -> None:
    about = About(tmp_path, "sft/today", chosen={"optim.lr": "1e-3", "data": "squad"})
    tracker = tensorboard(about)
    for i in range(5):
        tracker.write_numbers(i, 0.0, {"val/loss": 5.0 - i})
    tracker.write_answers(1, [{"prompt": "a *text*", "answer": "b", "references": ["c"]}])
    tracker.write_answers(2, [])
    tracker.close("stopped")
    tracker = tensorboard(about)
    tracker.cut(step)
    tracker.write_numbers(7, 0.0, {"val/loss": 0.5})
    tracker.close("finished")
    events = accumulated(tmp_path / "tensorboard/sft_today")
    assert [(e.step, e.value) for e in events.Scalars("val/loss")] == [*((i, 5.0 - i) for i in kept), (7, 0.5)]
    texts = [e.tensor_proto.string_val[0].decode() for e in events.Tensors("val/answers/text_summary")]
    assert len(texts) == 1 and "| a \\*text\\* | b | c |" in texts[0], "TensorBoard itself forgets no texts"


def test_hyperparameters_that_were_typed_and_an_order_of_groups(tmp_path: Path) -> None:
    from tensorboard.plugins.custom_scalar import layout_pb2
    from tensorboard.plugins.hparams import plugin_data_pb2

    tracker = tensorboard(About(tmp_path, "sft", chosen={"optim.lr": "1e-3", "data": "squad"}))
    tracker.write_numbers(3, 0.0, {"val/loss": 0.5, "perf/mfu": 0.4})
    tracker.close("finished")
    events = accumulated(tmp_path / "tensorboard/sft")
    found = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    typed = plugin_data_pb2.HParamsPluginData.FromString(found).session_start_info.hparams
    assert typed["optim.lr"].number_value == 1e-3 and typed["data"].string_value == "squad"
    experiment = events.summary_metadata["_hparams_/experiment"].plugin_data.content
    metrics = plugin_data_pb2.HParamsPluginData.FromString(experiment).experiment.metric_infos
    assert [m.name.tag for m in metrics] == ["val/loss"]
    (layout,) = (e.tensor_proto.string_val[0] for e in events.Tensors("custom_scalars__config__"))
    assert [c.title for c in layout_pb2.Layout.FromString(layout).category][-1] == "speed"


def test_answers_as_a_table_one_line_each() -> None:
    answers = [
        {"prompt": "Which |\n one?", "answer": "  a  b ", "references": ["a", "b | c"]},
        {"prompt": "What?", "answer": "", "references": ["d"]},
    ]
    assert markdown(answers).splitlines() == [
        "| prompt | answer | expected |",
        "| --- | --- | --- |",
        r"| Which \| one? | a b | a / b \| c |",
        "| What? |  | d |",
    ]
