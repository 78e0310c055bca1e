"""A process's random generators, saved to text and restored. Training draws from none; checkpoints keep them anyway."""

import base64
import json
import random

import numpy as np
import torch


def key(rank: int) -> str:
    """Return the name under which a rank's generators are saved."""
    return f"rank_{rank:05d}"


def state(device: torch.device) -> str:
    """Return the state of every random generator of this process, as text."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    found = {
        "torch": base64.b64encode(bytes(torch.get_rng_state().tolist())).decode(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "python": random.getstate(),
    }
    if device.type == "cuda":
        found["cuda"] = base64.b64encode(bytes(torch.cuda.get_rng_state(device).tolist())).decode()
    return json.dumps(found)


def restore(text: str, device: torch.device) -> None:
    """Restore the generators to the state that `state` returned."""
    found = json.loads(text)
    torch.set_rng_state(torch.tensor(list(base64.b64decode(found["torch"])), dtype=torch.uint8))
    kind, keys, *rest = found["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    version, inner, gauss = found["python"]
    random.setstate((version, tuple(inner), gauss))
    if "cuda" in found and device.type == "cuda":
        torch.cuda.set_rng_state(torch.tensor(list(base64.b64decode(found["cuda"])), dtype=torch.uint8), device)
