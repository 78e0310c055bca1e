"""Examples per second of sftlab, TRL, a plain loop, an expert's loop and NeMo AutoModel, side by side on this machine.

    experiments/peers/build.sh PEERS
    python experiments/peers/compare.py --data train.jsonl --peers PEERS                  own order: how fast each is
    python experiments/peers/compare.py --data train.jsonl --peers PEERS --order given    the same steps: losses agree
    python experiments/peers/compare.py --data train.jsonl --peers PEERS --device cuda --size 1b --tokenizer FOLDER

Every side loads the same weights and trains the same rows with AdamW, clipping at 1.0 and a constant learning rate. In
a round the sides run one after another, so that a change of the machine's mood hits all. With `--order given` the
file's rows are first put in the order in which sftlab's plan deals them, and every side trains them in that order, so
its losses must be sftlab's.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from sides import WARM_UP

HERE = Path(__file__).parent
REPO = HERE.parents[1]
SAME = 1e-3  # nats: the most by which a loss in float32 may differ from ours


@dataclass(frozen=True)
class Side:
    """A side: its name in tables, its script with arguments or our layout, the peer whose environment it needs.

    `more` are overrides of our side. A side with an `adapter` is compared with ours that has one.
    """

    label: str
    script: tuple[str, ...] = ()
    layout: str = ""
    peer: str = ""
    more: tuple[str, ...] = ()
    adapter: bool = False


SIDES = {
    "tree": Side("sftlab tree", layout="tree"),
    "packed": Side("sftlab packed", layout="packed"),
    "plain": Side("plain loop", ("plain_side.py",)),
    "expert": Side("expert's loop", ("plain_side.py", "--expert")),
    "trl": Side("TRL, defaults", ("trl_side.py",), peer="trl"),
    "trl_best": Side("TRL, best", ("trl_side.py", "--best"), peer="trl"),
    "lora": Side("sftlab LoRA", layout="tree", more=("peft=lora",), adapter=True),
    "trl_lora": Side("TRL, LoRA", ("trl_side.py", "--lora"), peer="trl", adapter=True),
    "trl_lora_best": Side("TRL, LoRA, best", ("trl_side.py", "--best", "--lora"), peer="trl", adapter=True),
    "automodel": Side("NeMo AutoModel", ("automodel_side.py",), peer="automodel"),
}


def arguments() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", required=True, help="JSONL in SQuAD's schema")
    made.add_argument("--peers", help="the folder that build.sh filled; sides without their environment are left out")
    made.add_argument("--sides", default=",".join(SIDES), help="some of %(default)s")
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    made.add_argument("--order", choices=["own", "given"], default="own")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--steps", type=int, default=12)
    made.add_argument("--batch", type=int, default=16)
    made.add_argument("--our-batch", type=int, help="where sftlab is fastest with another batch")
    made.add_argument("--size", default="7m", help="of the model: tiny, 7m or 1b (model.py)")
    made.add_argument("--tokenizer", help="folder of a tokenizer; default: one trained on the data")
    made.add_argument("--timeout", type=float, default=900, help="seconds for one side")
    made.add_argument("--out", help="file for the JSON")
    given = made.parse_args()
    unknown = sorted(set(given.sides.split(",")) - set(SIDES))
    if unknown:
        made.error(f"--sides {unknown[0]}: expected some of {','.join(SIDES)}")
    if given.steps < WARM_UP + 2:
        made.error(f"--steps {given.steps}: {WARM_UP} are warm-up, so expected at least {WARM_UP + 2}")
    if not Path(given.data).is_file():
        made.error(f"--data {given.data}: there is no such file")
    return given


class Failed(Exception):
    """A side that did not end well; the text is the end of what it printed."""


def execute(command: list[str], environment: dict[str, str], timeout_s: float) -> str:
    """Run a side and return its standard output. Raises: Failed."""
    try:
        done = subprocess.run(
            command, env=os.environ | environment, cwd=REPO, capture_output=True, text=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"no result in {timeout_s:.0f} s") from None
    if done.returncode:
        raise Failed("\n".join((done.stdout + done.stderr).splitlines()[-12:]))
    return done.stdout


def ordered(data: str, model: Path, folder: Path, batch: int, steps: int) -> Path:
    """Return a file with the rows of `steps` steps in the order in which sftlab's plan deals them."""
    import torch
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from sftlab.config.groups import CONF
    from sftlab.config.overrides import inside
    from sftlab.training.rows import preview_parts

    OmegaConf.register_new_resolver("inside", inside, replace=True)
    overrides = ["data=squad", f"data.path='{data}'", f"model.name_or_path='{model}'", f"trainer.batch_size={batch}"]
    with initialize_config_dir(str(CONF.absolute()), version_base="1.3"):
        config = OmegaConf.to_container(compose("train", [*overrides, "run_dir=unused"]), resolve=True)
    plan = preview_parts(config, torch.device("cpu"))[3]
    with open(data, encoding="utf-8") as file:
        lines = file.read().splitlines()
    chosen = [lines[int(i)] for step in range(1, steps + 1) for i in plan.examples(step)]
    path = folder / "ordered.jsonl"
    path.write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return path


def ours(given: argparse.Namespace, side: Side, model: Path, data: Path, folder: Path) -> dict[str, Any]:
    """Train with sftlab as anyone would, and return what its metrics say."""
    batch = given.our_batch or given.batch
    overrides = [
        *("data=squad", f"data.path={data}", f"data.layout={side.layout}", *side.more),
        *(f"model.name_or_path={model}", "tracker=none"),
        *(f"trainer.batch_size={batch}", f"trainer.max_steps={given.steps}", f"optim.lr={LR}", "optim.weight_decay=0"),
        *("schedule=constant", "schedule.warmup_steps=0", f"run_dir={folder}"),
        *(("data.shuffle=false", "data.group_by_prefix=false") if given.order == "given" else ()),
    ]
    command = [sys.executable, "-m", "sftlab.train", *overrides]
    execute(command, {"PYTHONPATH": f"{REPO}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}, given.timeout)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/loss" in line]
    ends = [line["time_s"] for line in steps][WARM_UP - 1 :]
    return {
        "examples_per_s": batch * (len(ends) - 1) / (ends[-1] - ends[0]),
        "step_s_median": statistics.median(b - a for a, b in pairwise(ends)),
        "losses": [line["train/loss"] for line in steps],
        "peak_gib": steps[-1].get("mem/peak_gib"),
        "versions": {},
    }


LR = 1e-4


def theirs(given: argparse.Namespace, side: Side, model: Path, data: Path) -> dict[str, Any]:
    """Run a peer's side in its environment and return its result."""
    environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if side.peer:
        packages = str(Path(given.peers).absolute() / side.peer)
        environment["PYTHONPATH"] = f"{packages}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    script, *more = side.script
    command = [sys.executable, str(HERE / script), *more, "--model", str(model), "--data", str(data)]
    command += ["--steps", str(given.steps), "--batch", str(given.batch), "--lr", str(LR)]
    command += ["--device", given.device, "--order", given.order]
    lines = execute(command, environment, given.timeout).splitlines()
    found = [line.removeprefix("RESULT ") for line in lines if line.startswith("RESULT ")]
    if not found:
        raise Failed("it printed no RESULT")
    return dict(json.loads(found[-1]))


def compare(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run every side in every round; return what each measured, or why it failed."""
    chosen = {name: SIDES[name] for name in given.sides.split(",")}
    for name, side in list(chosen.items()):
        if side.peer and not (given.peers and Path(given.peers, side.peer).is_dir()):
            print(f"left out: {side.label} (experiments/peers/build.sh FOLDER {side.peer}, then --peers FOLDER)")
            del chosen[name]
        elif name == "automodel" and given.device == "cpu":
            print(f"left out: {side.label}, which trains on CUDA only (automodel_side.py)")
            del chosen[name]
    model = folder / "model"
    make = [sys.executable, str(HERE / "model.py"), "--data", given.data, "--out", str(model), "--size", given.size]
    execute([*make, *(["--tokenizer", given.tokenizer] if given.tokenizer else [])], {}, given.timeout)
    data = Path(given.data).absolute()
    if given.order == "given":
        data = ordered(str(data), model, folder, given.batch, given.steps)
    found: dict[str, Any] = {name: {"label": side.label, "rounds": [], "failed": None} for name, side in chosen.items()}
    for i in range(given.rounds):
        for name, side in chosen.items():
            if found[name]["failed"]:
                continue
            try:
                work = folder / f"{name}{i}"
                result = ours(given, side, model, data, work) if side.layout else theirs(given, side, model, data)
                found[name]["rounds"].append(result)
                print(f"round {i + 1}: {side.label} {result['examples_per_s']:.2f} examples/s", flush=True)
            except Failed as failure:
                found[name]["failed"] = str(failure)
                print(f"round {i + 1}: {side.label} failed: {failure}", flush=True)
    return found


def summarised(found: dict[str, Any]) -> None:
    """Add to each side its median rate, its losses and their largest difference from ours."""
    first: dict[bool, list[float]] = {}
    for name, side in found.items():
        if SIDES[name].layout and side["rounds"]:
            first.setdefault(SIDES[name].adapter, side["rounds"][0]["losses"])
    for name, side in found.items():
        if side["rounds"]:
            side["examples_per_s"] = statistics.median(r["examples_per_s"] for r in side["rounds"])
            side["losses"] = side["rounds"][0]["losses"]
            of_ours = first.get(SIDES[name].adapter, [])
            side["difference"] = max((abs(a - b) for a, b in zip(side["losses"], of_ours, strict=False)), default=0.0)


def table(found: dict[str, Any], order: str) -> str:
    """Return the Markdown table. Losses are compared only where every side trained the same steps."""
    trl = max((s["examples_per_s"] for n, s in found.items() if n.startswith("trl") and s["rounds"]), default=None)
    difference = ["largest difference from ours"] if order == "given" else []
    heads = ["", "examples/s, median", "all rounds", "times TRL's best", "first loss", "last loss", *difference]
    lines = [heads, ["---"] * len(heads)]
    for side in found.values():
        if not side["rounds"]:
            lines.append([side["label"], f"failed: {side['failed'].splitlines()[-1]}", *[""] * (len(heads) - 2)])
            continue
        rate = side["examples_per_s"]
        cells = [side["label"], f"{rate:.2f}", ", ".join(f"{r['examples_per_s']:.2f}" for r in side["rounds"])]
        cells += [f"{rate / trl:.1f}" if trl else "-", f"{side['losses'][0]:.4f}", f"{side['losses'][-1]:.4f}"]
        lines.append([*cells, *([f"{side['difference']:.1e}"] if difference else [])])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> int:
    given = arguments()
    with tempfile.TemporaryDirectory() as folder:
        found = compare(given, Path(folder))
    summarised(found)
    print(f"\n{table(found, given.order)}")
    if given.out:
        settings = {k: v for k, v in vars(given).items() if k not in ("data", "peers", "out", "tokenizer")}
        Path(given.out).write_text(json.dumps({"settings": settings, "sides": found}, indent=2), encoding="utf-8")
    same = given.order == "own" or given.device == "cuda"
    apart = [] if same else [s["label"] for s in found.values() if s.get("difference", 0) > SAME]
    if apart:
        print(f"losses of {', '.join(apart)} differ from ours by more than {SAME} nats")
    return int(bool(apart) or any(side["failed"] for side in found.values()))


if __name__ == "__main__":
    sys.exit(main())
