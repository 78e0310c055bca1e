"""The start-up probe: whether a model takes forest rows, and whether the scorer's logits are the model's own.

It takes a few forwards of 48 tokens. Layers that carry a state along a row (recurrent, convolutional) leak silently
between documents: Qwen3-Next 3e-2, Falcon-H1 8e-4, LFM2 4e-4. A model may also count positions by itself, see later
tokens, draw random numbers, or change its logits in a way that the scorer does not know. Each such model would train,
and be wrong. What can be mended is: noise goes with training mode, and a model that misreads masks is given none.
"""

import math
import warnings

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sftlab.data.batch import Batch, collate
from sftlab.data.example import Example
from sftlab.data.forest import row
from sftlab.models.scorer import Scorer, after_error, reshard
from sftlab.models.trim import only_at

TOKENS = 16  # tokens in each document
# What models raise for masks, positions and shapes that they do not take.
REFUSALS = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError, AssertionError)
SAME, SAME_BF16 = 1e-4, 0.05  # relative to the largest logit: rows of other shapes round differently
LEAK = 1e-5  # editing one document must not change another, not even by rounding; only routed experts change shapes


def probe(scorer: Scorer, layout: str, device: torch.device) -> None:
    """Check that rows of `layout` are right for this model. Collective; changes no weight.

    With `padded`, which every model takes, `scorer.apart` says afterwards why answers need rows of their own, if so.
    Raises: ValueError that names data.layout=padded if it would help.
    """
    require_rows(scorer, layout)
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
            # Without force_eager, code for 32 tokens would be compiled. FlexAttention warns that it is slow without.
            warnings.filterwarnings("ignore", message=".*flex_attention called without torch.compile")
            compare(scorer, layout, device, type(scorer.model).__name__)
    finally:
        reshard(scorer)  # the root stays gathered, and an optimiser built now would take those parameters


def require_rows(scorer: Scorer, layout: str) -> None:
    """Raise ValueError if rows of `layout` hold several examples and the model needs a row for each."""
    if layout != "padded" and scorer.apart:
        raise ValueError(
            f"{type(scorer.model).__name__} {scorer.apart}: data.layout={layout} would mix examples. Use "
            "data.layout=padded, one example per row"
        )


def compare(scorer: Scorer, layout: str, device: torch.device, name: str) -> None:
    """Raise ValueError if numbers that must agree differ."""
    vocabulary = scorer.model.config.get_text_config().vocab_size
    tokens = (3 + np.arange(3 * TOKENS) * 7919 % max(1, min(vocabulary, 1000) - 3)).astype(np.int32)
    bent = tokens[TOKENS : 2 * TOKENS].copy()
    bent[-1] = tokens[0] if bent[-1] != tokens[0] else tokens[1]
    first, second, edited, bent = (Example(t, np.zeros(TOKENS, bool), "") for t in (*np.split(tokens, 3), bent))
    rows = collate([row([[first]]), row([[second]]), row([[bent]])], 3, TOKENS).to(device)
    alone, own = settled(scorer, rows, name)
    same, size = tolerance(own), float(own.abs().max()) or 1.0
    if scorer.scored_only and not trims(scorer, rows, alone[TOKENS - 1 :: TOKENS], same * size):
        scorer.scored_only = ()
    require_rows(scorer, layout)
    if scorer.apart:
        return
    alone = alone[: 2 * TOKENS]
    together, changed = (collate([row([[e], [second]])], 1, 2 * TOKENS).to(device) for e in (first, edited))
    wrong = shared_wrongly(scorer, together, changed, alone, leak_tolerance(scorer, own))
    if wrong and layout == "padded":
        scorer.apart = wrong
    elif wrong:
        raise ValueError(
            f"{name} {wrong}. data.layout={layout} would train on that: use data.layout=padded, one example per row"
        )


def trims(scorer: Scorer, rows: Batch, own: Tensor, most: float) -> bool:
    """Return whether the last block may compute what is scored alone.

    Not if something after it mixes tokens, if it runs several times, or if it needs whole rows, as Moshi's MLP does.
    """
    try:
        return distance(scorer(rows, inside=ends), own, 1.0) <= most
    except REFUSALS:
        after_error(scorer)
        return False


def shared_wrongly(scorer: Scorer, together: Batch, changed: Batch, alone: Tensor, exact: float) -> str | None:
    """Return what is wrong with a row of two examples, `together`; None if it is as right as rows of one, `alone`.

    In `changed` the first example is another one.
    """
    size = float(alone.abs().max()) or 1.0
    try:
        packed, other = (scorer(batch, inside=logits) for batch in (together, changed))
    except REFUSALS as error:
        after_error(scorer)
        return f"does not take rows of several examples ({type(error).__name__}: {error})"
    leak = float((packed[TOKENS:] - other[TOKENS:]).abs().max()) / size
    if leak > exact:
        return (
            f"leaks between examples of a row: editing one changes another's logits by {leak:.1e} (relative to the "
            "largest), as recurrent or convolutional layers do"
        )
    if (off := float((packed - alone).abs().max()) / size) > tolerance(alone):
        return (
            f"computes an example differently when another precedes it in a row: its logits are {off:.1e} off "
            "(relative to the largest), as when positions do not restart"
        )
    return None


def settled(scorer: Scorer, rows: Batch, name: str) -> tuple[Tensor, Tensor]:
    """Return the logits of rows of one example as the scorer makes them, and as the model's own forward does.

    The last two rows differ in their last token. Sets `scorer.noisy` and `scorer.apart` where that makes them agree.
    """
    own = scorer(rows, inside=own_logits)
    if not bool(own.isfinite().all()):
        parts = ((n, p.to_local() if isinstance(p, DTensor) else p) for n, p in scorer.model.named_parameters())
        odd = next((name for name, part in parts if not bool(part.isfinite().all())), None)
        where = f"its weights hold values that are no numbers, first in {odd}" if odd else "its logits are no numbers"
        raise ValueError(
            f"{name}: {where}. The files are damaged, or were saved after training had diverged: get them again"
        )
    same, size, exact = tolerance(own), float(own.abs().max()) or 1.0, leak_tolerance(scorer, own)
    try:
        alone, why = scorer(rows, inside=logits), "it computes other logits with them"
        off = distance(alone, own, size)
    except REFUSALS as error:
        after_error(scorer)
        alone, off, why = own, float("inf"), f"{type(error).__name__}: {error}"
    before_end = own.view(3, TOKENS, -1)[1:, :-1]
    ahead = distance(before_end[0], before_end[1], size)
    if off <= same and ahead <= exact:
        return alone, own
    if not scorer.noisy and distance(scorer(rows, inside=own_logits), own, size) > exact:
        scorer.noisy = True
        scorer.train()
        return settled(scorer, rows, name)
    if ahead > exact:
        raise ValueError(
            f"{name} sees later tokens: editing the last token of a text changes the logits of earlier ones by "
            f"{ahead:.1e} (relative to the largest). A bidirectional model cannot learn to continue a text: name a "
            "causal one in model.name_or_path"
        )
    if scorer.apart is None:
        scorer.apart = f"does not take the masks of rows ({why})"
        try:
            return settled(scorer, rows, name)
        except ValueError:
            scorer.apart = None
            raise
    raise ValueError(
        f"{name} changes its logits in a way that the scorer does not know: the scorer's are {off:.1e} off "
        "(relative to the largest), so the loss would not be the model's. This model cannot be trained here"
        if off < float("inf")
        else f"{name} does not run as the scorer calls it ({why}). This model cannot be trained here"
    )


def tolerance(found: Tensor) -> float:
    """Return how far apart numbers of this precision may be."""
    return SAME_BF16 if found.dtype in (torch.bfloat16, torch.float16) else SAME


def leak_tolerance(scorer: Scorer, found: Tensor) -> float:
    """Return by how much a token may change that must not see an edit: routed experts round by what else is there."""
    routed = any("expert" in parameter for parameter, _ in scorer.model.named_parameters())
    return tolerance(found) if routed else LEAK


def distance(found: Tensor, expected: Tensor, size: float) -> float:
    """Return the largest difference, relative to `size`; infinite if a number is not finite."""
    off = float((found - expected).abs().max()) / size
    return off if math.isfinite(off) else float("inf")


def ends(scorer: Scorer, batch: Batch) -> Tensor:
    """Return the logits of the last token of each row, as a step makes them."""
    at = torch.arange(1, len(batch.tokens) + 1, device=batch.tokens.device) * TOKENS - 1
    with only_at(scorer.scored_only, at):
        return scorer.logits(scorer.hidden(batch)[at])


def logits(scorer: Scorer, batch: Batch) -> Tensor:
    """Return the logits of every token as the scorer makes them, (R*T, vocabulary)."""
    return scorer.logits(scorer.hidden(batch))


def own_logits(scorer: Scorer, batch: Batch) -> Tensor:
    """Return the logits of the model's own forward, for rows of one document each."""
    found: Tensor = scorer.model(input_ids=batch.tokens, use_cache=False).logits
    return found.flatten(0, 1)
