"""Make the model folder that every side loads: untrained weights of one of three sizes, and a tokenizer.

    python experiments/peers/model.py --data train.jsonl --out FOLDER                       6.8M parameters
    python experiments/peers/model.py --data train.jsonl --out FOLDER --size 1b --tokenizer LLAMA3_FOLDER

Without --tokenizer a byte-level one of 8,192 tokens is trained on the data. The weights of `1b` are rounded to
bfloat16, so that the file is half as large and every side reads the same values.
"""

import argparse
import json
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "7m": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 8},
    "1b": {
        **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
        **{"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_parameters": ROPE},
    },
}


def train_tokenizer(rows: list[dict[str, Any]]) -> Any:
    """Return a byte-level tokenizer of at most 8,192 tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8192, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([f"{r['context']} {r['question']}" for r in rows], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_input_names=["input_ids", "attention_mask"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="JSONL in SQuAD's schema, for the tokenizer")
    parser.add_argument("--out", required=True)
    parser.add_argument("--size", choices=list(SIZES), default="7m")
    parser.add_argument("--tokenizer", help="folder of an existing tokenizer")
    arguments = parser.parse_args()
    with open(arguments.data, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer) if arguments.tokenizer else train_tokenizer(rows)
    tokenizer.save_pretrained(arguments.out)
    large = arguments.size == "1b"
    shape = {"num_key_value_heads": 4, "max_position_embeddings": 4096} | SIZES[arguments.size]
    config = LlamaConfig(
        vocab_size=128256 if large and arguments.tokenizer else 8192,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **shape,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = model.to(torch.bfloat16) if large else model
    model.save_pretrained(arguments.out)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {arguments.out}")


if __name__ == "__main__":
    main()
