"""One tokenised example, the unit that the plan deals out and the loss weighs.

An example is a whole token sequence and a mark on each token that is a target. Nothing is shifted here: `supervised[j]`
says that token j is predicted from the tokens before it, so token 0 is never supervised.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Example:
    """A token sequence with its targets marked, and what is needed to score an answer to it.

    Shapes: tokens (n,) int32; supervised (n,) bool.
    `group` is equal for examples that are likely to share a long prefix (questions on one passage).
    The first `num_prompt` tokens prompt a generation; `references` are the accepted answers.
    """

    tokens: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    id: str
    group: int = 0
    num_prompt: int = 0
    references: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)
