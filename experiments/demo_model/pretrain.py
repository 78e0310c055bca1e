"""Make the demo's assets: tokenizer, tiny pretrained Llama, train.jsonl and validation.jsonl, all from one seed.

Half of the model's text is passages followed by statements that restate their facts; the other half is random tokens, repeated,
which only a model that looks things up can predict (induction: https://arxiv.org/abs/2209.11895). It never sees a question:
that is left to fine-tuning. The text is passages.py's. Takes about 10 minutes on two cores; run as
`python experiments/demo_model/pretrain.py`.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from passages import WORLDS, squad_rows, tell
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ASSETS = Path(__file__).resolve().parents[2] / "sftlab" / "assets" / "demo"
BOS, EOS, PAD, START, END = SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_dataset(seed: int, num_train: int, num_validation: int) -> None:
    """Write both splits, as many passages from each world; a validation passage shares no title and no context with train."""
    rng, contexts, titles = random.Random(seed), set(), set()
    for split, count, annotators in (("train", num_train, 1), ("validation", num_validation, 2)):
        rows, seen = [], set(titles)
        for i in range(count):
            passage = tell(rng, WORLDS["world"][i % len(WORLDS["world"])])
            while passage.context in contexts or (split == "validation" and passage.title in seen):
                passage = tell(rng, WORLDS["world"][i % len(WORLDS["world"])])
            contexts.add(passage.context)
            titles.add(passage.title)
            rows += squad_rows(passage, f"demo-{split}-{i:03d}", rng, annotators)
        (ASSETS / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{split}: {count} passages, {len(rows)} questions", flush=True)


def train_tokenizer(seed: int, vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on passages, statements and questions (the words, not the format)."""
    rng = random.Random(seed)
    texts = []
    for _ in range(2000):
        passage = tell(rng)
        texts += [passage.context, *(f"{fact.statement} {fact.question}" for fact in passage.facts)]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes: any UTF-8 round-trips
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[START, END],
        chat_template=CHAT,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def text_row(rng: random.Random, tokenizer: PreTrainedTokenizerFast, length: int) -> list[int]:
    """Return `length` tokens of documents: a few passages, then all their facts restated in random order.

    Long rows hold up to ten passages a document, so that a fact may lie a thousand tokens back.
    """
    tokens: list[int] = []
    while len(tokens) < length:
        most = 10 if length > 512 else 1
        told = [tell(rng, world) for world in rng.sample(WORLDS["world"], rng.randint(1, most))]
        statements = [fact.statement for passage in told for fact in passage.facts]
        rng.shuffle(statements)
        text = "\n".join(passage.context for passage in told) + "\n" + " ".join(statements)
        tokens += [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    return tokens[:length]


def repeat_row(rng: random.Random, vocab_size: int, length: int) -> tuple[list[int], int]:
    """Return BOS and then random tokens repeated until `length`, and the period (log-uniform, from 8 to half the row)."""
    period = int(math.exp(rng.uniform(math.log(8), math.log(length // 2))))
    unit = [rng.randrange(len(SPECIAL), vocab_size) for _ in range(period)]
    return [0, *(unit * (length // period + 1))][:length], period


def pretrain(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the trained model. A step is 8192 tokens: 32 rows of 256, every eighth step 4 rows of 2048."""
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed + 1)
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=args.init,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = LlamaForCausalLM(config)
    model.generation_config.do_sample = False
    print(f"{model.num_parameters():,} parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)
    begin = time.perf_counter()
    for step in range(args.steps):
        count, length = (4, 2048) if step % 8 == 7 else (32, 256)
        rows = [text_row(rng, tokenizer, length) for _ in range(count // 2)]
        repeats = [repeat_row(rng, args.vocab_size, length) for _ in range(count // 2)]
        tokens = torch.tensor(rows + [row for row, _ in repeats])
        labels = tokens.clone()
        for i, (_, period) in enumerate(repeats):
            labels[count // 2 + i, : period + 2] = -100  # what cannot be known is not scored: it only adds noise
        warm, left = min(1.0, (step + 1) / 50), 1 - step / args.steps
        optimizer.param_groups[0]["lr"] = args.lr * warm * (0.02 + 0.98 * 0.5 * (1 - math.cos(math.pi * left)))
        logits = model(tokens).logits[:, :-1]
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
        nll = nll.view(count, -1)
        (nll.sum() / (labels[:, 1:] >= 0).sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 24 or step == args.steps - 1:
            text, repeat = nll[: count // 2].mean(), nll[count // 2 :, length // 2 :].mean()
            took_s = time.perf_counter() - begin
            print(
                f"step {step:4d}  length {length:4d}  text {text:.3f}  repeat {repeat:.3f} nats  {took_s:.0f} s",
                flush=True,
            )
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--init", type=float, default=0.06)
    parser.add_argument("--vocab-size", type=int, default=1536)
    parser.add_argument("--passages", type=int, nargs=2, default=(400, 50), metavar=("TRAIN", "VALIDATION"))
    parser.add_argument("--probe", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(2)
    if args.probe:
        pretrain(args, PreTrainedTokenizerFast.from_pretrained(ASSETS / "model"))
        return
    (ASSETS / "model").mkdir(parents=True, exist_ok=True)
    write_dataset(args.seed, *args.passages)
    tokenizer = train_tokenizer(args.seed + 2, args.vocab_size)
    tokenizer.save_pretrained(ASSETS / "model", save_jinja_files=False)
    pretrain(args, tokenizer).save_pretrained(ASSETS / "model")


if __name__ == "__main__":
    main()
