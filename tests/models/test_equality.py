"""A forest has the loss and gradients of separate rows, in float64, and its documents do not see each other."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention
from transformers.models.llama import modeling_llama

from sftlab.data.batch import Batch, collate
from sftlab.data.example import Example
from sftlab.data.forest import lay_out, row, sort_key
from sftlab.models import blocks
from sftlab.models.scorer import Scorer
from tests.data.test_turns import QWEN3
from tests.data.test_turns import made as worded
from tests.support import tiny_llama

SDPA = ("sdpa", blocks.NAME)


@pytest.fixture(autouse=True)
def cut_wherever_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its costs none of these small rows would be cut into blocks."""
    monkeypatch.setattr(blocks, "BLOCK_PAIRS", 0)


def three_levels(seed: int = 0) -> list[Example]:
    """Return 2 openings x 2 passages x 3 answers, of which openings, passages and answers have learned tokens.

    Two of the three answers begin alike, with learned tokens; the third parts from them at once: several targets at
    one place, and shared ones that count twice, or (in a passage) three times.
    """
    rng = np.random.default_rng(seed)

    def some(n: int) -> np.ndarray:
        return rng.integers(3, 320, n).astype(np.int32)

    examples = []
    for opening in (some(18), some(20)):
        for passage in (some(24), some(17)):
            common, ends = some(4), [some(3), some(5), some(4)]
            for i, end in enumerate(ends):
                own = end if i == 2 else np.concatenate([common, end])
                tokens = np.concatenate([opening, passage, own])
                supervised = np.zeros(len(tokens), bool)
                supervised[len(opening) - 3 : len(opening) + 2] = True  # across a branch point
                supervised[len(opening) + len(passage) :] = True
                examples.append(Example(tokens, supervised, f"e{len(examples)}"))
    return examples


@pytest.fixture
def exact_norms_and_rotary(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Llama's norms and rotary tables in the input's own dtype; transformers computes them in float32 always."""

    def norm(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    def rotary(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].to(x.dtype) * self.inv_freq.to(x.dtype)
        angles = torch.cat([angles, angles], -1)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", rotary)
    yield


def separate(model: Any, examples: list[Example]) -> tuple[float, dict[str, torch.Tensor]]:
    """Return loss and gradients of the model's own forward, one example a row, plain causal attention."""
    model.zero_grad()
    count = sum(float(e.target_weights.sum()) for e in examples)
    loss = torch.zeros((), dtype=torch.float64)
    for e in examples:
        ids = torch.from_numpy(e.tokens.astype(np.int64))
        nll = F.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none")
        loss = loss + (nll * torch.from_numpy(e.target_weights[1:])).sum()
    (loss / count).backward()
    return float(loss.detach() / count), {n: p.grad.clone() for n, p in model.named_parameters()}


def forest(model: Any, examples: list[Example], layout: str) -> tuple[float, dict[str, torch.Tensor], Batch]:
    """Return loss and gradients of the scorer on the examples' rows."""
    model.zero_grad()
    rows = lay_out(examples, layout, 512)
    batch = collate(rows, len(rows), 512)
    total = float(batch.weight.double().sum())
    nll = Scorer(model, chunk=16)(batch).nll
    assert nll.dtype == torch.float64
    (nll / total).backward()
    return float(nll.detach() / total), {n: p.grad.clone() for n, p in model.named_parameters()}, batch


def difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Return the largest error of a parameter's gradient, relative to that gradient."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[n] - g).norm() / g.norm()) for n, g in theirs.items())


def double(attention: str = "sdpa", **config: Any) -> Any:
    model = tiny_llama(**config).double()
    model.config._attn_implementation = attention
    return model


def test_gauntlet_15_the_example_is_what_it_says() -> None:
    examples = three_levels()
    (tree,) = lay_out(examples, "tree", 512)
    counts = np.unique(tree.weight, return_counts=True)
    assert counts[0].tolist() == [1, 2, 3, 6]  # answers, common beginnings, beginnings of passages, of openings
    _, several = np.unique(tree.at, return_counts=True)
    assert (several == 2).sum() == 10  # after 2 openings, 4 passages and 4 common beginnings of answers
    starts = tree.tokens[tree.position == 0]
    assert (
        len(starts) == 2
        and len(tree) < 0.45 * sum(map(len, examples))
        and tree.weight.sum() == sum(e.supervised.sum() for e in examples)
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", ["tree", "packed", "padded"])
@pytest.mark.parametrize("attention", SDPA)
def test_gauntlet_15_a_forest_equals_separate_rows_with_transformers_norms(
    attention: str, layout: str, tied: bool
) -> None:
    model, examples = double(attention, tied=tied), three_levels()
    loss, gradients = separate(model, examples)
    ours, found, _ = forest(model, examples, layout)
    assert abs(ours - loss) < 1e-10
    assert difference(found, gradients) < 1e-6


@pytest.mark.usefixtures("exact_norms_and_rotary")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", ["tree", "packed", "padded"])
@pytest.mark.parametrize("attention", SDPA)
def test_gauntlet_15_a_forest_equals_separate_rows_in_float64(attention: str, layout: str, tied: bool) -> None:
    model, examples = double(attention, tied=tied), three_levels(1)
    loss, gradients = separate(model, examples)
    ours, found, _ = forest(model, examples, layout)
    assert abs(ours - loss) < 1e-10
    assert difference(found, gradients) < 1e-8


@pytest.mark.usefixtures("exact_norms_and_rotary")
def test_gauntlet_15_34_turns_that_are_taken_apart_equal_rows_of_their_own_in_float64() -> None:
    """Reasoning over five turns in a template that drops it from history: nothing but the sharing differs."""
    messages = []
    for i in range(5):
        messages.append(
            {"role": "user", "content": f"The keeper counts {i} steps, and how many are there in the night?"}
        )
        messages.append({"role": "assistant", "content": f"{i} steps", "reasoning_content": f"the keeper counts {i}"})
    messages[3]["weight"] = 0.25
    _, examples = worded(QWEN3, messages)
    assert len(examples) == 5
    model = double("sdpa", vocab_size=512)
    loss, gradients = separate(model, examples)
    ours, found, batch = forest(model, examples, "tree")
    assert abs(ours - loss) < 1e-10
    assert difference(found, gradients) < 1e-8
    assert batch.num_tokens < 0.6 * sum(map(len, examples))


# Isolation ----------------------------------------------------------------------------------------------------------


SIZE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
MODELS: dict[str, dict[str, Any]] = {  # every kind of mask: one full, one sliding, and by layer
    "llama": SIZE,
    "mistral": {**SIZE, "sliding_window": 8},
    "qwen3": {**SIZE, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "gemma3_text": {**SIZE, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {"vocab_size": 320, "n_embd": 64, "n_layer": 2, "n_head": 4},
}


def model_of(kind: str, attention: str) -> Any:
    """Return an untrained model without dropout."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, pad_token_id=2, bos_token_id=0, eos_token_id=1, **MODELS[kind])
    config._attn_implementation = attention
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture
def flex_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention run by its definition, op by op, with the block mask as its rule: nothing is compiled on CPU."""

    monkeypatch.setattr("sftlab.models.flex.kernel", lambda: flex_attention)


def documents(seed: int) -> list[Example]:
    rng = np.random.default_rng(seed)
    return [Example(rng.integers(3, 320, n).astype(np.int32), np.zeros(n, bool), str(n)) for n in (29, 23, 31)]


@torch.no_grad()
def logits(model: Any, examples: list[Example]) -> list[torch.Tensor]:
    """Return each document's logits in one packed row."""
    made = row([[e] for e in examples])
    batch = collate([made], 1, 128)
    scorer = Scorer(model)
    found = scorer.logits(scorer.hidden(batch))
    return [found[torch.from_numpy(path.astype(np.int64))] for path in made.paths]


@pytest.mark.parametrize(
    ("kind", "attention"),
    [(k, a) for k in MODELS for a in (*SDPA, "flex_by_reach") if (k, a) != ("gpt2", "flex_by_reach")],
)
@pytest.mark.usefixtures("flex_without_a_compiler")
@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
def test_gauntlet_12_an_edit_of_one_document_does_not_change_another_at_all(kind: str, attention: str) -> None:
    model = model_of(kind, attention)
    first, second, third = documents(0)
    edited = Example((first.tokens - 3 + 11) % 317 + 3, first.supervised, "edited")
    before, after = logits(model, [first, second, third]), logits(model, [edited, second, third])
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1]) and torch.equal(before[2], after[2])
    alone = [logits(model, [e])[0] for e in (first, second, third)]  # positions restart
    for together, apart in zip(before, alone, strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("attention", SDPA)
def test_gauntlet_12_a_branch_sees_its_ancestors_by_depth_and_no_sibling(attention: str, kind: str) -> None:
    model = model_of(kind, attention)
    stem = documents(1)[0].tokens[:20]
    branches = [np.concatenate([stem, d.tokens]) for d in documents(2)]
    examples = sorted((Example(b, np.zeros(len(b), bool), str(i)) for i, b in enumerate(branches)), key=sort_key)
    made = row([examples])
    assert len(made) == 20 + sum(len(b) - 20 for b in branches)
    scorer = Scorer(model)
    with torch.no_grad():
        found = scorer.logits(scorer.hidden(collate([made], 1, 112)))
        for e, path in zip(examples, made.paths, strict=True):
            alone = model(input_ids=torch.from_numpy(e.tokens.astype(np.int64))[None]).logits[0]
            torch.testing.assert_close(found[torch.from_numpy(path.astype(np.int64))], alone, rtol=1e-4, atol=1e-5)


def test_gauntlet_13_no_document_predicts_the_next_ones_first_token_and_positions_restart() -> None:
    rng = np.random.default_rng(0)
    examples = []
    for i in range(12):
        supervised = np.ones(int(rng.integers(1, 20)), bool)
        supervised[0] = False
        examples.append(Example(rng.integers(3, 320, len(supervised)).astype(np.int32), supervised, str(i)))
    for layout in ("tree", "packed", "padded"):
        for made in lay_out(examples, layout, 64):
            starts = np.flatnonzero(made.position == 0)
            assert len(starts) >= 1
            document = np.searchsorted(starts, np.arange(len(made)), side="right")
            for at, target in zip(made.at, made.target, strict=True):
                following = np.flatnonzero((made.tokens == target) & (document == document[at]) & (made.position > 0))
                assert (made.position[at] + 1 == made.position[following]).any()
            for path in made.paths:
                assert made.position[path].tolist() == list(range(len(path)))
            assert made.weight.sum() == sum(len(p) - 1 for p in made.paths)
