"""Measure a model on examples, over several ranks: one line of predictions.jsonl per example. A stopped run resumes.

A line holds what the scores are computed from: the example's sum of nll (nats), its right guesses and its targets. If
the example has references, the line also holds the answer and the format's scores. bootstrap.py computes the rest.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from sftlab.common.files import make_folder, open_plain, read_jsonl, read_text, write_jsonl, write_whole
from sftlab.common.progress import bar
from sftlab.data.batch import collate
from sftlab.data.example import Example
from sftlab.data.forest import assign_to_ranks
from sftlab.inference.decoding import decode
from sftlab.inference.ends import special
from sftlab.inference.loaded_model import LoadedModel
from sftlab.inference.next_token import DecodingSettings
from sftlab.inference.shared_rows import batches
from sftlab.models.scorer import Scorer
from sftlab.parallel.world import World

Line = dict[str, Any]
Score = Callable[[str, Sequence[str]], Mapping[str, float]]


@dataclass(frozen=True)
class Measurement:
    """What to measure: examples, how to decode the answers, one scoring function per example, and the ranks."""

    examples: Sequence[Example]
    decoding: DecodingSettings
    scores: Sequence[Score]
    world: World

    def __call__(self, load: Callable[[], LoadedModel], path: Path, settings: Mapping[str, Any]) -> list[Line]:
        """Return one line per example, in the order of the examples, and write them to `path`. Collective.

        Lines in `path` that were made with the same `settings` are kept. The model is loaded only if examples are left.
        """
        folder = path.with_name(f".{path.stem}.parts")
        done = self.world.broadcast(self._earlier(path, folder, settings) if self.world.is_main else {})
        todo = [i for i in range(len(self.examples)) if i not in done]
        if todo:
            part = folder / f"{self.world.rank:05d}.jsonl"
            with (
                open_plain(part, "a") as file,
                bar("examples", len(todo), shown=self.world.is_main) as advance,
            ):
                for line in self._lines(load(), self._mine(todo)):
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    file.flush()
                    advance(self.world.size)
            self.world.barrier()
            if self.world.is_main:
                done = read_parts(folder)
                write_jsonl(path, [done[i] for i in range(len(self.examples))])
                for old in folder.glob("*.jsonl"):
                    old.unlink()
            done = self.world.broadcast(done)
        return [done[i] for i in range(len(self.examples))]

    def _earlier(self, path: Path, folder: Path, settings: Mapping[str, Any]) -> dict[int, Line]:
        """Return the lines of earlier, perhaps unfinished, measurements with these settings; delete all others."""
        make_folder(path.parent, folder.name)
        stamp = folder / "settings.json"
        now = json.dumps(dict(settings), sort_keys=True)
        if not stamp.exists() or read_text(stamp) != now:
            for old in (path, *folder.glob("*.jsonl")):
                old.unlink(missing_ok=True)
            write_whole(stamp, now)
        done = read_parts(folder) | {line["index"]: line for line in read_jsonl(path)}
        if len(done) < len(self.examples):  # rewrite the lines, so that nothing is appended to a torn one
            for part in folder.glob("*.jsonl"):
                part.unlink()
            if done:
                write_jsonl(folder / "earlier.jsonl", list(done.values()))
        return done

    def _mine(self, todo: Sequence[int]) -> list[int]:
        """Return this rank's share: whole prefix groups, with about as many tokens as every other rank."""
        members: dict[int, list[int]] = {}
        for i in todo:
            members.setdefault(self.examples[i].group, []).append(i)
        groups = list(members.values())
        costs = [sum(len(self.examples[i]) for i in group) for group in groups]
        return [i for g in assign_to_ranks(costs, self.world.size)[self.world.rank] for i in groups[g]]

    def _lines(self, loaded: LoadedModel, mine: Sequence[int]) -> Iterator[Line]:
        """Yield the line of each of these examples as soon as it is complete."""
        examples = [self.examples[i] for i in mine]
        sums = losses(loaded.scorer, examples, self.decoding.batch_size)
        lines = [
            {"index": i, "id": e.id, "nll": float(nll), "correct": whole(correct), "targets": whole(targets)}
            for i, e, (nll, correct, targets) in zip(mine, examples, sums, strict=True)
        ]
        asked = [k for k, e in enumerate(examples) if e.references]
        yield from (line for line, e in zip(lines, examples, strict=True) if not e.references)
        prompts = [examples[k].tokens[: examples[k].num_prompt] for k in asked]
        ends = loaded.ends | endings(examples, loaded.tokenizer)
        for j, tokens in decode(loaded.scorer, prompts, self.decoding, ends, numbers=[mine[k] for k in asked]):
            e, answer = examples[asked[j]], loaded.decode_text(tokens).strip()
            yield lines[asked[j]] | {
                "prompt": loaded.decode_text(prompts[j]),
                "answer": answer,
                "references": list(e.references),
                "scores": dict(self.scores[mine[asked[j]]](answer, e.references)),
            }


def losses(scorer: Scorer, examples: Sequence[Example], batch_size: int) -> NDArray[np.float64]:
    """Return (sum of nll in nats, right top-1 guesses, targets) of each example, (n, 3); each counts by its weight."""
    sums = np.zeros((len(examples), 3))
    for indices, nll, right in target_scores(scorer, examples, batch_size):
        counted = np.stack([nll, right, np.ones(len(nll))], 1)
        for i in np.unique(indices):
            weights = examples[i].target_weights[examples[i].supervised]
            sums[i] = (counted[indices == i] * weights[:, None]).sum(0)
    return sums


@torch.inference_mode()
def target_scores(
    scorer: Scorer, examples: Sequence[Example], batch_size: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.bool_]]]:
    """Yield of each batch (example, nll in nats, right top-1 guess) of every target; an example's are in its order."""
    device = scorer.model.device
    for rows in batches(examples, batch_size, share_prefixes=not scorer.apart):
        length = max(len(tree) for tree, _ in rows)
        batch = collate([tree for tree, _ in rows], len(rows), length).to(device)
        owner, at, target = [], [], []
        for r, (tree, indices) in enumerate(rows):
            for i, path in zip(indices, tree.paths, strict=True):
                scored = np.flatnonzero(examples[i].supervised)
                owner.append(np.full(len(scored), i))
                at.append(path[scored - 1].astype(np.int64) + r * length)
                target.append(examples[i].tokens[scored].astype(np.int64))
        ats, targets = torch.from_numpy(np.concatenate(at)), torch.from_numpy(np.concatenate(target))
        hidden = scorer.hidden(batch)
        nll, right = [], []
        for start in range(0, len(ats), scorer.chunk):
            part = slice(start, start + scorer.chunk)
            logits, wanted = scorer.logits(hidden[ats[part].to(device)]), targets[part].to(device)
            nll.append(F.cross_entropy(logits, wanted, reduction="none").double().cpu().numpy())
            right.append((logits.argmax(-1) == wanted).cpu().numpy())
        yield np.concatenate(owner), np.concatenate(nll), np.concatenate(right)


def whole(number: float) -> int | float:
    """Return a number as an integer if it is one, as it is unless targets have weights."""
    return int(number) if float(number).is_integer() else float(number)


def endings(examples: Sequence[Example], tokenizer: Any) -> frozenset[int]:
    """Return the special tokens that examples end with, such as the one that closes a conversation's last turn."""
    return special([int(e.tokens[-1]) for e in examples if e.supervised[-1]], tokenizer)


def read_parts(folder: Path) -> dict[int, Line]:
    """Return the lines that all ranks wrote, by index."""
    return {line["index"]: line for part in sorted(folder.glob("*.jsonl")) for line in read_jsonl(part)}
