"""Tokenizers of four kinds, trained here on a few sentences, and what their tokens stand for, byte by byte.

`llama3` puts a BOS before a text, `qwen` and `gpt2` do not (and GPT-2's only special token is end-of-text and padding
in one), `sentencepiece` writes spaces as ▁ and puts one before the first word. Nothing here is sftlab's.
"""

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

KINDS = ("llama3", "qwen", "gpt2", "sentencepiece")
SENTENCES = [
    "The keeper of the lighthouse counts two hundred steps. Question: Who counts the steps? Answer: the keeper.",
    "A baker in Oakgate sells almond bread on Monday and rye on Friday; Context: the oven was built in 1821.",
    "user assistant system Hello there, what is it that you would undo? I don't know: 12345 and 48/2=24.",
    "Natalia sold clips to 48 of her friends in April, and then half as many clips in May. #### 72",
]
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = {
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "gpt2": ["<|endoftext|>"],
    "sentencepiece": ["<unk>", "<s>", "</s>"],
}
ROLES: dict[str, dict[str, Any]] = {
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    "qwen": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "gpt2": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    "sentencepiece": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
}
LOOP, GENERATE = "{%- for m in messages %}", "{%- endfor %}{%- if add_generation_prompt %}"
TEMPLATES = {
    "llama3": "{{- bos_token }}"
    + LOOP
    + "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
    + GENERATE
    + "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}",
    "qwen": LOOP
    + "{{- '<|im_start|>' + m.role + '\n' + m.content }}"
    + "{%- for c in m.tool_calls or [] %}{{- '<tool_call>' + c.function | tojson + '</tool_call>' }}{%- endfor %}"
    + "{{- '<|im_end|>\n' }}"
    + GENERATE
    + "{{- '<|im_start|>assistant\n' }}{%- endif %}",
    "gpt2": LOOP
    + "{{- '<|' + m.role + '|>\n' + m.content }}{%- if m.role == 'assistant' %}{{- eos_token }}{%- endif %}{{- '\n' }}"
    + GENERATE
    + "{{- '<|assistant|>\n' }}{%- endif %}",
    "sentencepiece": "{{- bos_token }}"
    + LOOP
    + "{%- if m.role == 'assistant' %}{{- ' ' + m.content + eos_token }}"
    + "{%- else %}{{- '[INST] ' + m.content + ' [/INST]' }}{%- endif %}{%- endfor %}",
}
MARKED = {  # the same with {% generation %}, where it can be put around what the model writes
    "llama3": "{{- bos_token }}"
    + LOOP
    + "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}{%- if m.role == 'assistant' %}"
    + "{% generation %}{{- m.content | trim + '<|eot_id|>' }}{% endgeneration %}"
    + "{%- else %}{{- m.content | trim + '<|eot_id|>' }}{%- endif %}"
    + GENERATE
    + "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}",
    "qwen": LOOP
    + "{{- '<|im_start|>' + m.role + '\n' }}{%- if m.role == 'assistant' %}"
    + "{% generation %}{{- m.content + '<|im_end|>' }}{% endgeneration %}{{- '\n' }}"
    + "{%- else %}{{- m.content + '<|im_end|>\n' }}{%- endif %}"
    + GENERATE
    + "{{- '<|im_start|>assistant\n' }}{%- endif %}",
    "gpt2": LOOP
    + "{{- '<|' + m.role + '|>\n' }}{%- if m.role == 'assistant' %}"
    + "{% generation %}{{- m.content }}{% endgeneration %}{{- eos_token + '\n' }}"  # the end left out of the mark
    + "{%- else %}{{- m.content + '\n' }}{%- endif %}"
    + GENERATE
    + "{{- '<|assistant|>\n' }}{%- endif %}",
}


@functools.cache
def _backend(kind: str) -> str:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = SPECIAL[kind]
    if kind == "sentencepiece":
        t = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        t.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        # Words apart in training only, as SentencePiece does: merges then never cross a space.
        t.pre_tokenizer = pre_tokenizers.Split(Regex("▁"), "merged_with_next")
        pieces = [*special, *(f"<0x{b:02X}>" for b in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=pieces, show_progress=False)
    else:
        t = Tokenizer(models.BPE())
        if kind == "qwen":
            t.normalizer = normalizers.NFC()
        if kind == "gpt2":
            t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        else:
            words = WORDS if kind == "llama3" else WORDS.replace("{1,3}", "")
            t.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(words), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
        t.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=450, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    t.train_from_iterator(SENTENCES, trainer)
    bos = {"llama3": "<|begin_of_text|>", "sentencepiece": "<s>"}.get(kind)
    added = (
        [processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, t.token_to_id(bos))])] if bos else []
    )
    if kind == "sentencepiece":
        t.pre_tokenizer = None
        (t.post_processor,) = added
    else:
        t.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=kind == "gpt2"), *added])
    return str(t.to_str())


def tokenizer(kind: str, template: str | None = None) -> Any:
    """Return a fresh tokenizer of a kind, with a chat template (default: the kind's own, without generation marks)."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend(kind)),
        chat_template=template or TEMPLATES[kind],
        clean_up_tokenization_spaces=False,
        **ROLES[kind],
    )


@functools.cache
def _byte_of() -> dict[str, int]:
    """Return GPT-2's map from the characters of byte-level tokens to bytes."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


def pieces(tokenizer: Any, ids: list[int]) -> list[bytes]:
    """Return the bytes that each token stands for, as the vocabulary writes them."""
    special = {t.content for t in tokenizer.added_tokens_decoder.values()}
    out = []
    for token in tokenizer.convert_ids_to_tokens(ids):
        if token in special and not token.startswith("<0x"):
            out.append(token.encode())
        elif token.startswith("<0x") and token.endswith(">"):
            out.append(bytes([int(token[3:5], 16)]))
        elif "<0x00>" in tokenizer.get_vocab():
            out.append(token.replace("▁", " ").encode())
        else:
            out.append(bytes(_byte_of()[c] for c in token))
    return out


def expected(tokenizer: Any, segments: list[tuple[str, bool]]) -> tuple[list[int], NDArray[np.bool_]]:
    """Return the tokens of the joint text of these (text, learned) segments, and which hold a byte that is learned.

    Worked out from the vocabulary's bytes alone. No special token is added.
    """
    text = "".join(s for s, _ in segments).encode()
    learned = np.concatenate([np.full(len(s.encode()), flag) for s, flag in segments])
    ids = tokenizer("".join(s for s, _ in segments), add_special_tokens=False)["input_ids"]
    at, marks = 0, []
    for piece in pieces(tokenizer, ids):
        if not text.startswith(piece, at):  # the space that SentencePiece puts before a text
            assert piece.startswith(b" ") and text.startswith(piece[1:], at), (piece, text[at:])
            piece = piece[1:]
        marks.append(bool(learned[at : at + len(piece)].any()))
        at += len(piece)
    assert at == len(text)
    return ids, np.array(marks, bool)
