"""Make the benchmark's model folder: a 6.8M-parameter Llama, untrained, and a byte-level tokenizer of 8192 tokens.

python experiments/speed_vs_trl/model.py --data train.jsonl --out /tmp/bench_model
"""

import argparse
import json

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="JSONL in SQuAD's schema, for the tokenizer")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    with open(arguments.data) as file:
        rows = [json.loads(line) for line in file]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8192, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator([f"{r['context']} {r['question']}" for r in rows], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.save_pretrained(arguments.out)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(arguments.out)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {arguments.out}")


if __name__ == "__main__":
    main()
