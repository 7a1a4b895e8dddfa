#!/usr/bin/env bash
# Llama 2-Chat from a base model, as its paper made it, with the road of Llama 3 (DPO) beside it:
#
#   experiments/recipes/llama2_chat.sh MODEL DIR [list]
#
# MODEL is tiny, with data that are made here and a base that is too unless CHECKPOINT names one (and TOKENIZER what it
# was trained with, where that is not beside it); or a preset such as llama2_7b with CHECKPOINT=CKPT and DATA=FOLDER, of
# the files that experiments/recipes/small_data.py names. Killed, the same command goes on where it was; a stage is made
# again once its folder or file in DIR is gone. `list` prints the commands. EXAMS=TASKS with EXAM_DATA=FOLDER are taken
# by every stage, and those of tiny left out by EXAMS= alone; GOLD and OBEYS are rewards (FILE.py:function): what answers
# are truly worth, where that is known, and whether they obey. An answer of tiny has up to ANSWER_TOKENS (32).
set -euo pipefail
model=${1:?MODEL DIR [list]} dir=${2:?MODEL DIR [list]} list=${3:-}
world=experiments/recipes/small_world.py
stages=(sft v1 v2 v3 v4 v5 chat dpo)
declare -A judged_by=([sft]='held-out loss' [v1]=R_c [v2]=R_c [v3]=R_c [v4]=R_c [v5]=R_c [chat]=R_c [dpo]=R_c)

if [ "$model" = tiny ]; then
  DATA=$dir/data GOLD=$world:gold OBEYS=$world:obeys EXAMS=${EXAMS-perplexity:$dir/data/held_out.txt}
  small=(--config.model.dtype=float32 --config.model.remat=none --config.train.loss_chunks=1 --config.data.seq_len=256
    --config.train.batch_size=8 --config.log.tensorboard=false)
  answer=${ANSWER_TOKENS:-32}
  few=("${small[@]}" --config.data.format=plain --config.optimizer.warmup_steps=5)
  all=("${few[@]}" --config.data.validation_fraction=0 --config.train.num_epochs=3)
  sft=("${all[@]}" --config.optimizer.learning_rate=2e-3) round=("${all[@]}" --config.optimizer.learning_rate=5e-4)
  judge=("${few[@]}" --config.train.num_epochs=2 --config.data.weights= --config.data.validation_fraction=0.1
    --config.optimizer.learning_rate=1e-3)
  dpo=("${few[@]}" --config.train.num_epochs=4 --config.optimizer.learning_rate=3e-4)
  ppo=("${few[@]}" --config.train.batch_size=16 --config.train.num_steps=60 --config.optimizer.learning_rate=2e-4
    --config.algorithm.beta=0.05 --config.rollout.batch_size=64 --config.rollout.max_new_tokens=$answer
    --config.eval.every=20)
  draw=(--max_new_tokens=$answer --chat_format=plain) samples=8 distilled=1 held=4 turns=5 probe=2,4,6
else
  sft=() round=() judge=(--config.data.weights=) dpo=() ppo=() draw=() samples=16 distilled=2 held=4 turns=5
  probe=2,4,6,20
fi
sft+=(${TOKENIZER:+"--config.data.tokenizer=$TOKENIZER"})

# made FILE COMMAND...: unless DIR/FILE is there, the last thing that the command makes.
made() {
  local file=$1
  shift
  if [ -n "$list" ]; then
    printf '%s: python -m experiments.%s\n' "$file" "$*"
  elif [ ! -e "$dir/$file" ]; then
    echo "== $file"
    python -m experiments."$@"
  fi
}

# trained STAGE COMMAND FROM CONFIG DATA MORE...
trained() {
  local name=$1 command=$2 from=$3 config=$4 data=$5
  shift 5
  made "$name/report.json" "$command" --config="configs/$config" --workdir="$dir/$name" --checkpoint="$from" \
    --config.data.train="$data" "$@"
}

# drawn FILE COMMAND FROM MORE...
drawn() {
  local file=$1 command=$2 from=$3
  shift 3
  made "$file" "$command" --checkpoint="$from" --output="$dir/$file" "${draw[@]}" "$@"
}

judges=helpfulness:$dir/helpful,safety:$dir/safety
if [ "$model" = tiny ]; then
  model=checkpoint
  made data/text.txt recipes.small_data --output="$DATA"
  if [ -z "${CHECKPOINT:-}" ]; then
    CHECKPOINT=$dir/base
    made base/report.json pretrain --config=configs/pretrain.py:tiny --workdir="$CHECKPOINT" \
      --config.data.train="$DATA/text.txt" --config.data.separator='<|endoftext|>' --config.data.vocab_size=512 \
      --config.model.vocab_size=512 --config.train.num_steps=200 --config.eval.sample_tokens=0 "${small[@]}"
  fi
fi
: "${DATA:?is a folder of data}" "${CHECKPOINT:?is the base model}"

trained sft sft "$CHECKPOINT" "sft.py:$model" "$DATA/sft.jsonl" "${sft[@]}"
trained helpful reward_model "$dir/sft" "reward_model.py:$model,helpfulness" "$DATA/helpful.jsonl" "${judge[@]}"
trained safety reward_model "$dir/sft" "reward_model.py:$model,safety" "$DATA/safety.jsonl" "${judge[@]}"
drawn distilled.jsonl rejection_sampling "$dir/sft" --prompts="$DATA/adversarial.jsonl" --rewards="$dir/safety" \
  --preprompts=default --samples=$distilled

before=sft pool=
for n in 1 2 3 4; do
  # From the fourth on earlier answers join: drawn from the last model alone, it forgets (Llama 2 paper, 3.2.3).
  drawn "v$n.jsonl" rejection_sampling "$dir/$before" --prompts="$DATA/prompts.jsonl" --rewards="$judges" --keep=pair \
    --samples=$samples --seed=$n $([ "$n" = 4 ] && echo "--pool=${pool#,}")
  trained "v$n" sft "$dir/$before" "sft.py:$model" "$dir/v$n.jsonl,$dir/distilled.jsonl" "${round[@]}"
  before=v$n pool=$pool,$dir/v$n.jsonl
done
trained v5 ppo "$dir/v4" "ppo.py:$model" "$DATA/prompts.jsonl" --config.algorithm.rewards="$judges,missing_stop=0.5" \
  --config.algorithm.values_from="$dir/helpful" "${ppo[@]}"
drawn ghost.jsonl ghost_attention "$dir/v5" --prompts="$DATA/prompts.jsonl" --constraints="$DATA/constraints.jsonl" \
  --turns=$turns --samples=$held --rewards="${OBEYS:-$dir/helpful}" --threshold=$([ -n "${OBEYS:-}" ] && echo 0.5 || echo -1e9)
trained chat sft "$dir/v5" "sft.py:$model" "$dir/ghost.jsonl,$dir/v4.jsonl" "${round[@]}"
trained dpo dpo "$dir/sft" "dpo.py:$model" "$dir/v1.jsonl" "${dpo[@]}"

for stage in "${stages[@]}"; do
  drawn "judged/$stage.jsonl" rejection_sampling "$dir/$stage" --prompts="$DATA/judged.jsonl" --samples=8 \
    --rewards="$dir/helpful,$dir/safety${GOLD:+,$GOLD}"
  [[ -z "${OBEYS:-}" || "$stage" = v[1-4] ]] || drawn "probed/$stage.jsonl" ghost_attention "$dir/$stage" --prompts="$DATA/judged.jsonl" \
    --constraints="$DATA/constraints.jsonl" --rewards="$OBEYS" --probe=$probe --samples=1
  [ -z "${EXAMS:-}" ] || made "exams/$stage/results.json" evaluate --checkpoint="$dir/$stage" --tasks="$EXAMS" \
    --output="$dir/exams/$stage" ${EXAM_DATA:+--data_dir="$EXAM_DATA"}
done
[ -z "${OBEYS:-}" ] || judged_by[chat]='obeys at 4'
made table.md recipes.chat_table --folder="$dir" --data="$DATA" "${draw[@]:1}" \
  --stages="$(for stage in "${stages[@]}"; do printf ',%s=%s' "$stage" "${judged_by[$stage]}"; done | cut -c2-)"
[ -n "$list" ] || cat "$dir/table.md"
