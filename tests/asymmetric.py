"""Fixtures that are lopsided on purpose, each named for the mistake that a symmetric one lets through."""

import numpy as np

from sftlab.data.example import Example

# {number of ranks: `parallel.replicate`s of it}: meshes of 1 x 4, 2 x 2, 4 x 1, 1 x 3 and 3 x 1. Only 2 x 2 is the same
# with its two dimensions swapped.
MESHES = {4: (1, 2, 4), 3: (1, 3)}


def for_ranks_that_get_unequal_shares() -> list[Example]:
    """Return seven examples with answers, whose ids run against their order: three ranks get 3, 2 and 2, or 4, 2 and 1.

    A mean of the ranks' means is wrong, and so is an order taken for that of the ids.
    """
    found = []
    for i in range(7):
        tokens = np.arange(10 + i, 10 + i + 5 + i, dtype=np.int32)
        supervised = np.arange(5 + i) >= 3 + i // 2
        found.append(Example(tokens, supervised, id=f"e{9 - i}", num_prompt=3 + i // 2, references=(f"answer {i}",)))
    return found
