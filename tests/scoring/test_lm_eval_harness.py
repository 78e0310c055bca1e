"""What is made of the harness's results: its numbers under its names, a line for each document."""

from typing import Any

from sftlab.scoring.lm_eval_harness import lines_of, numbers


def test_numbers_keep_the_harness_s_names_and_leave_out_what_is_no_number() -> None:
    result = {"alias": "keepers", "acc,none": 0.5, "acc_stderr,none": "N/A", "em,strict": 1, "samples": 3}
    assert numbers(result) == {"acc": 0.5, "em,strict": 1.0}


def sample(doc: int, kind: str, **more: Any) -> dict[str, Any]:
    own = {"doc_id": doc, "filter": kind, "arguments": [(f"prompt {doc}", " a"), ("other", " b")], "target": doc + 10}
    return own | {"metrics": ["acc", "em", "odd"], "filtered_resps": [f"answer {doc}"], "odd": [1]} | more


def test_a_document_has_one_line_with_the_scores_of_all_its_filters() -> None:
    """The documents come out of order, each once for every filter; a metric may be no number, or missing."""
    samples = [sample(2, "none", acc=1), sample(0, "strict", em=0.5), sample(0, "none", acc=0, em=1.0)]
    assert lines_of(samples) == [
        {
            "index": 0,
            "prompt": "prompt 0",
            "target": 10,
            "scores": {"em,strict": 0.5, "acc": 0.0, "em": 1.0},
            "answer": ["answer 0"],
        },
        {"index": 2, "prompt": "prompt 2", "target": 12, "scores": {"acc": 1.0}, "answer": ["answer 2"]},
    ]
