"""How much host memory the data of a run takes as ranks are added: the summed proportional set size (PSS).

    python experiments/host_memory/measure.py [--examples 87599]

Every process imports what a rank imports, then opens the tokenised examples, makes the plan and touches every token.
What that adds to the PSS, summed over the processes, is the data's share: PSS divides a page by those who map it.
"""

import argparse
import json
import multiprocessing as mp
import tempfile
from pathlib import Path

import numpy as np


def pss_mib() -> float:
    """Return this process's proportional set size in MiB."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no Pss in smaps_rollup")


def rank(path: str, barrier: mp.Barrier, before: mp.Array, after: mp.Array, me: int) -> None:  # type: ignore[valid-type]
    """Open the data and touch it all; note the PSS before and after, when all are there."""
    import datasets

    import sftlab.training.build  # noqa: F401  what a rank imports
    from sftlab.data.dataset import Data
    from sftlab.data.formats.squad import Squad
    from sftlab.data.plan import Plan
    from sftlab.models.load import DEMO, Model

    datasets.disable_progress_bars()
    tokenizer = Model(DEMO).load_tokenizer()
    barrier.wait()
    before[me] = pss_mib()
    barrier.wait()
    train, _ = Data(Squad(), path).examples(tokenizer, 4096)
    plan = Plan(train.groups, 64, 0)
    total = sum(int(train[int(i)].tokens.sum()) for i in plan.order(0))
    barrier.wait()
    after[me] = pss_mib()
    barrier.wait()
    assert total > 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=87_599)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train.jsonl")
        words = np.array([f"word{i}" for i in range(400)])
        rng = np.random.default_rng(0)
        with path.open("w") as file:
            for i in range(arguments.examples):
                if i % 5 == 0:
                    context = " ".join(rng.choice(words, 120))
                row = {
                    "context": context,
                    "question": f"What about {i}?",
                    "answers": {"text": [str(rng.choice(words))]},
                }
                file.write(json.dumps(row) + "\n")
        context_ = mp.get_context("spawn")
        previous = None
        for ranks in (1, 2, 4):
            before, after = context_.Array("d", ranks), context_.Array("d", ranks)
            barrier = context_.Barrier(ranks)
            arguments_ = [(str(path), barrier, before, after, i) for i in range(ranks)]
            processes = [context_.Process(target=rank, args=a) for a in arguments_]
            for p in processes:
                p.start()
            for p in processes:
                p.join()
            data = sum(after) - sum(before)
            more = (
                "" if previous is None else f", {(data - previous[1]) / (ranks - previous[0]):.0f} MiB a further rank"
            )
            print(f"{ranks} rank(s): {sum(before):.0f} MiB before the data, {data:.0f} MiB for it{more}", flush=True)
            previous = (ranks, data)


if __name__ == "__main__":
    main()
