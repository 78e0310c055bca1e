"""A plain padded transformers loop on the same examples: prints the wall time at the end of every step as JSON lines.

python experiments/speed_vs_trl/plain_side.py --model FOLDER --data train.jsonl --steps 12
"""

import argparse
import json
import random
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    with open(arguments.data) as file:
        rows = [json.loads(line) for line in file]
    random.Random(0).shuffle(rows)
    examples = []
    for r in rows[: 16 * arguments.steps]:
        prompt = tokenizer(f"Context: {r['context']} Question: {r['question']} Answer:").input_ids
        answer = tokenizer(f" {r['answers']['text'][0]}", add_special_tokens=False).input_ids
        answer += [tokenizer.eos_token_id]
        examples.append((prompt + answer, [-100] * len(prompt) + answer))
    for step in range(arguments.steps):
        batch = examples[16 * step : 16 * (step + 1)]
        width = max(len(tokens) for tokens, _ in batch)
        tokens = torch.tensor([t + [tokenizer.pad_token_id] * (width - len(t)) for t, _ in batch])
        labels = torch.tensor([n + [-100] * (width - len(n)) for _, n in batch])
        mask = torch.tensor([[1] * len(t) + [0] * (width - len(t)) for t, _ in batch])
        loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(json.dumps({"step": step + 1, "loss": loss.item(), "time_s": time.perf_counter()}), flush=True)


if __name__ == "__main__":
    main()
