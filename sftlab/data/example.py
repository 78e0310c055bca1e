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

    Shapes: tokens (n,) int32; supervised (n,) bool; weights (n,) float32, or None where every target counts once.
    `group` is equal for examples that are likely to share a long prefix (questions on one passage).
    The first `num_prompt` tokens prompt a generation; `references` are the accepted answers.
    """

    tokens: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    id: str
    group: int = 0
    num_prompt: int = 0
    references: tuple[str, ...] = ()
    weights: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def target_weights(self) -> NDArray[np.float32]:
        """The weight of every token as a target, (n,): 0 where it is none."""
        return self.supervised.astype(np.float32) if self.weights is None else self.supervised * self.weights
