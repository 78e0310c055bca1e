"""What tests share: tiny models and tokenizers made here, examples from a seed, functions run on several ranks."""

import atexit
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sftlab.data.example import Example
from tests.ranks import on_ranks
from tests.warm import Warm, warm

REPO = Path(__file__).parent.parent
SHARED_DATA = REPO.parent / "shared" / "data"  # real SQuAD and GSM8K, where they are beside the checkout
# torchao, for the tests that need it: on PYTHONPATH or sys.path of those alone. In the environment itself it would cost
# every import of transformers 1.4 s and four lines of warnings.
TORCHAO = Path(sys.prefix) / "torchao"
TEXT = (
    "The keeper of the lighthouse counts two hundred steps. Question: Who counts the steps? Answer: the keeper. "
    "A baker in Oakgate sells almond bread on Monday and rye on Friday; Context: the oven was built in 1821."
)


def byte_tokenizer(texts: Sequence[str] = (TEXT,), vocab: int = 320, bos: bool = True) -> Any:
    """Return a byte-level BPE tokenizer trained on `texts`, with <s> (added in front if `bos`), </s> and <pad>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    t.train_from_iterator(texts, trainer)
    if bos:
        t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=t,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_input_names=["input_ids", "attention_mask"],
    )


def tiny_llama(seed: int = 0, vocab: int = 320, tied: bool = True, layers: int = 2, **config: Any) -> Any:
    """Return a Llama of about 60,000 parameters in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | config)))


def make_model_folder(folder: Path, **config: Any) -> Path:
    """Write a tiny Llama and its tokenizer in Hugging Face format."""
    byte_tokenizer().save_pretrained(folder)
    tiny_llama(**config).save_pretrained(folder)
    return folder


def make_squad_file(path: Path, num_passages: int = 12, questions: int = 3, seed: int = 0) -> Path:
    """Write questions on short made-up passages, in the hub's schema as JSONL."""
    rng = np.random.default_rng(seed)
    names, things = ["Ada", "Bo", "Cleo", "Dan", "Eve"], ["bread", "boats", "clocks", "tea", "hats"]
    with path.open("w") as file:
        for p in range(num_passages):
            facts = [(f"{rng.choice(names)}{p}{q}", str(rng.choice(things))) for q in range(questions)]
            context = " ".join(f"{name} sells {thing}." for name, thing in facts)
            for q, (name, thing) in enumerate(facts):
                row = {
                    "id": f"p{p}q{q}",
                    "title": f"passage {p}",
                    "context": context,
                    "question": f"What does {name} sell?",
                    "answers": {"text": [thing], "answer_start": [context.index(thing)]},
                }
                file.write(json.dumps(row) + "\n")
    return path


def random_examples(
    num: int, seed: int = 0, vocab: int = 320, longest: int = 40, groups: int = 3, supervise: float = 0.4
) -> list[Example]:
    """Return examples in groups that share prefixes of random length, with random supervised tokens."""
    rng = np.random.default_rng(seed)
    stems = [rng.integers(3, vocab, longest).astype(np.int32) for _ in range(groups)]
    examples = []
    for i in range(num):
        stem, shared = stems[i % groups], int(rng.integers(1, longest))
        own = rng.integers(3, vocab, int(rng.integers(1, longest))).astype(np.int32)
        tokens = np.concatenate([stem[:shared], own])
        supervised = rng.random(len(tokens)) < supervise
        supervised[0] = False
        examples.append(Example(tokens, supervised, id=f"e{i}", group=i % groups))
    return examples


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def command(
    module: str, *arguments: str, ranks: int = 1, cwd: Path | None = None, cold: bool = False, **env: str
) -> Any:
    """Run `python -m sftlab.<module> ...`, under torchrun if `ranks` > 1; returns the CompletedProcess, not checked.

    Its Pythons have imported torch before, unless `cold`: for what a command says or reads while it starts, and for
    launcher=local, whose ranks watch over the process that started them.
    """
    python = sys.executable if cold else str(warmed().python)
    launch = [python, "-m"]
    if ranks > 1:
        launch += ["torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(free_port()), "-m"]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"PYTHON_EXEC": python, **env}  # what torchrun starts its ranks with
    return subprocess.run(
        [*launch, f"sftlab.{module}", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )


ALSO = ("torch.distributed.run", "sftlab.serving.app", "submitit", "rich.live")


@functools.cache
def warmed() -> Warm:
    """Return a process that has imported torch, one for all tests, and what starts commands as forks of it."""
    held = ExitStack()
    atexit.register(held.close)
    folder = Path(held.enter_context(tempfile.TemporaryDirectory()))
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return held.enter_context(warm(folder, environment, "hydra", *ALSO))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def run_distributed(function: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any]:
    """Run `function(world, *arguments)` on `ranks` gloo processes; return what each returned, in rank order.

    The function must be importable (at module level of a test). An exception on any rank is raised here.
    """
    return on_ranks(_in_a_world, ranks, function, ranks, free_port(), arguments)


def _in_a_world(rank: int, function: Callable[..., Any], ranks: int, port: int, arguments: Any) -> Any:
    from sftlab.parallel.world import world

    join(rank, ranks, port)
    with world() as here:
        return function(here, *arguments)


def join(rank: int, ranks: int, port: int) -> None:
    """Say in the environment, as torchrun does, which rank this process is."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def train(folder: Path, model: Path, data: tuple[Path, Path], *arguments: str, ranks: int = 1, **kwargs: Any) -> Any:
    """Run `python -m sftlab.train` on a small model and small data for 8 steps of 6 examples; not checked."""
    settings = {
        "model": "hf",
        "model.name_or_path": model,
        "data": "squad",
        "data.path": data[0],
        "data.val_path": data[1],
        "optim.lr": "0.003",
        "trainer.batch_size": 6,
        "trainer.max_steps": 8,
        "evaluation.num_answers": 4,
        "evaluation.max_new_tokens": 4,
    }
    given = {a.partition("=")[0] for a in arguments}
    typed = [f"{key}={value}" for key, value in settings.items() if key not in given]
    return command("train", *arguments, *typed, ranks=ranks, cwd=folder, **kwargs)
