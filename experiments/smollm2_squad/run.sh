#!/usr/bin/env bash
# Fine-tune a real pretrained model on a laptop, from its weights to a served answer. README.md has the results.
#
#     experiments/smollm2_squad/run.sh MODEL SQUAD GSM8K OUT [VLLM_PYTHON]
#
# MODEL: what get_model.py wrote. SQUAD, GSM8K: folders with train.jsonl and validation.jsonl (GSM8K: test.jsonl).
# VLLM_PYTHON: a Python that has vLLM, for the last part. Repeating it resumes it.
set -euo pipefail
MODEL=$1 SQUAD=$2 GSM8K=$3 OUT=$4 VLLM=${5:-}
PYTHON=${PYTHON:-python}
squad=(model=hf model.name_or_path="$MODEL" data=squad data.path="$SQUAD/train.jsonl" data.val_path="$SQUAD/validation.jsonl")

"$PYTHON" -m sftlab.train "${squad[@]}" optim.lr=5e-5 schedule.warmup_steps=3 trainer.batch_size=32 trainer.epochs=1 \
  trainer.eval_every=10 evaluation.num_answers=100 run_dir="$OUT/squad"
if [ ! -e "$OUT/squad/evaluate" ]; then
  "$PYTHON" -m sftlab.evaluate run="$OUT/squad" baseline=true limit=100
fi
# As a chat, in the model's own template.
head -n 32 "$GSM8K/test.jsonl" > "$OUT/gsm8k_questions.jsonl"
"$PYTHON" -m sftlab.train model=hf model.name_or_path="$MODEL" data=template data.path="$GSM8K/train.jsonl" \
  data.limit=640 data.val_path="$OUT/gsm8k_questions.jsonl" data.format.into=chat data.format.prompt='{question}' \
  data.format.completion='{answer}' optim.lr=5e-5 schedule.warmup_steps=2 trainer.batch_size=32 trainer.epochs=1 \
  trainer.eval_every=10 evaluation.num_answers=8 evaluation.max_new_tokens=192 run_dir="$OUT/gsm8k"
"$PYTHON" -m sftlab.publish run="$OUT/squad" repo_id=you/smollm2-135m-squad dry_run=true

QUESTION='Context: The lamp of the harbour was first lit in 1905, during a storm. Question: When was the lamp first lit? Answer:'
ask() { # ENGINE [SETTING ...]: serve the model until it has answered one question
  "$PYTHON" -m sftlab.serve run="$OUT/squad" engine="$1" port=0 "prompt=$QUESTION" "${@:2}" > "$OUT/served_$1.txt" 2>&1 &
  local server=$!
  until grep -q 'try it:' "$OUT/served_$1.txt" || ! kill -0 $server 2>/dev/null; do sleep 1; done
  kill -TERM $server && wait $server || true
  grep -E 'served by|ready after|answered' "$OUT/served_$1.txt"
}
ask transformers
if [ -n "$VLLM" ]; then
  ask vllm vllm_python="$VLLM" 'vllm_arguments=[--enforce-eager,--max-model-len,1024]'
fi
