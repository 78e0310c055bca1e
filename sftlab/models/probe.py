"""The start-up probe: whether a model takes forest rows, and whether the scorer's logits are the model's own.

It takes a few forwards of 32 tokens. Layers that carry a state along a row (recurrent, convolutional) leak silently
between documents: Qwen3-Next 3e-2, Falcon-H1 8e-4, LFM2 4e-4. A model may also count positions by itself, or change
its logits in a way that the scorer does not know. Each such model would train, and be wrong.
"""

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from sftlab.data.batch import Batch, collate
from sftlab.data.example import Example
from sftlab.data.forest import row
from sftlab.models.scorer import Scorer

TOKENS = 16  # tokens in each of two documents
SAME, SAME_BF16 = 1e-4, 0.05  # relative to the largest logit: rows of other shapes round differently
LEAK = 1e-5  # editing one document must not change another, not even by rounding; only routed experts change shapes


def probe(scorer: Scorer, layout: str, device: torch.device) -> None:
    """Check that rows of `layout` are right for this model. Collective; changes no weight.

    Raises: ValueError that names data.layout=padded if it would help.
    """
    name = type(scorer.model).__name__
    if layout != "padded" and scorer.own_mask:
        raise ValueError(
            f"{name} has layers other than attention that carry state from one example of a row to the next: "
            f"data.layout={layout} would mix examples. Use data.layout=padded, one example per row"
        )
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # else code for 32 tokens is compiled
            compare(scorer, layout, device, name)
    finally:
        for module in scorer.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # the root stays gathered, and an optimiser built now would take those parameters


def compare(scorer: Scorer, layout: str, device: torch.device, name: str) -> None:
    """Raise ValueError if numbers that must agree differ."""
    vocabulary = scorer.model.config.get_text_config().vocab_size
    tokens = 3 + np.arange(3 * TOKENS) * 7919 % max(1, min(vocabulary, 1000) - 3)
    first, second, edited = (Example(t.astype(np.int32), np.zeros(TOKENS, bool), "") for t in np.split(tokens, 3))
    apart = collate([row([[first]]), row([[second]])], 2, TOKENS).to(device)
    alone, own = scorer(apart, inside=logits), scorer(apart, inside=own_logits)
    same = SAME_BF16 if own.dtype in (torch.bfloat16, torch.float16) else SAME
    size = float(own.abs().max())
    if (off := float((alone - own).abs().max()) / size) > same:
        raise ValueError(
            f"{name} changes its logits in a way that the scorer does not know: the scorer's are {off:.1e} off "
            "(relative to the largest), so the loss would not be the model's"
        )
    if layout == "padded":
        return
    together, changed = (collate([row([[e], [second]])], 1, 2 * TOKENS).to(device) for e in (first, edited))
    try:
        packed, other = (scorer(batch, inside=logits) for batch in (together, changed))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ValueError(
            f"{name} does not take rows of several examples ({type(error).__name__}: {error}): use data.layout=padded, "
            "one example per row"
        ) from error
    routed = any("expert" in parameter for parameter, _ in scorer.model.named_parameters())
    leak = float((packed[TOKENS:] - other[TOKENS:]).abs().max()) / size
    if leak > (same if routed else LEAK):
        raise ValueError(
            f"{name} leaks between examples of a row: editing one changes another's logits by {leak:.1e} (relative to "
            f"the largest), as recurrent or convolutional layers do. data.layout={layout} would train on that: use "
            "data.layout=padded, one example per row"
        )
    if (off := float((packed - alone).abs().max()) / size) > same:
        raise ValueError(
            f"{name} computes an example differently when another precedes it in a row: its logits are {off:.1e} off "
            f"(relative to the largest), as when positions do not restart. data.layout={layout} would train on that: "
            "use data.layout=padded, one example per row"
        )


def logits(scorer: Scorer, batch: Batch) -> Tensor:
    """Return the logits of every token as the scorer makes them, (R*T, vocabulary)."""
    return scorer.logits(scorer.hidden(batch))


def own_logits(scorer: Scorer, batch: Batch) -> Tensor:
    """Return the logits of the model's own forward, for rows of one document each."""
    found: Tensor = scorer.model(input_ids=batch.tokens, use_cache=False).logits
    return found.flatten(0, 1)
