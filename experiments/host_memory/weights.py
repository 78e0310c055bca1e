"""How much host memory a rank takes while pretrained weights go into its shards, beside the size of their files.

    python experiments/host_memory/weights.py [--hidden 2048 --layers 16]

Every rank imports what a run imports, makes the model without memory and shards it. Then it fills it: from the files,
as a run does, or from a whole model that rank 0 loads, as a run did before. The peak is that of the process (VmHWM)
after the imports, less what it held before.
"""

import argparse
import json
import multiprocessing as mp
import os
import socket
import tempfile
import time
from pathlib import Path


def status_bytes(key: str) -> int:
    """Return a field of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def make(folder: str, hidden: int, layers: int, dtype: str) -> None:
    """Write an untrained Llama."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32_000, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 256, tie_word_embeddings=False,
    )  # fmt: skip
    torch.set_default_dtype(getattr(torch, dtype))
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="1GB")


def rank(me: int, ranks: int, port: int, folder: str, how: str, results: mp.Queue) -> None:  # type: ignore[type-arg]
    """Fill a sharded model and report the peak."""
    os.environ.update(RANK=str(me), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    from sftlab.checkpoints.pretrained import broadcast_weights, fill
    from sftlab.models.load import Model, skeleton
    from sftlab.models.scorer import Scorer
    from sftlab.parallel.fsdp2 import fsdp2
    from sftlab.parallel.world import world

    with world() as here:
        model = Model(folder)
        config = model.load_config(here.device)
        scorer = fsdp2(Scorer(skeleton(config)), here)
        before = status_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        began_s = time.perf_counter()
        if how == "by parts":
            fill(scorer, model, config, 0, here)
        else:
            broadcast_weights(scorer, lambda: model.load_weights(config, 0), here)
        results.put((me, status_bytes("VmHWM") - before, time.perf_counter() - began_s))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    arguments = parser.parse_args()
    context = mp.get_context("spawn")
    print("| files | ranks | how | peak of each rank, MB | of the files | seconds |\n|---|---|---|---|---|---|")
    for dtype in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory() as folder:
            maker = context.Process(target=make, args=(folder, arguments.hidden, arguments.layers, dtype))
            maker.start()
            maker.join()
            size = sum(p.stat().st_size for p in Path(folder).glob("*.safetensors"))
            for ranks in (1, 2):
                for how in ("by parts", "whole on rank 0"):
                    with socket.socket() as free:
                        free.bind(("127.0.0.1", 0))
                        port = free.getsockname()[1]
                    results = context.Queue()
                    each = [
                        context.Process(target=rank, args=(i, ranks, port, folder, how, results)) for i in range(ranks)
                    ]
                    for process in each:
                        process.start()
                    found = sorted(results.get() for _ in each)
                    for process in each:
                        process.join()
                    peaks, spent = [p for _, p, _ in found], max(s for _, _, s in found)
                    print(
                        f"| {dtype}, {size / 1e6:.0f} MB | {ranks} | {how} | "
                        f"{', '.join(f'{p / 1e6:.0f}' for p in peaks)} | {max(peaks) / size:.2f} | {spent:.1f} |",
                        flush=True,
                    )
    print(json.dumps({"hidden": arguments.hidden, "layers": arguments.layers}))


if __name__ == "__main__":
    main()
