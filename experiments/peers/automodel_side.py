"""NeMo AutoModel's own fine-tuning recipe, as its SQuAD example sets it: `TrainFinetuneRecipeForNextTokenPrediction`.

It needs CUDA. Its recipe stores weights and moments in bfloat16, which halves what its optimiser moves and is not what
the other sides do; --float32 stores float32, and then also computes in it, because the recipe has no autocast.
Nothing in its training path is replaced: steps are timed around `_run_train_optim_step`. Its rows are ours
(automodel_rows.py), because its own SQuAD dataset words them otherwise and supervises a token fewer per row.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml
from sides import Clock, folder_of, parser, rows, shuffled

NEEDS_CUDA = (
    "error: NeMo AutoModel 0.7.0 trains on CUDA only (its from_pretrained calls torch.cuda.current_device()): use "
    "--device cuda. --first-batch shows on any machine that its examples are the others'"
)


def recipe(given: Any, folder: Path) -> dict[str, Any]:
    """Return the settings of its recipe. The rows lie in `folder`/train.jsonl, the model in `folder`/model."""
    return {
        "recipe": "TrainFinetuneRecipeForNextTokenPrediction",
        "seed": 42,
        "step_scheduler": {
            "global_batch_size": given.batch,
            "local_batch_size": given.batch,
            "ckpt_every_steps": 10**6,
            "val_every_steps": 10**6,
            "num_epochs": 1,
            "max_steps": given.steps,
        },
        "dist_env": {"backend": "nccl", "timeout_minutes": 5},
        "model": {
            "_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained",
            "pretrained_model_name_or_path": str(folder / "model"),
            "torch_dtype": "float32" if given.float32 else "bfloat16",
            "attn_implementation": "sdpa",
        },
        "distributed": {"strategy": "fsdp2", "dp_size": "none", "tp_size": 1, "cp_size": 1},
        "loss_fn": {"_target_": "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy"},
        "clip_grad_norm": {"max_norm": 1.0},
        "checkpoint": {"enabled": False, "checkpoint_dir": str(folder / "checkpoints")},
        "dataset": {
            "_target_": "automodel_rows.tokenised_rows",
            "path": str(folder / "train.jsonl"),
            "tokenizer": {"pretrained_model_name_or_path": str(folder / "model")},
        },
        "packed_sequence": {"packed_sequence_size": 0},
        "dataloader": {
            "_target_": "torchdata.stateful_dataloader.StatefulDataLoader",
            "collate_fn": {"_target_": "nemo_automodel.components.datasets.utils.default_collater"},
            "shuffle": False,
        },
        "optimizer": {
            "_target_": "torch.optim.Adam",
            "betas": [0.9, 0.999],
            "eps": 1e-8,
            "lr": given.lr,
            "weight_decay": 0,
        },
    }


def first_batch(trainer: Any) -> dict[str, int]:
    """Return how many tokens its first batch has, and how many of them it supervises. This much runs without CUDA."""
    from nemo_automodel.recipes.llm.train_ft import _build_tokenizer

    _, tokenizer = _build_tokenizer(trainer.cfg.model, trainer.cfg.dataset)
    built = trainer.cfg.dataloader.build(tokenizer=tokenizer, dp_rank=0, dp_world_size=1)
    batch = next(iter(built[0] if isinstance(built, tuple) else built))
    return {"tokens": int(batch["attention_mask"].sum()), "supervised": int((batch["labels"] != -100).sum())}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--float32", action="store_true")
    arguments.add_argument("--first-batch", action="store_true", help="only show its size; needs no CUDA")
    given = arguments.parse_args()
    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(key, value)  # its recipe expects torchrun's
    os.environ.setdefault("MASTER_PORT", str(20_000 + os.getpid() % 10_000))
    if given.device == "cpu" and not given.first_batch:
        sys.exit(NEEDS_CUDA)
    clock = Clock(given.device, given.batch)
    folder = folder_of(given.data)
    shutil.copytree(given.model, folder / "model")
    num = given.batch * given.steps
    found = rows(given.data, num)
    lines = found if given.order == "given" else shuffled(found)
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines), encoding="utf-8")
    settings = folder / "run.yaml"
    settings.write_text(yaml.safe_dump(recipe(given, folder)), encoding="utf-8")

    import automodel_rows  # noqa: F401  its config may name only what is imported already
    import nemo_automodel
    from nemo_automodel.components.config.loader import load_yaml_config
    from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction as Recipe

    trainer = Recipe(load_yaml_config(str(settings)))
    if given.first_batch:
        print("RESULT " + json.dumps(first_batch(trainer)))
        return
    trainer.setup()
    inner = trainer._run_train_optim_step

    def step(*args: Any, **kwargs: Any) -> Any:
        clock.step()
        result = inner(*args, **kwargs)
        clock.losses.append(result.metrics["loss"])
        return result

    trainer._run_train_optim_step = step
    trainer.run_train_validation_loop()
    model = trainer.model_parts[0]
    clock.report(
        versions={"nemo-automodel": nemo_automodel.__version__},
        weights=str(next(model.parameters()).dtype),
        model=f"{type(model).__module__}.{type(model).__name__}",
    )
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
