"""TRL's SFTTrainer: with its defaults, or with --best and what was found fastest for it.

Best on a CPU and on a GPU of 80 GB: no activation checkpointing (TRL's default is on) and rows grouped by length.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from sides import Clock, folder_of, parser, rows, texts
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

sys.path.insert(0, str(Path(__file__).parents[2]))
from sftlab.models.adapters import first_values


class Marks(TrainerCallback):
    """Pass the start of every step and its loss to the clock."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.step()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.clock.losses.append(logs["loss"])


def begin(model: Any) -> None:
    """Give an adapter the values that ours begins with, so that losses can be compared."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.copy_(first_values(name.removeprefix("base_model.model."), parameter.shape, seed=0))


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--best", action="store_true")
    arguments.add_argument(
        "--liger", action="store_true", help="with --best: Liger's kernels, where they are installed"
    )
    arguments.add_argument(
        "--lora", action="store_true", help="train an adapter of peft's, with the first values of ours"
    )
    given = arguments.parse_args()
    clock = Clock(given.device, given.batch)
    cuda = given.device == "cuda"
    pairs = [texts(row) for row in rows(given.data, given.batch * given.steps)]
    order = "sequential" if given.order == "given" else "group_by_length" if given.best else "random"
    config = SFTConfig(
        output_dir=str(folder_of(given.data)),
        max_steps=given.steps,
        per_device_train_batch_size=given.batch,
        learning_rate=given.lr,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        optim="adamw_torch_fused",
        use_cpu=not cuda,
        bf16=cuda,
        max_length=None,
        completion_only_loss=True,
        train_sampling_strategy=order,
        logging_steps=1,
        logging_first_step=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=0,
        **({"gradient_checkpointing": False, "use_liger_kernel": given.liger} if given.best else {}),
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(given.model),
        train_dataset=Dataset.from_list([{"prompt": p, "completion": c} for p, c in pairs]),
        args=config,
        callbacks=[Marks(clock)],
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if given.lora else None,
    )
    if given.lora:
        begin(trainer.model)
    trainer.train()
    clock.report(versions={"trl": trl.__version__}, checkpointing=config.gradient_checkpointing, order=order)


if __name__ == "__main__":
    main()
