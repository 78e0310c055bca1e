"""A plain PyTorch loop, as most write it, or with --expert as one who knows the model writes it.

As most write it: batches as they come, padded to their longest row, the model's own loss over all logits. The expert
sorts rows by length, needs no mask (padding on the right is never seen by a causal model), takes logits at the answers
only, compiles the layers on CUDA, clips by foreach, and reads no loss before the end.
"""

import random
from typing import Any

import torch
import torch.nn.functional as F
from sides import IGNORED, Clock, parser, rows, shuffled, tokenised
from transformers import AutoModelForCausalLM, AutoTokenizer


def padded(batch: list[tuple[list[int], list[int]]], pad: int, device: str, multiple: int) -> list[torch.Tensor]:
    """Return tokens, labels and mask on the device, padded on the right."""
    width = -(-max(len(tokens) for tokens, _ in batch) // multiple) * multiple
    lists = (
        [t + [pad] * (width - len(t)) for t, _ in batch],
        [n + [IGNORED] * (width - len(n)) for _, n in batch],
        [[1] * len(t) + [0] * (width - len(t)) for t, _ in batch],
    )
    made = [torch.tensor(values) for values in lists]
    return [(t.pin_memory() if device == "cuda" else t).to(device, non_blocking=True) for t in made]


def batches(examples: list[Any], size: int, order: str, by_length: bool) -> list[list[Any]]:
    """Return the batches: as given, or shuffled, and then sorted by length where that is wanted."""
    if order == "own":
        examples = shuffled(examples)
        if by_length:
            examples.sort(key=lambda e: len(e[0]))
    made = [examples[i : i + size] for i in range(0, len(examples), size)]
    if order == "own" and by_length:
        random.Random(1).shuffle(made)
    return made


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--expert", action="store_true")
    given = arguments.parse_args()
    clock = Clock(given.device, given.batch)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    examples = [tokenised(tokenizer, row) for row in rows(given.data, given.batch * given.steps)]
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32, attn_implementation="sdpa")
    model = model.to(given.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.lr, weight_decay=0.0, fused=True)
    if given.expert and given.device == "cuda":
        torch._dynamo.config.recompile_limit = 64
        for layer in model.model.layers:
            layer.compile(dynamic=True)

    def loss_of(tokens: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if not given.expert:
            return model(input_ids=tokens, attention_mask=mask, labels=labels).loss
        states = model.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
        wanted = labels[:, 1:] != IGNORED
        return F.cross_entropy(model.lm_head(states[wanted]).float(), labels[:, 1:][wanted])

    for batch in batches(examples, given.batch, given.order, given.expert):
        clock.step()
        inputs = padded(batch, tokenizer.pad_token_id, given.device, 8 if given.device == "cuda" else 1)
        with torch.autocast(given.device, torch.bfloat16, enabled=given.device == "cuda"):
            loss = loss_of(*inputs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=given.expert)
        optimizer.step()
        optimizer.zero_grad()
        clock.losses.append(loss.detach() if given.expert else loss.item())
    clock.report()


if __name__ == "__main__":
    main()
