"""The examples of a run, and the rows in which they are trained."""

from collections.abc import Mapping
from itertools import count
from typing import Any

import torch

from sftlab.config.binding import instantiate
from sftlab.data.example_set import ExampleSet
from sftlab.data.loader import BLOCK, RowLayout, round_up
from sftlab.data.plan import Plan
from sftlab.data.template import prepare_tokenizer
from sftlab.models.architecture import longest_text
from sftlab.models.vocabulary import check_vocabulary
from sftlab.training.sharded_model import compiles

ROW_TOKENS = 4096  # unless data.row_length says otherwise; on a CPU also the tokens of a microbatch of padded rows
# Where the search for what fits in a GPU's memory begins. Rows of 16,384 tokens were 27 % faster than rows of 4,096
# on an H200 with 1.2 billion parameters; beyond that a microbatch gains nothing.
MOST_TOKENS = 32_768


def read_data(model: Any, data: Any, model_config: Any) -> tuple[Any, ExampleSet, ExampleSet | None]:
    """Return the tokenizer, the training and the validation examples, none longer than the model's positions."""
    tokenizer = model.load_tokenizer()
    prepare_tokenizer(tokenizer, list(data.formats.values()))
    check_vocabulary(model_config, tokenizer)
    longest = longest_text(model_config, tokenizer)
    return tokenizer, *data.examples(tokenizer, min(data.max_length or longest, longest))


def make_row_layout(
    data: Any,
    settings: Any,
    tokenizer: Any,
    train: ExampleSet,
    val: ExampleSet | None,
    device: torch.device,
    rank: int = 0,
    num_ranks: int = 1,
    joined: bool = False,
) -> RowLayout:
    """Return how the examples of a step become this rank's microbatches; `joined` rows suit FlexAttention."""
    cuda = device.type == "cuda"
    alone = data.layout == "padded"
    longest = round_up(max(int(e.lengths.max()) for e in (train, val) if e is not None), BLOCK)
    length = data.row_length or (longest if alone else max(longest, ROW_TOKENS))
    joined = joined and not alone
    rows = settings.rows_per_microbatch
    if rows == "auto":
        most = MOST_TOKENS if cuda else ROW_TOKENS
        rows = max(1, most // length) if alone or joined else 1
        rows = min(rows, -(-settings.batch_size // num_ranks))  # a step has no more examples than that on a rank
    return RowLayout(
        layout=data.layout,
        row_length=length,
        rows_per_microbatch=rows,
        rank=rank,
        num_ranks=num_ranks,
        pad_token=ordinary_token(tokenizer),
        fixed_shapes=cuda or compiles(settings.compile, device),
        pin_memory=cuda,
        joined=joined,
    )


def ordinary_token(tokenizer: Any) -> int:
    """Return the first token that is not special. Rows are padded with it, and nothing else sees or scores it.

    A padding token's embedding may be zero, and in Gemma 3n the gradient of a zero's norm is NaN, even times 0.
    """
    special = set(tokenizer.all_special_ids)
    return next(i for i in count() if i not in special)


def preview_parts(
    config: Mapping[str, Any], device: torch.device
) -> tuple[Any, ExampleSet, ExampleSet | None, Plan, RowLayout]:
    """Return the tokenizer, the training and validation examples, the plan and the row layout of a one-rank run."""
    parts = instantiate({name: config[name] for name in ("model", "data", "trainer")})
    model, data, settings = parts["model"], parts["data"], parts["trainer"]
    tokenizer, train, val = read_data(model, data, model.load_config(device))
    plan = Plan(train.groups, settings.batch_size, config["seed"], data.shuffle, data.groups_prefixes)
    return tokenizer, train, val, plan, make_row_layout(data, settings, tokenizer, train, val, device)
