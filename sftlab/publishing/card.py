"""The model card: what the model is, how it scores, how to use it, how it was made. All of it comes from the run."""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from sftlab.assets import SCHEME
from sftlab.common.files import read_json, read_jsonl
from sftlab.common.revisions import asked_in
from sftlab.common.words import duration, markdown_code, markdown_text, plain
from sftlab.inference.adapter import rank_in_vllm
from sftlab.models.adapters import ADAPTER_CONFIG
from sftlab.publishing.licence import Licence
from sftlab.publishing.paths import relative, relative_tree

TEMPLATE = Path(__file__).with_name("card.md")
HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")
GROUPS = ("peft", "optim", "schedule", "parallel")
UNSHOWN = ("_target_", "_partial_", "cpu_offload", "replicate", "tensor", "learning_rate")


def make_card(
    run_dir: Path, repo_id: str, config: Mapping[str, Any], prompt: str, plot: str | None, of: Licence
) -> str:
    """Return the card of a run's model for `repo_id`; the card's examples use `prompt`."""
    run = relative_tree(dict(config), run_dir)
    environment = read_json(run_dir / "environment.json")
    summary = read_json(run_dir / "summary.json")
    scores = [*evaluations(run_dir), *during_training(run_dir, run.get("evaluation", {}).get("num_answers"))]
    name = repo_id.rpartition("/")[2]
    base, data = str(run["model"]["name_or_path"]), run["data"]
    card_data = ModelCardData(
        base_model=base if is_hub_id(config["model"]["name_or_path"]) and not from_nothing(run) else None,
        base_model_relation="adapter" if adapter_of(run) else None,
        datasets=[d for d in sources(config["data"]) if is_hub_id(d)] or None,
        library_name="peft" if adapter_of(run) else "transformers",
        pipeline_tag="text-generation",
        tags=["sft", "sftlab"],
        model_name=name,
        eval_results=[r for s in scores[:1] for r in eval_results(s, sources(data))] or None,
        **of.metadata,
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        name=name,
        repo_id=repo_id,
        intro=introduction(base, data, summary, run),
        scores=scores,
        scores_note="Losses are in nats per target; the other scores are fractions from 0 to 1."
        + (
            " Intervals are 95 %, by a paired bootstrap; examples that share a passage are drawn together."
            if any(s["intervals"] for s in scores)
            else ""
        ),
        adapter=adapter_of(run),
        local_base=markdown_code(base) if adapter_of(run) and is_local(config["model"]["name_or_path"]) else None,
        vllm=vllm_command(repo_id, base, run_dir / "model"),
        prompt_python=python_text(prompt),
        max_new_tokens=int(run.get("evaluation", {}).get("max_new_tokens", 32)),
        plot=plot,
        training=[(n, v if n == "data" else markdown_text(v)) for n, v in training(run, summary, environment)],
        command=command(environment.get("command", ()), run_dir),
        provenance=provenance(environment),
        licence=of.sentence,
    )
    return str(card)


def introduction(base: str, data: Mapping[str, Any], summary: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """Return what the model is, in a sentence or two."""
    steps = (
        f" for {int(summary['steps']):,} steps of {run['trainer']['batch_size']} examples" if "steps" in summary else ""
    )
    what = " and ".join(link(source, "datasets/") for source in sources(data))
    if from_nothing(run):
        return f"A model of the shape of {link(base)}, trained from random weights on {what}{steps}."
    shipped = " (the demo model that ships with sftlab)" if base.startswith(SCHEME) else ""
    if adapter := adapter_of(run):
        return f"{adapter} of {link(base)}{shipped}, trained on {what}{steps} with supervised fine-tuning."
    return f"{link(base)}{shipped}, fine-tuned on {what}{steps} with supervised fine-tuning."


def adapter_of(run: Mapping[str, Any]) -> str | None:
    """Return what kind of adapter a run trained, in words; None if it trained every weight."""
    node = run.get("peft") or {}
    if "rank" not in node:
        return None
    kind = "DoRA" if node["dora"] else "LoRA"
    kind = {"none": kind, "nf4": f"Q{kind}"}[node["quantize"]]
    return f"A {kind} adapter (rank {node['rank']}{', rank-stabilised' if node['rslora'] else ''})"


def vllm_command(repo_id: str, base: str, model: Path) -> str:
    """Return the command that serves the published model with vLLM; a comment where vLLM cannot serve it as it is."""
    if not (model / ADAPTER_CONFIG).is_file():
        return f"vllm serve {repo_id}"
    rank = rank_in_vllm(model)
    if rank is None:
        return "# vLLM does not serve this kind of adapter: merge it into its base first (peft: merge_and_unload)"
    return f"vllm serve {base} --enable-lora --lora-modules {repo_id}={repo_id} --max-lora-rank {rank}"


def link(name: str, prefix: str = "") -> str:
    """Return a hub id as a link, any other name as code."""
    return f"[{name}](https://huggingface.co/{prefix}{name})" if is_hub_id(name) else markdown_code(name)


def is_hub_id(name: str) -> bool:
    """Return whether a name is a hub id such as user/model: it has no scheme and is no local folder or file."""
    return HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def is_local(name: str) -> bool:
    """Return whether a name of a model is a folder of the machine that trained, which nobody else has."""
    return not name.startswith(SCHEME) and not is_hub_id(name) and (Path(name).exists() or "/" in name)


def from_nothing(run: Mapping[str, Any]) -> bool:
    """Return whether the run began with random weights."""
    return bool(run["model"].get("init") == "random")


def sources(data: Mapping[str, Any]) -> list[str]:
    """Return the paths of the data, one per source of a mixture."""
    parts = data.get("sources")
    nodes = list(parts.values()) if isinstance(parts, Mapping) else [data]
    return list(dict.fromkeys(str(n["path"]) for n in nodes if n.get("path"))) or ["custom data"]


def evaluations(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Yield a table for each evaluate/*/scores.json, with the base model's scores if they were measured."""
    for file in sorted(run_dir.glob("evaluate/*/scores.json")):
        report = read_json(file)
        scores, base, gaps = report["scores"], report.get("baseline"), report.get("difference") or {}
        head = ["score", "base model", "this model", "difference", "95 % interval"] if base else ["score", "this model"]
        rows = []
        for key, value in scores.items():
            gap = gaps.get(key)
            name = markdown_text(key)
            row = [name, number(base.get(key)), f"**{number(value)}**"] if base else [name, number(value)]
            if base:
                row += [f"{gap['value']:+.4f}", f"{gap['low']:+.4f} to {gap['high']:+.4f}"] if gap else ["", ""]
            rows.append(row)
        data = str(report.get("data", file.parent.name))
        yield table(
            f"Evaluation on {markdown_text(data)}",
            report.get("examples"),
            head,
            rows,
            scores,
            data,
            intervals=bool(gaps),
        )


def during_training(run_dir: Path, answers: int | None) -> Iterator[dict[str, Any]]:
    """Yield a table of the validation scores before and after training; `answers` is the number of answers scored."""
    lines = [m for m in read_jsonl(run_dir / "metrics.jsonl") if any(key.startswith("val/") for key in m)]
    if not lines:
        return
    first, last = lines[0], lines[-1]
    before = first if first["step"] == 0 else {}
    keys = [key for key in last if key.startswith("val/")]
    rows = [[markdown_text(key[4:]), number(before.get(key)), f"**{number(last[key])}**"] for key in keys]
    scores = {key[4:]: last[key] for key in keys}
    sampled = answers and scores.keys() - {"loss", "perplexity", "token_accuracy"}
    title = "Validation during training" + (f", answers scored on a sample of {answers}" if sampled else "")
    yield table(title, None, ["score", "before", "after"], rows, scores, None, intervals=False)


def table(
    title: str,
    num: int | None,
    head: list[str],
    rows: list[list[str]],
    scores: Mapping[str, float],
    data: str | None,
    *,
    intervals: bool,
) -> dict[str, Any]:
    """Return a table of scores for the template."""
    shown = f"{num:,}" if num else None
    return {
        "title": title,
        "num": shown,
        "head": head,
        "rows": rows,
        "scores": scores,
        "data": data,
        "intervals": intervals,
    }


def eval_results(scores: Mapping[str, Any], data_of_run: Sequence[str]) -> list[EvalResult]:
    """Return a table's scores in the form of the hub's metadata."""
    data = scores["data"] or data_of_run[0]
    return [
        EvalResult("text-generation", data, data, key, round(value, 6), task_name="Text generation")
        for key, value in scores["scores"].items()
    ]


def training(
    run: Mapping[str, Any], summary: Mapping[str, Any], environment: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """Yield the settings of the training as (setting, value)."""
    trainer, data = run["trainer"], run["data"]
    for _, name, revision, kind in asked_in(run):
        if revision:  # the commit, where the run recorded it
            yield {"model": "base model", "dataset": "dataset"}[kind], f"{name} at {revision}"
    yield "steps", f"{int(summary['steps']):,}" if "steps" in summary else "not known"
    yield "batch size", f"{trainer['batch_size']} examples per optimiser step, over all ranks"
    for group in GROUPS:
        node = run.get(group) or {}
        if group == "peft" and not adapter_of(run):
            continue
        settings = ", ".join(f"{k} {v}" for k, v in node.items() if k not in UNSHOWN and not unset(v))
        if settings or "_target_" in node:
            kind = str(node.get("_target_", "")).rpartition(".")[2]
            yield {"optim": "optimiser", "parallel": "parallelism"}.get(group, group), f"{kind}: {settings}".strip(": ")
    yield "gradient clipping", f"global norm {trainer['clip_grad_norm']}" if trainer.get("clip_grad_norm") else "none"
    kind = str((data.get("format") or {}).get("_target_", "")).rpartition(".")[2]
    yield "data", ", ".join(map(markdown_code, sources(data))) + (f" as {markdown_text(kind)}" if kind else "")
    longest = data.get("max_length") or "the context"
    yield "rows", f"layout {data.get('layout')}; examples longer than {longest}: {data.get('overlong')}"
    yield "seed", str(run.get("seed"))
    if "wall_s" in summary:
        yield "time", duration(float(summary["wall_s"]))
    yield "software", ", ".join(f"{name} {version}" for name, version in versions(environment).items())


def unset(value: Any) -> bool:
    """Return whether a setting says only that something is off. Zero is a setting of its own, though 0 == False."""
    return value is None or value is False or value in ([], "none")


def versions(environment: Mapping[str, Any]) -> dict[str, str]:
    """Return the versions of the packages that compute. A checkout of sftlab has a commit instead."""
    packages = environment.get("packages", {})
    found = {name: str(packages.get(name, "not installed")) for name in ("sftlab", "torch", "transformers")}
    return {name: version for name, version in found.items() if version != "not installed"}


def command(argv: Sequence[str], run_dir: Path) -> str:
    """Return the command that made the run, with its paths relative to the run."""
    if not argv:
        return "# the run's environment.json names no command"
    words = [str(word) for word in argv]
    start = next((i for i, w in enumerate(words) if w.endswith(".py") or "sftlab" in Path(w).name), 0)
    module = Path(words[start]).stem.removeprefix("sftlab-")
    shown = ["python", "-m", f"sftlab.{module}"]
    for word in words[start + 1 :]:
        key, equals, value = word.partition("=")
        if value[:1] == value[-1:] == "'" and len(value) > 1:
            value = value[1:-1].replace("\\'", "'")  # the quotes that config/overrides.py put around a path
        shown.append(shlex.quote(f"{key}{equals}{relative(value, run_dir)}"))
    return " ".join(plain(" ".join(shown)).split("\n"))  # one line: no line of it can end the block of code


def provenance(environment: Mapping[str, Any]) -> str:
    """Return which code made the run."""
    commit = environment.get("git_commit")
    if not commit:
        version = markdown_text(versions(environment).get("sftlab", "of unknown version"))
        return f"Code: sftlab {version}, not from a git checkout."
    changed = (
        " with uncommitted changes, which the run keeps in its environment.json" if environment.get("git_diff") else ""
    )
    code = f"Code: sftlab at commit {markdown_code(commit)}{changed}."
    return f"{code} Paths are relative to the run's directory, which is `.`"


def python_text(text: str, width: int = 96) -> str:
    """Return a text as a Python literal, over several lines if it is long."""
    if len(text) <= width:
        return json.dumps(text, ensure_ascii=False)
    pieces = [""]
    for word in re.findall(r"\S*\s*", text):
        if pieces[-1] and len(pieces[-1]) + len(word) > width:
            pieces.append("")
        pieces[-1] += word
    return "(\n" + "".join(f"    {json.dumps(p, ensure_ascii=False)}\n" for p in pieces) + ")"


def number(value: float | None) -> str:
    """Return a score for a table."""
    if not isinstance(value, int | float):
        return ""
    return f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"
