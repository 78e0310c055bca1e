"""The scorer: turns hidden states into the sum of weighted negative log-likelihoods. FSDP wraps it as its root.

It is the root because the head, the embedding it may be tied to and the final norm must be gathered when it uses them:
calling `model.model(...)` from outside an FSDP root fails with "mixed torch.Tensor and DTensor".
The head runs only on scored tokens: 2.8 % of SQuAD's, while the head is 21 % of Llama-3.2-1B's matrix work.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from sftlab.data.batch import Batch
from sftlab.models.architecture import DRAWN_EXPERTS, apart, body, takes_positions
from sftlab.models.attention import forest_mask, require_alone
from sftlab.models.head import FusedLoss, PredictionLoss, chunks, own_part
from sftlab.models.neftune import noised
from sftlab.models.trim import only_at, position_wise


class Score(NamedTuple):
    """Sums over one batch: weighted nll in nats (float32, differentiable), and the weight of correct top-1 guesses.

    Guesses are counted in evaluation alone: in training they would cost a pass over all logits, and `correct` is 0.
    It is a tuple because FSDP attaches its backward hooks to the tensors that pytree finds in a module's output.
    """

    nll: Tensor
    correct: Tensor


class Scorer(nn.Module):
    """Return the local sum of weight * nll of a batch's predictions.

    At most `chunk` predictions are scored at a time, so that the logits of a long, fully supervised row never all exist
    at once: 2048 predictions over 128,256 tokens are 1 GiB in float32.
    """

    def __init__(self, model: PreTrainedModel, chunk: int = 2048) -> None:
        super().__init__()
        self.model = model
        self.chunk = chunk
        config = model.config.get_text_config()
        # What causal LMs of transformers do to the head's output: Granite divides, Cohere multiplies, Gemma 2 caps.
        scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        self.loss = PredictionLoss(scale, getattr(config, "final_logit_softcapping", None))
        self.takes_positions = takes_positions(model)
        self.apart = apart(model)  # why each example has a row of its own, or None
        # If training mode draws random numbers, the model stays in evaluation mode. The probe may find out more.
        self.noisy = config.model_type in DRAWN_EXPERTS
        # How FSDP treats it (parallel/fsdp2.py): are shards kept on the host, and blocks freed after their forward?
        self.on_host = self.reshards = False
        if self.noisy:
            model.eval()
        # Empty where rows are cut below, because `at` counts along whole rows.
        self.scored_only = (
            position_wise(model) if self.takes_positions else ()
        )  # a tuple, so that they are not registered a second time

    def train(self, mode: bool = True) -> "Scorer":
        """Set the mode of every module, but for a model whose training mode is noisy."""
        super().train(mode)
        if self.noisy:
            self.model.eval()
        return self

    def forward(self, batch: Batch, inside: "Callable[[Scorer, Batch], Any] | None" = None) -> Any:
        """Return the Score of every prediction of `batch`, or what `inside(self, batch)` returns.

        Under FSDP everything that uses parameters must run inside the root's forward, and this is it.
        """
        return self.score(batch) if inside is None else inside(self, batch)

    def score(self, batch: Batch) -> Score:
        """Return the Score of every prediction of `batch`."""
        with only_at(self.scored_only, batch.at):
            hidden = self.hidden(batch)[batch.at]
        if not torch.is_grad_enabled():
            return self._evaluated(hidden, batch)
        head = self.model.get_output_embeddings()
        if type(head) is nn.Linear:
            weight, bias, vocabulary = own_part(head)
            nll: Tensor = FusedLoss.apply(  # type: ignore[no-untyped-call]
                hidden, weight, bias, batch.target, batch.weight, self.loss, self.chunk, vocabulary
            )
        else:  # more than one matrix, such as a head with an adapter: it is called unchanged, and again in backward
            parts = [(hidden[part], batch.target[part], batch.weight[part]) for part in self._chunks(batch)]
            nll = torch.stack([checkpoint(self._nll, *part, use_reentrant=False) for part in parts]).sum()
        return Score(nll, torch.zeros_like(nll))

    def hidden(self, batch: Batch) -> Tensor:
        """Return the last hidden states, (R*T, width).

        Raises: ValueError for a row of several examples, if the model cannot tell them apart.
        """
        given: dict[str, Any] = {"position_ids": batch.position} if self.takes_positions else {}
        if self.apart:
            require_alone(batch.reach)  # the model makes its own causal mask; padding comes after the example
        else:
            given["attention_mask"] = self.mask(batch)
        tokens, length = batch.tokens, batch.tokens.shape[1]
        if not self.takes_positions:
            tokens = tokens[
                :, : int(batch.position.max()) + 1
            ]  # its table of positions may end before the padding does
        with noised(self.model.get_input_embeddings(), batch):
            states: Tensor = body(self.model)(input_ids=tokens, use_cache=False, **given).last_hidden_state
        return F.pad(states, (0, 0, 0, length - states.shape[1])).flatten(0, 1)

    def mask(self, batch: Batch) -> Any:
        """Return what the model's `attention_mask` is for a batch."""
        return forest_mask(self.model.config, batch.reach, batch.position)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits of hidden states in float32 or better, as the model's own forward would."""
        return self.loss.logits(self.model.get_output_embeddings()(hidden))

    def _chunks(self, batch: Batch) -> list[slice]:
        return list(chunks(len(batch.at), self.chunk))

    def _nll(self, hidden: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return (weight * F.cross_entropy(self.logits(hidden), target, reduction="none")).sum()

    def _evaluated(self, hidden: Tensor, batch: Batch) -> Score:
        nll = hidden.new_zeros((), dtype=torch.float32)
        correct = torch.zeros_like(nll)
        for part in self._chunks(batch):
            logits, target, weight = self.logits(hidden[part]), batch.target[part], batch.weight[part]
            nll += (weight * F.cross_entropy(logits, target, reduction="none")).sum()
            correct += (weight * (logits.argmax(-1) == target)).sum()
        return Score(nll, correct)


def after_error(scorer: Scorer) -> None:
    """Bring FSDP back to where a forward may begin, after one that an error ended halfway.

    FSDP's own reset runs at the end of backward. Without it the modules believe that they are still inside. Whole
    gradients that the failed backward left are dropped first: torch 2.11 would reduce them, which takes more memory,
    and torch 2.13 would add them to the next ones.
    """
    if not isinstance(scorer, FSDPModule):
        return
    state: Any = scorer._get_fsdp_state()
    for group in filter(None, (each._fsdp_param_group for each in state._state_ctx.all_states)):
        for parameter in group.fsdp_params:
            parameter.unsharded_accumulated_grad = None
            if hasattr(parameter, "_unsharded_param"):
                parameter._unsharded_param.grad = None
    if hasattr(scorer, "reset_iter_state"):  # torch 2.12 and later
        scorer.reset_iter_state()
    else:
        state._root_post_backward_final_callback()
        state._state_ctx.iter_forward_root = None
        reshard(scorer)


def reshard(scorer: Scorer) -> None:
    """Free what FSDP has gathered. A forward without a backward leaves the root's parameters gathered."""
    for module in scorer.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
