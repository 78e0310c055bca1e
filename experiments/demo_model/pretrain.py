"""Make the demo's assets: tokenizer, tiny pretrained Llama, train.jsonl.gz and validation.jsonl, all from one seed.

The model's text is passages followed by statements that restate their facts, and beside it noise in which one unit
stands twice, which only a model that looks things up can predict (induction: https://arxiv.org/abs/2209.11895). It
never sees a question: that is left to fine-tuning. The text is passages.py's; numbers and commands are in README.md.
"""

import argparse
import gzip
import json
import math
import random
import time
from collections import Counter
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
    """Write both splits, as many passages from each world; no title and no context of validation is in train."""
    rng, contexts, titles = random.Random(seed), set(), set()
    for split, count, annotators in (("train", num_train, 1), ("validation", num_validation, 2)):
        rows, seen = [], set(titles)
        for i in range(count):
            passage = tell(rng, WORLDS["world"][i % len(WORLDS["world"])])
            while passage.context in contexts or (split == "validation" and passage.title in seen):
                passage = tell(rng, WORLDS["world"][i % len(WORLDS["world"])])
            contexts.add(passage.context)
            titles.add(passage.title)
            rows += squad_rows(passage, f"demo-{split}-{i:04d}", rng, annotators)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if split == "train":  # 4 MB, a tenth of it packed; with a time in it no two files would be the same
            (ASSETS / "train.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
        else:
            (ASSETS / "validation.jsonl").write_text(text)
        print(f"{split}: {count} passages, {len(rows)} questions", flush=True)


def train_tokenizer(seed: int, vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on passages, statements and questions (the words, not the format)."""
    rng = random.Random(seed)
    texts = []
    for _ in range(2000):
        passage = tell(rng)
        texts += [passage.context, *(" ".join((*fact.statements, fact.question)) for fact in passage.facts)]
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


def text_rows(
    rng: random.Random, tokenizer: PreTrainedTokenizerFast, num_rows: int, most: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens, labels of the passages and labels of the statements, each (num_rows, T).

    A row is one document: one to `most` passages, then a restatement of each of their facts, in random order.
    """
    rows, told_lengths = [], []
    for _ in range(num_rows):
        told = [tell(rng, world) for world in rng.sample(WORLDS["world"], rng.randint(1, most))]
        statements = [rng.choice(fact.statements) for passage in told for fact in passage.facts]
        rng.shuffle(statements)
        head = tokenizer("\n".join(passage.context for passage in told) + "\n").input_ids
        rows.append(
            head + tokenizer(" ".join(statements), add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        )
        told_lengths.append(len(head))
    length = max(map(len, rows))
    tokens = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])
    told = torch.arange(length) < torch.tensor(told_lengths)[:, None]
    labels = tokens.masked_fill(tokens == tokenizer.pad_token_id, -100)
    return tokens, labels.masked_fill(~told, -100), labels.masked_fill(told, -100)


@torch.no_grad()
def lookup_accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, num_passages: int = 40) -> float:
    """Return how often the first token of a restated fact's answer is the most likely one, on unseen passages."""
    rng, right, asked = random.Random(7), 0, 0
    for _ in range(num_passages):
        passage = tell(rng)
        for fact in passage.facts:
            before, after = fact.statements[0].split(fact.answer, 1)[0].rstrip(), " " + fact.answer
            tokens = torch.tensor([tokenizer(passage.context + "\n" + before).input_ids])
            right += (
                int(model(tokens).logits[0, -1].argmax()) == tokenizer(after, add_special_tokens=False).input_ids[0]
            )
            asked += 1
    return right / asked


def repeat_rows(
    rng: random.Random, alphabet: list[int], num_rows: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and labels, each (num_rows, length): noise with one unit in it twice; its second copy is scored.

    The gap is random, so that counting back does not help and only looking for the same token does.
    """
    tokens = torch.tensor([rng.choices(alphabet, k=length) for _ in range(num_rows)])
    labels = torch.full_like(tokens, -100)
    for row, label in zip(tokens, labels, strict=True):
        size = rng.randint(length // 4, length // 2)
        first = rng.randint(0, length - 2 * size)
        second = rng.randint(first + size, length - size)
        row[second : second + size] = row[first : first + size]
        label[second + 1 : second + size] = row[second + 1 : second + size]
    return tokens, labels


def score(model: LlamaForCausalLM, tokens: torch.Tensor, *label_sets: torch.Tensor) -> list[torch.Tensor]:
    """Return for each set of labels its mean nll, in nats, where the label is not -100; the head runs only there."""
    hidden = model.model(tokens).last_hidden_state[:, :-1]
    means = []
    for labels in label_sets:
        at = labels[:, 1:] >= 0
        means.append(torch.nn.functional.cross_entropy(model.lm_head(hidden[at]), labels[:, 1:][at]))
    return means


def pretrain(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the trained model. A step is about 8000 tokens, three quarters of them text."""
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed + 1)
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=args.init,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    model = LlamaForCausalLM(config)
    model.generation_config.do_sample = False
    print(f"{model.num_parameters():,} parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)
    begin = time.perf_counter()
    answers = [" " + fact.answer for _ in range(1000) for fact in tell(rng).facts]
    counts = Counter(token for tokens in tokenizer(answers, add_special_tokens=False).input_ids for token in tokens)
    order = [token for token, _ in counts.most_common()]
    order += [token for token in range(len(SPECIAL), args.vocab_size) if token not in counts]
    size = 64.0  # tokens that noise is made of: looking up is found early among few, and then holds for more
    for step in range(args.steps):
        warm, left = min(1.0, (step + 1) / 50), 1 - step / args.steps
        optimizer.param_groups[0]["lr"] = args.lr * warm * (0.02 + 0.98 * 0.5 * (1 - math.cos(math.pi * left)))
        alphabet = order[: int(size)]
        early, long = len(alphabet) < len(order), step % 8 == 7
        documents, passages = (24, 1) if early else (4, 6) if long else (12, 3)
        text, told, restated = text_rows(rng, tokenizer, documents, passages)
        told_nll, restated_nll = score(model, text, told, restated)
        rows, length = (32, 64) if early or not long else (4, 512)
        (repeat_nll,) = score(model, *repeat_rows(rng, alphabet, rows, length))
        (0.3 * told_nll + restated_nll + repeat_nll).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if repeat_nll.item() < 0.8 * math.log(len(alphabet)):
            size = min(len(order), size * 1.05)
        if step % 50 in (48, 49) or step == args.steps - 1:
            print(
                f"step {step:4d}  told {told_nll:.3f}  restated {restated_nll:.3f}  repeat {repeat_nll:.3f} nats "
                f"({length} tokens of {len(alphabet)})  lookup {lookup_accuracy(model, tokenizer):.2f}  "
                f"{time.perf_counter() - begin:.0f} s",
                flush=True,
            )
    return model


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--init", type=float, default=0.06)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--passages", type=int, nargs=2, default=(1600, 50), metavar=("TRAIN", "VALIDATION"))
    args = parser.parse_args()
    torch.set_num_threads(2)
    (ASSETS / "model").mkdir(parents=True, exist_ok=True)
    write_dataset(args.seed, *args.passages)
    tokenizer = train_tokenizer(args.seed + 2, args.vocab_size)
    tokenizer.save_pretrained(ASSETS / "model", save_jinja_files=False)
    pretrain(args, tokenizer).save_pretrained(ASSETS / "model")


if __name__ == "__main__":
    main()
