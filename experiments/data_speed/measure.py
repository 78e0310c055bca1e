"""How fast and how large the data layer is. One sub-command a measurement, `all` for every one of them.

    python experiments/data_speed/measure.py SUBCOMMAND [--squad FILE] [--gsm8k FILE] [--tokenizer FOLDER] [--limit N]

Progress goes to standard error, each result as one JSON line to standard output. Without files, made-up rows stand in.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # rates are those of one core

import numpy as np

WORDS = ["the", "of", "keeper", "bread", "stone", "river", "counted", "again", "evening", "harbour", "quiet", "seven"]
SQUAD_EXAMPLES = 87_599


def progress(what: str, items: Iterable[Any], total: int) -> Iterator[Any]:
    """Yield the items, with a line on standard error every second or so."""
    began, said = time.perf_counter(), 0.0
    for i, item in enumerate(items, 1):
        yield item
        now = time.perf_counter()
        if now - said > 1 or i == total:
            end = "\n" if i == total else ""
            print(f"\r{what}: {i:,} of {total:,}, {now - began:.0f} s", end=end, file=sys.stderr, flush=True)
            said = now


def tell(measurement: str, **values: Any) -> None:
    """Print one result."""
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
    print(json.dumps({"measurement": measurement, **rounded}), flush=True)


# Inputs -------------------------------------------------------------------------------------------------------------


def squad_file(given: Path | None, folder: Path, num: int) -> Path:
    """Return the file given, or one of `num` made-up questions on passages of SQuAD's length."""
    if given is not None:
        return given
    path = folder / "squad.jsonl"
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for i in progress("writing rows", range(num), num):
            if i % 5 == 0:
                context = " ".join(rng.choice(WORDS, 120))
            row = {"id": f"q{i}", "context": context, "question": f"What about {i}?"}
            file.write(json.dumps({**row, "answers": {"text": [str(rng.choice(WORDS))]}}) + "\n")
    return path


def gsm8k_file(given: Path | None, folder: Path, num: int) -> Path:
    """Return the file given, or one of `num` made-up problems."""
    if given is not None:
        return given
    path = folder / "gsm8k.jsonl"
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for i in range(num):
            words = [" ".join(rng.choice(WORDS, int(rng.integers(20, 90)))) for _ in range(2)]
            file.write(json.dumps({"question": words[0], "answer": f"{words[1]}\n#### {i}"}) + "\n")
    return path


def chat_file(given: Path | None, folder: Path, num: int) -> Path:
    """Return the file given, or one of `num` made-up conversations of two to eight turns."""
    if given is not None:
        return given
    path = folder / "chat.jsonl"
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for _ in progress("writing conversations", range(num), num):
            messages = [{"role": "system", "content": "You are the keeper of the harbour. Answer briefly."}]
            for _ in range(int(rng.integers(1, 5))):
                for role in ("user", "assistant"):
                    words = " ".join(rng.choice(WORDS, int(rng.integers(10, 60))))
                    messages.append({"role": role, "content": words})
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def load_tokenizer(folder: str | None) -> Any:
    from sftlab.models.load import DEMO, Model

    return Model(folder or DEMO).load_tokenizer()


def squad(path: Path, tokenizer: Any, **settings: Any) -> Any:
    """Return the training examples, cut as `data.overlong=truncate` cuts them to 4096 tokens."""
    from sftlab.data.dataset import Data
    from sftlab.data.formats.squad import Squad

    return Data(Squad(), str(path), overlong="truncate", **settings).examples(tokenizer, 4096)[0]


def own_cache(folder: Path) -> None:
    """Let tokenised examples lie in a folder of this measurement's own: nothing is warm there."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = folder
    datasets.disable_progress_bars()


# Measurements -------------------------------------------------------------------------------------------------------


def plan(args: argparse.Namespace, folder: Path) -> None:
    """Planning an epoch: the order, grouped by prefix, cut into steps. Wanted: under 5 s."""
    from sftlab.data.plan import Plan

    num = args.limit or SQUAD_EXAMPLES
    if args.squad:
        own_cache(folder)
        groups = squad(args.squad, load_tokenizer(args.tokenizer), limit=args.limit).groups
    else:
        sizes = np.random.default_rng(0).integers(1, 9, num)
        groups = np.repeat(np.arange(num), sizes)[:num]
    times = []
    for seed in progress("planning", range(5), 5):
        began = time.perf_counter()
        made = Plan(groups, 64, seed, True, True)
        met = sum(len(made.examples(s)) for s in range(1, made.steps_per_epoch + 1))
        times.append(time.perf_counter() - began)
        assert met == len(groups)
    tell("plan", examples=len(groups), seconds=statistics.median(times), wanted="< 5 s")


def tokenise(args: argparse.Namespace, folder: Path) -> None:
    """Examples/s of SQuAD on one worker, and the tokenizer's own rate on the same texts. Wanted: ratio over 0.9."""
    from sftlab.data.formats.squad import Squad

    path = squad_file(args.squad, folder, args.limit or 20_000)
    rate(args, folder, "tokenise", path, Squad(), load_tokenizer(args.tokenizer))


def chat(args: argparse.Namespace, folder: Path) -> None:
    """The same of conversations of two to eight turns. Wanted: ratio over 0.9."""
    from sftlab.data.formats.chat import Chat

    tokenizer = load_tokenizer(args.tokenizer)
    rate(args, folder, "chat", chat_file(args.chat, folder, args.limit or 20_000), Chat(), tokenizer)


def rate(args: argparse.Namespace, folder: Path, name: str, path: Path, format: Any, tokenizer: Any) -> None:
    """Measure the examples/s of one worker from a cold cache, against `tokenizer(batch)` of the texts it made."""
    from sftlab.data.opening import open_source
    from sftlab.data.store import store
    from sftlab.data.template import prepare_tokenizer

    prepare_tokenizer(tokenizer, [format])

    def made(limit: int | None) -> Any:
        source = open_source(str(path), None, format.rows)
        return store(source, format, tokenizer, limit=limit, num_workers=1)

    own_cache(folder / "first")
    plain = not format.converses  # a conversation's special tokens are its template's text
    texts = [tokenizer.decode(e.tokens, skip_special_tokens=plain) for e in made(args.limit)]  # imports, page cache
    ours, theirs = [], []
    for i in progress("tokenising", range(args.repeats), args.repeats):
        own_cache(folder / f"cache{i}")
        began = time.perf_counter()
        ours.append(len(made(args.limit)) / (time.perf_counter() - began))
        began = time.perf_counter()
        for first in range(0, len(texts), 1000):
            tokenizer(texts[first : first + 1000])
        theirs.append(len(texts) / (time.perf_counter() - began))
    a, b = statistics.median(ours), statistics.median(theirs)
    tell(name, examples=len(texts), examples_per_s_a_core=a, tokenizers_own=b, ratio=a / b, wanted="ratio > 0.9")


def preview(args: argparse.Namespace, folder: Path) -> None:
    """Seconds from the start of the command to its first example, and to its end. Wanted: it begins in under 5 s."""
    path = squad_file(None, folder, args.limit or 100_000)
    command = [sys.executable, "-u", "-m", "sftlab.preview", "data=squad", f"data.path={path}", "data.overlong=drop"]
    firsts, ends = [], []
    for i in progress("previewing", range(args.repeats), args.repeats):
        env = {**os.environ, "HF_DATASETS_CACHE": str(folder / f"cache{i}"), "PYTHONPATH": os.pathsep.join(sys.path)}
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env)
        assert process.stdout is not None
        process.stdout.readline()
        firsts.append(time.perf_counter() - began)
        process.stdout.read()
        assert process.wait() == 0
        ends.append(time.perf_counter() - began)
    begins, ends_s = statistics.median(firsts), statistics.median(ends)
    tell("preview", examples=args.limit or 100_000, begins_s=begins, ends_s=ends_s, wanted="begins_s < 5")


def warm(args: argparse.Namespace, folder: Path) -> None:
    """From a warm cache to the first step laid out, the report included. Wanted: under 5 s."""
    from sftlab.data.loader import Loader, RowLayout
    from sftlab.data.plan import Plan
    from sftlab.data.report import report
    from sftlab.training.run import REPORTED_STEPS

    path = squad_file(args.squad, folder, args.limit or 20_000)
    tokenizer = load_tokenizer(args.tokenizer)
    own_cache(folder / "cache")
    times = []
    for i in progress("starting", range(args.repeats + 1), args.repeats + 1):
        began = time.perf_counter()
        train = squad(path, tokenizer, limit=args.limit)
        loader = Loader(train, Plan(train.groups, 64, i), RowLayout("tree", 4096, 1, 0, 1, 0), train.lengths)
        report(train, None, loader.plan, loader.row_layout, REPORTED_STEPS)
        next(loader.steps(1, 1))
        times.append(time.perf_counter() - began)
    tell("warm", examples=len(train), cold_s=times[0], warm_s=statistics.median(times[1:]), wanted="warm_s < 5")


def loader(args: argparse.Namespace, folder: Path) -> None:
    """Median step time with the loader, over that with the same steps from memory. Wanted: within 3 %."""
    path = squad_file(args.squad, folder, args.limit or 20_000)
    own_cache(folder / "cache")
    made = Bench(squad(path, load_tokenizer(args.tokenizer), limit=args.limit), args)
    steps = made.loader("tree")
    num = args.steps
    made.window(steps.steps(1, 5))  # caches and allocators warm
    ahead: list[float] = []
    memory: list[float] = []
    for pair in progress("pairs of windows", range(args.pairs), args.pairs):
        first = 6 + pair * num
        kept = [steps.step(s) for s in range(first, first + num)]
        runs: list[tuple[list[float], Callable[[], Iterable[Any]]]] = [
            (ahead, lambda f=first: steps.steps(f, f + num - 1)),  # type: ignore[misc]
            (memory, lambda k=kept: k),  # type: ignore[misc]
        ]
        for times, source in runs if pair % 2 == 0 else reversed(runs):
            times += made.window(source())
    a, b = statistics.median(ahead), statistics.median(memory)
    tell("loader", device=made.name, step_s=a, from_memory_s=b, ratio=a / b, pairs=args.pairs, wanted="ratio < 1.03")


def layouts(args: argparse.Namespace, folder: Path) -> None:
    """Training examples/s of the three layouts, in interleaved windows."""
    path = squad_file(args.squad, folder, args.limit or 20_000)
    own_cache(folder / "cache")
    made = Bench(squad(path, load_tokenizer(args.tokenizer), limit=args.limit), args)
    kinds = ("tree", "packed", "padded")
    loaders = {k: made.loader(k) for k in kinds}
    for each in loaders.values():
        made.window(each.steps(1, 2))
    rates: dict[str, list[float]] = {k: [] for k in kinds}
    for i in progress("windows", range(args.pairs * 3), args.pairs * 3):
        kind, first = kinds[i % 3], 3 + (i // 3) * args.steps
        rates[kind] += [made.batch_size / s for s in made.window(loaders[kind].steps(first, first + args.steps - 1))]
    medians = {k: statistics.median(v) for k, v in rates.items()}
    speedup = {f"tree_over_{k}": medians["tree"] / medians[k] for k in kinds[1:]}
    tell("layouts", device=made.name, batch_size=made.batch_size, **medians, **speedup)


def memory(args: argparse.Namespace, folder: Path) -> None:
    """Peak host memory of tokenising and opening generated JSONL. Wanted: a 10 GB file takes under 2 GB."""
    found = []
    for gib in (args.gib / 10, args.gib):
        path = folder / "large.jsonl"
        write_large(path, int(gib * 2**30))
        arguments = ["x", str(path), str(folder / "cache")]
        code = f"import sys; sys.argv = {arguments!r}; import measure; measure.touch_all()"
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
        process = subprocess.Popen([sys.executable, "-c", code], env=env)
        most = {"Pss": 0.0, "Pss_Anon": 0.0}
        began = time.perf_counter()
        while process.poll() is None:
            for key, value in tree_memory(process.pid).items():
                most[key] = max(most[key], value)
            print(f"\r{gib:.2f} GiB: {time.perf_counter() - began:.0f} s, {most}", end="", file=sys.stderr, flush=True)
            time.sleep(0.2)
        print(file=sys.stderr)
        assert process.returncode == 0
        found.append((gib, most))
        tell("memory", file_gib=gib, peak_gib=most["Pss"], of_it_anonymous_gib=most["Pss_Anon"])
        path.unlink()
    (small, a), (large, b) = found
    slope = (b["Pss_Anon"] - a["Pss_Anon"]) / (large - small)
    tell(
        "memory at 10 GB",
        anonymous_gib=b["Pss_Anon"] + slope * (10e9 / 2**30 - large),
        wanted="< 2 GB; the rest is page cache",
    )


def padding(args: argparse.Namespace, folder: Path) -> None:
    """Padding's share of the tokens through the model on GSM8K, batch 64, row_length 2048. Wanted: under 3 %."""
    from sftlab.data.dataset import Data
    from sftlab.data.formats.gsm8k import Gsm8k
    from sftlab.data.loader import Loader, RowLayout
    from sftlab.data.plan import Plan

    path = gsm8k_file(args.gsm8k, folder, args.limit or 7473)
    own_cache(folder / "cache")
    train = Data(Gsm8k(), str(path), limit=args.limit).examples(load_tokenizer(args.tokenizer), 2048)[0]
    made = Plan(train.groups, 64, 0, True, False)
    for layout in ("tree", "packed"):
        for fixed in (False, True):
            each = Loader(train, made, RowLayout(layout, 2048, 1, 0, 1, 0, fixed_shapes=fixed))
            nodes = through = 0
            shapes = set()
            for s in progress(
                f"{layout}, fixed shapes {fixed}", range(1, made.steps_per_epoch + 1), made.steps_per_epoch
            ):
                step = each.step(s)
                nodes, through = nodes + step.num_nodes, through + step.num_tokens
                shapes |= {tuple(b.tokens.shape) for b in step.microbatches}
            tell(
                "padding",
                layout=layout,
                fixed_shapes=fixed,
                padding=1 - nodes / through,
                shapes=len(shapes),
                wanted="< 0.03",
            )


def sharing(args: argparse.Namespace, folder: Path) -> None:
    """Tokens an example of SQuAD with and without sharing, grouped by prefix and not."""
    from sftlab.data.loader import Loader, RowLayout
    from sftlab.data.plan import Plan

    path = squad_file(args.squad, folder, args.limit or 20_000)
    own_cache(folder / "cache")
    train = squad(path, load_tokenizer(args.tokenizer), limit=args.limit)
    for grouped in (True, False):
        made = Plan(train.groups, 64, 0, True, grouped)
        each = Loader(train, made, RowLayout("tree", 4096, 1, 0, 1, 0))
        sums = np.zeros(3)
        for s in progress(f"grouped {grouped}", range(1, made.steps_per_epoch + 1), made.steps_per_epoch):
            step = each.step(s)
            sums += step.num_examples, step.num_effective_tokens, step.num_nodes
        num, alone, shared = sums
        tell(
            "sharing",
            examples=int(num),
            group_by_prefix=grouped,
            tokens=alone / num,
            shared=shared / num,
            ratio=alone / shared,
        )


# Machinery ----------------------------------------------------------------------------------------------------------


class Bench:
    """A 6.8M-parameter Llama (hidden 256, 6 layers) with fused AdamW on the best device here, on some examples."""

    def __init__(self, examples: Any, args: argparse.Namespace) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from sftlab.data.plan import Plan
        from sftlab.models.architecture import attention
        from sftlab.models.scorer import Scorer

        self.examples, self.batch_size, self.torch = examples, args.batch_size, torch
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.cuda else "cpu")
        self.name = torch.cuda.get_device_name() if self.cuda else f"CPU, {torch.get_num_threads()} threads"
        config = LlamaConfig(
            vocab_size=max(8192, len(load_tokenizer(args.tokenizer))), hidden_size=args.hidden,
            intermediate_size=3 * args.hidden,
            num_hidden_layers=args.layers, num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=4096,
            tie_word_embeddings=True,
        )  # fmt: skip
        config._attn_implementation = attention(config, self.device)
        torch.manual_seed(0)
        dtype = torch.bfloat16 if self.cuda else torch.float32
        self.scorer = Scorer(LlamaForCausalLM(config).to(self.device, dtype))
        self.optimizer = torch.optim.AdamW(self.scorer.parameters(), lr=1e-4, fused=True)
        self.plan = Plan(examples.groups, self.batch_size, 0, True, True)

    def loader(self, layout: str) -> Any:
        from sftlab.data.loader import Loader, RowLayout

        # As sftlab/build.py does: 4,096 tokens a microbatch.
        longest = -(-int(self.examples.lengths.max()) // 128) * 128
        length, rows = (longest, 4096 // longest) if layout == "padded" else (4096, 1)
        row_layout = RowLayout(layout, length, rows, 0, 1, 0, fixed_shapes=self.cuda, pin_memory=self.cuda)
        return Loader(self.examples, self.plan, row_layout, self.examples.lengths)

    def window(self, steps: Iterable[Any]) -> list[float]:
        """Train on these steps; return the seconds of each, the wait for it included."""
        times = []
        began = time.perf_counter()
        for step in steps:
            for batch in step.microbatches:
                (self.scorer(batch.to(self.device)).nll / step.num_targets).backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.cuda:
                self.torch.cuda.synchronize()
            now = time.perf_counter()
            times.append(now - began)
            began = now
        return times


def write_large(path: Path, num_bytes: int) -> None:
    """Write made-up rows until the file has `num_bytes`."""
    rng = np.random.default_rng(0)
    contexts = [" ".join(rng.choice(WORDS, 120)) for _ in range(1000)]
    written = i = 0
    with path.open("w") as file:
        while written < num_bytes:
            lines = []
            for _ in range(1000):
                row = {
                    "context": f"{i // 5} {contexts[i // 5 % 1000]}",
                    "question": f"What about {i}?",
                    "answers": {"text": ["bread"]},
                }
                lines.append(json.dumps(row) + "\n")
                i += 1
            text = "".join(lines)
            written += len(text)
            file.write(text)
            print(f"\rwriting {path.name}: {written / 2**30:.2f} GiB", end="", file=sys.stderr)
    print(file=sys.stderr)


def touch_all() -> None:
    """Tokenise a file with two workers, then read every example once, as an epoch does."""
    from sftlab.data.plan import Plan

    path, cache = sys.argv[1:]
    own_cache(Path(cache))
    train = squad(Path(path), load_tokenizer(None), num_workers=2)
    made = Plan(train.groups, 64, 0)
    assert sum(int(train[int(i)].tokens.sum()) for i in made.order(0)) > 0


def tree_memory(pid: int) -> dict[str, float]:
    """Return the proportional set size of a process and its children in GiB: all of it, and its anonymous part."""
    total = {"Pss": 0.0, "Pss_Anon": 0.0}
    waiting = [pid]
    while waiting:
        p = waiting.pop()
        try:
            waiting += map(int, Path(f"/proc/{p}/task/{p}/children").read_text().split())
            for line in Path(f"/proc/{p}/smaps_rollup").read_text().splitlines():
                key = line.partition(":")[0]
                if key in total:
                    total[key] += int(line.split()[1]) / 2**20
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return total


MEASUREMENTS = (plan, tokenise, chat, preview, warm, loader, layouts, memory, padding, sharing)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurement", choices=["all", *(m.__name__ for m in MEASUREMENTS)])
    parser.add_argument("--squad", type=Path, help="SQuAD's training rows as JSONL")
    parser.add_argument("--gsm8k", type=Path, help="GSM8K's training rows as JSONL")
    parser.add_argument("--chat", type=Path, help="conversations as JSONL")
    parser.add_argument("--tokenizer", help="hub id or folder; default: the demo's")
    parser.add_argument("--limit", type=int, help="rows read")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=5, help="of windows")
    parser.add_argument("--steps", type=int, default=20, help="in a window")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the generated file")
    args = parser.parse_args(argv)
    tell(
        "machine",
        cpu=platform.processor() or platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        python=platform.python_version(),
    )
    for measurement in MEASUREMENTS:
        if args.measurement in ("all", measurement.__name__):
            with tempfile.TemporaryDirectory() as folder:
                measurement(args, Path(folder))


if __name__ == "__main__":
    main()
