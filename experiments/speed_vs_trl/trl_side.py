"""TRL's SFTTrainer on the same examples: prints the wall time at the end of every step as JSON lines.

python experiments/speed_vs_trl/trl_side.py --model FOLDER --data train.jsonl --steps 12
"""

import argparse
import json
import time

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Clock(TrainerCallback):
    """Print the time at the end of each step."""

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        print(json.dumps({"step": state.global_step, "time_s": time.perf_counter()}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    with open(arguments.data) as file:
        rows = [json.loads(line) for line in file]
    data = Dataset.from_list(
        [
            {
                "prompt": f"Context: {r['context']} Question: {r['question']} Answer:",
                "completion": f" {r['answers']['text'][0]}",
            }
            for r in rows
        ]
    )
    config = SFTConfig(
        output_dir="/tmp/speed_vs_trl",
        max_steps=arguments.steps,
        per_device_train_batch_size=16,
        learning_rate=1e-4,
        optim="adamw_torch_fused",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,  # TRL's default is on, which would only slow it down here
        max_length=None,
        completion_only_loss=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        seed=0,
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(arguments.model),
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
        train_dataset=data,
        args=config,
        callbacks=[Clock()],
    )
    trainer.train()


if __name__ == "__main__":
    main()
