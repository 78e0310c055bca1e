"""NEFTune's noise: a function of seed, step and prefix, so that layout, ranks and resume change nothing."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sftlab.data.example import Example
from sftlab.data.forest import LAYOUTS
from sftlab.data.loader import Loader, RowLayout
from sftlab.data.plan import Plan, hash64
from sftlab.models.neftune import mixed, noised, prefix_keys, step_noise, uniform
from sftlab.models.scorer import Scorer
from tests.runs import Trouble, compose, measured, run_all
from tests.support import make_model_folder, make_squad_file, random_examples, tiny_llama

ALPHA = 5.0


def loader(examples: list[Example], layout: str, rows: int = 2, seed: int = 3) -> Loader:
    row_layout = RowLayout(layout, 256, rows, rank=0, num_ranks=1, pad_token=0)
    plan = Plan(np.array([e.group for e in examples]), 12, seed)
    return Loader(examples, plan, row_layout, noise=lambda step, data: step_noise(step, data, alpha=ALPHA, seed=seed))


def by_hand(e: Example, key: int, size: float, width: int) -> np.ndarray[Any, Any]:
    """Return the noise of one example, token by token in Python integers, from the words of the module alone."""
    most = 1 << 64

    def mix(state: int, part: int) -> int:
        z = (state + part + 0x9E3779B97F4A7C15) % most
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % most
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % most
        return z ^ (z >> 31)

    rows, total = [], 0
    for depth, token in enumerate(e.tokens.tolist()):
        total = (total + mix(mix(0, depth), token)) % most
        place = mix(total, key % most)
        rows.append([(mix(place, d) >> 40) * 2.0**-23 - 1.0 for d in range(width)])
    return np.array(rows) * size / math.sqrt(width)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_loss_is_that_of_a_plain_loop_with_noise_by_hand(layout: str) -> None:
    examples = random_examples(24, groups=2)
    model = tiny_llama()
    scorer = Scorer(model)
    loads = loader(examples, layout)
    for step in (1, 2):
        data = loads.step(step)
        ours = sum(float(scorer(batch).nll.detach()) for batch in data.microbatches)
        chosen = [examples[int(i)] for i in data.indices]
        size = ALPHA / math.sqrt(sum(map(len, chosen)) / len(chosen))
        key = int(hash64(3, step)[0])
        theirs = clean = 0.0
        for e in chosen:
            tokens = torch.from_numpy(e.tokens.astype(np.int64))[None]
            states = model.get_input_embeddings()(tokens).detach()
            noise = torch.from_numpy(by_hand(e, key, size, states.shape[-1])).to(states)
            assert 0.5 < float(noise.abs().max()) * math.sqrt(states.shape[-1]) / size <= 1.0 or len(e) < 3
            for added in (noise, torch.zeros_like(noise)):
                logits = model(inputs_embeds=states + added).logits[0, :-1].float()
                wanted = torch.where(torch.from_numpy(e.supervised), tokens[0], -100)[1:]
                found = F.cross_entropy(logits, wanted, ignore_index=-100, reduction="sum").nan_to_num().item()
                theirs, clean = (theirs + found, clean) if added is noise else (theirs, clean + found)
        assert ours == pytest.approx(theirs, rel=1e-5) and abs(ours - clean) > 3e-5 * clean


def test_tokens_have_one_noise_exactly_where_their_prefixes_are_equal() -> None:
    examples = random_examples(24, groups=2)
    keys: dict[tuple[int, ...], set[int]] = {}
    for layout in LAYOUTS:
        for batch in loader(examples, layout).step(1).microbatches:
            for row, hashes in enumerate(prefix_keys(batch).tolist()):
                reach, tokens = batch.reach[row].tolist(), batch.tokens[row].tolist()
                for i, found in enumerate(hashes):
                    prefix = tuple(tokens[j] for j in range(i + 1) if i < reach[j])
                    keys.setdefault(prefix, set()).add(found)
    assert all(len(found) == 1 for found in keys.values())
    assert len({found for one in keys.values() for found in one}) == len(keys) > 200


def test_the_numbers_are_uniform_and_differ_by_step_seed_and_column() -> None:
    drawn = uniform(mixed(torch.arange(4096), 7), 64)  # keys are hashes
    assert -1.0 <= float(drawn.min()) < -0.999 and 0.999 < float(drawn.max()) < 1.0
    assert abs(float(drawn.mean())) < 0.004 and float(drawn.var()) == pytest.approx(1 / 3, rel=0.01)
    flat = drawn - drawn.mean()
    assert (
        float((flat[1:] * flat[:-1]).mean().abs()) < 0.003 and float((flat[:, 1:] * flat[:, :-1]).mean().abs()) < 0.003
    )
    data = loader(random_examples(24), "tree").step(1)
    found = {step_noise(step, data, alpha=ALPHA, seed=seed).key for step in (1, 2) for seed in (0, 1)}
    assert len(found) == 4


def test_without_noise_nothing_is_hooked_and_after_an_error_nothing_stays() -> None:
    embeddings = torch.nn.Embedding(320, 8)
    batch = loader(random_examples(24), "tree").step(1).microbatches[0]
    with pytest.raises(KeyError), noised(embeddings, batch):
        assert len(embeddings._forward_hooks) == 1
        raise KeyError
    assert len(embeddings._forward_hooks) == 0


def test_runs_of_every_layout_rank_count_and_resume_agree(tmp_path: Path) -> None:
    model = make_model_folder(tmp_path / "model")
    data = (make_squad_file(tmp_path / "train.jsonl"), make_squad_file(tmp_path / "val.jsonl", 3, seed=1))

    def run(name: str, *overrides: str) -> dict[str, Any]:
        settings = [
            "trainer.max_steps=4",
            "trainer.neftune_alpha=5",
            "evaluation.num_answers=0",
            "trainer.save_every=2",
        ]
        return compose(tmp_path / name, model, data, *settings, *overrides)

    alone = ["data.layout=padded", "trainer.rows_per_microbatch=1"]
    ends = run_all([run("tree1"), run("padded1", *alone), run("off", "trainer.neftune_alpha=null")])
    twos = [run("tree2"), run("packed2", "data.layout=packed", "trainer.rows_per_microbatch=1", "data.row_length=256")]
    ends += run_all([*twos, (run("resumed"), Trouble(crash_at=4)), run("resumed")], ranks=2)
    assert [end[0][:5] for end in ends] == ["score"] * 5 + ["Crash", "score"]
    losses = {n: measured(tmp_path / n) for n in ("tree1", "padded1", "tree2", "packed2", "resumed", "off")}
    for name in ("padded1", "tree2", "packed2", "resumed"):
        assert losses[name].keys() == losses["tree1"].keys()
        for place, value in losses["tree1"].items():
            assert losses[name][place] == pytest.approx(value, rel=1e-5), (name, place)
    assert losses["resumed"] == losses["tree2"]
    assert losses["off"][0, "val/loss"] == losses["tree1"][0, "val/loss"]  # evaluation is without noise
    assert abs(losses["off"][1, "train/loss"] - losses["tree1"][1, "train/loss"]) > 1e-3
