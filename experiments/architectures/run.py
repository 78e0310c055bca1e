"""Train every causal-LM family of transformers for two steps, tiny and random, and compare with plain transformers.

Each family and layout is one forked process of at most LIMIT_S. A line of results.jsonl holds what was found, and
families that have a line are not run again; `--again FAMILY ...` runs some again. results.md is written at the end.
"""

import argparse
import contextlib
import gzip
import io
import itertools
import json
import multiprocessing
import os
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from shapes import VOCABULARY, tiny_config
from table import write_table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sftlab.assets import locate
from sftlab.config.errors import TAUGHT
from sftlab.config.groups import CONF
from sftlab.inference.decoding import decode
from sftlab.inference.loaded_model import LoadedModel
from sftlab.inference.next_token import DecodingSettings
from sftlab.inference.trained_model import resolve
from sftlab.models.load import DEMO, silence
from sftlab.training import run as training
from sftlab.training.trainer import Trainer

LIMIT_S = 300
LAYOUTS = ("tree", "padded")
LARGEST = 60_000_000  # parameters of a model that counts as tiny
NEW_TOKENS = 8
ENDS = {"eos_token_id": 1, "pad_token_id": 2}


def make(family: str, folder: Path) -> dict[str, Any]:
    """Save a tiny random model whose logits differ enough to be compared, and the demo's tokenizer."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32).eval()
    parameters = sum(p.numel() for p in model.parameters())
    if parameters > LARGEST:
        raise ValueError(f"not tiny: {parameters:,} parameters")
    with torch.no_grad():
        for p in model.parameters():
            if not torch.isfinite(p).all():
                p.normal_(0, 0.1)
        head = model.get_output_embeddings()
        spread = float(model(input_ids=torch.randint(3, 1000, (1, 24)), use_cache=False).logits.std())
        if head is not None and 1e-6 < spread < 1.5:
            head.weight.mul_(min(2.0 / spread, 30.0))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(locate(DEMO)).save_pretrained(folder)
    return {"parameters": parameters, "vocabulary": VOCABULARY}


def write_data(work: Path) -> None:
    """Write a few questions of the demo: its own 250 for validation would be scored twice in each run."""
    work.mkdir(parents=True, exist_ok=True)
    for count, source in ((32, "train.jsonl.gz"), (8, "validation.jsonl")):
        with (gzip.open if source.endswith(".gz") else open)(locate(f"asset://demo/{source}"), "rt") as file:
            (work / source.removesuffix(".gz")).write_text("".join(itertools.islice(file, count)))


def overrides(model: Path, run_dir: Path, layout: str) -> list[str]:
    """Return what is typed for a run of two steps on a few of the demo's questions."""
    data = model.parent.parent
    return [
        "model=hf", f"model.name_or_path='{model}'", "data=demo", f"data.path='{data}/train.jsonl'",
        f"data.val_path='{data}/validation.jsonl'", "data.num_workers=1",
        f"data.layout={layout}", "trainer.max_steps=2", "trainer.batch_size=8", "optim.lr=1e-3", "tracker=none",
        "evaluation.num_answers=4", f"evaluation.max_new_tokens={NEW_TOKENS}", f"run_dir='{run_dir}'",
    ]  # fmt: skip


def train(model: Path, run_dir: Path, layout: str) -> dict[str, Any]:
    """Train two steps in this process; return losses, and how all that follows compares with plain transformers."""
    typed = overrides(model, run_dir, layout)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config: Any = OmegaConf.to_container(compose("train", overrides=typed), resolve=True)
    found: dict[str, Any] = {"losses": []}
    step_of, leave = Trainer.train_step, training.leave_model

    def spy(self: Trainer, step: int, data: Any) -> Any:
        if step == 1:
            found["plain"] = plain_loss(model, [self.loader.examples[int(i)] for i in data.indices])
        return step_of(self, step, data)

    def spy_leave(config: Any, made: Any, here: Any, score: float) -> Any:
        left = leave(config, made, here, score)
        trained = {name: whole(t).clone() for name, t in made.trainer.scorer.model.state_dict().items()}
        found["export"] = compare_export(run_dir / "model", trained)
        found["noisy"] = made.trainer.scorer.noisy
        return left

    Trainer.train_step, training.leave_model = spy, spy_leave  # type: ignore[method-assign]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            training.run(config, typed)
    except Exception as error:
        kind = "refused" if isinstance(error, TAUGHT) else "crash"
        return found | {kind: f"{type(error).__name__}: {error}", "at": traceback.format_exc()[-1500:]}
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found["losses"] = [line["train/loss"] for line in metrics if "train/loss" in line]
    return found | compare_answers(run_dir)


def whole(tensor: Any) -> torch.Tensor:
    """Return a sharded tensor as a whole one."""
    full: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


@torch.no_grad()
def plain_loss(folder: Path, examples: list[Any]) -> float:
    """Return the loss of a step by plain transformers in evaluation mode, one example at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    nll = count = 0.0
    for e in examples:
        ids = torch.tensor(e.tokens[None].astype(np.int64))
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        at = np.flatnonzero(e.supervised)
        nll += float(torch.nn.functional.cross_entropy(logits[at - 1], ids[0, at], reduction="sum"))
        count += len(at)
    return nll / count


def compare_export(folder: Path, trained: dict[str, torch.Tensor]) -> str:
    """Return `equal` if plain transformers loads exactly the trained weights, else what differs."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    loaded = model.state_dict()
    wrong = [n for n, t in trained.items() if n not in loaded or not torch.equal(t.float(), loaded[n].float())]
    wrong += sorted(set(loaded) - set(trained))
    keys = {k: sorted(map(str, v)) for k, v in info.items() if v and k.endswith("_keys")}
    return "equal" if not wrong and not keys else f"differs: {wrong[:3]} {keys}"


def compare_answers(run_dir: Path) -> dict[str, Any]:
    """Return how many answers, in the run and from the folder, are those of plain transformers, a prompt at a time."""
    lines = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["step"] == 2]
    loaded = LoadedModel.load(resolve(str(run_dir)), torch.device("cpu"))
    prompts = [loaded.encode(line["prompt"]) for line in last]
    model = AutoModelForCausalLM.from_pretrained(run_dir / "model", dtype=torch.float32).eval()
    silence(model.config)
    forced = model.generation_config.forced_eos_token_id  # BART's, at the limit of new tokens
    plain = []
    for prompt in prompts:
        ids = torch.tensor(prompt[None].astype(np.int64))
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, **ENDS
        )
        plain.append([t for t in out[0, len(prompt) :].tolist() if t not in (1, forced)])
    texts = [loaded.decode_text(tokens).strip() for tokens in plain]
    found = {"answers": f"{sum(t == line['answer'] for t, line in zip(texts, last, strict=True))}/{len(last)}"}
    try:
        decoded = dict(decode(loaded.scorer, prompts, DecodingSettings(max_new_tokens=NEW_TOKENS), loaded.ends))
    except TAUGHT as error:
        return found | {"decoded": f"refused: {error}"}
    return found | {
        "decoded": f"{sum([t for t in decoded[i] if t != forced] == p for i, p in enumerate(plain))}/{len(plain)}"
    }


def in_a_fork(work: Any, *arguments: Any) -> dict[str, Any]:
    """Return what `work` returns in a forked process, or what became of it."""
    fork = multiprocessing.get_context("fork")
    mine, theirs = fork.Pipe(duplex=False)

    def child() -> None:
        with open(os.devnull, "w") as silent:
            os.dup2(silent.fileno(), 1)
            os.dup2(silent.fileno(), 2)
        try:
            theirs.send(work(*arguments))
        except BaseException as error:
            theirs.send({"crash": f"{type(error).__name__}: {error}", "at": traceback.format_exc()[-1500:]})

    process = fork.Process(target=child)
    process.start()
    theirs.close()
    try:
        found: dict[str, Any] = mine.recv() if mine.poll(LIMIT_S) else {"crash": f"not ready after {LIMIT_S} s"}
    except EOFError:
        found = {"crash": "the process died"}
    process.kill()
    process.join()
    return found


def one(family: str, work: Path) -> dict[str, Any]:
    """Return everything about one family."""
    line: dict[str, Any] = {"family": family}
    folder = work / "models" / family
    built = in_a_fork(make, family, folder)
    if "crash" in built:
        return line | {"not built": built["crash"].splitlines()[0][:200]}
    for layout in LAYOUTS:
        run_dir = work / "runs" / f"{family}-{layout}"
        in_a_fork(clear, run_dir)
        line[layout] = in_a_fork(train, folder, run_dir, layout)
    return line | built


def clear(folder: Path) -> dict[str, Any]:
    """Delete an earlier run."""
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
    return {}


def main() -> None:
    """Run the families that have no line yet, two at a time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for models and runs; results.jsonl lies in it")
    parser.add_argument("--again", nargs="*", default=[], help="families to run again")
    parser.add_argument("--only", nargs="*", help="families to run (default: all)")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    write_data(given.work)
    results = given.work / "results.jsonl"
    done = {}
    if results.exists():
        done = {line["family"]: line for line in map(json.loads, results.read_text().splitlines())}
    families = given.again or given.only or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    todo = [family for family in families if family not in done or family in given.again]
    fork = multiprocessing.get_context("fork")  # processes, because a fork beside threads may inherit a held lock
    with ProcessPoolExecutor(given.processes, mp_context=fork) as pool, results.open("a") as file:
        for ready in as_completed([pool.submit(one, family, given.work) for family in todo]):
            line = ready.result()
            done[line["family"]] = line
            file.write(json.dumps(line) + "\n")
            file.flush()
            print(
                line["family"], {k: str(v)[:300] for k, v in line.items() if k in ("not built", *LAYOUTS)}, flush=True
            )
    write_table(given.work / "results.md", done.values())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
