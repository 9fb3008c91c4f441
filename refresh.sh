#!/bin/bash
# A GVM that goes on learning: in each round the policy answers prompts, a reward model or a function scores
# the answers, the GVM is trained on with them, and the policy goes on. The reference stays the SFT model, and
# so does what the GVM grew from.
#
#     bash refresh.sh MODEL ROUNDS SCORER..
#     bash refresh.sh toy 2 --reward_fn toy.exact:score
#     bash refresh.sh meta-llama/Meta-Llama-3-8B 1 --reward_model FOLDER --score_range -3.5 4.25
#
# --score_range is what label.py printed for the answers that the GVM was trained on, so that the scale stays.
# It starts from runs/<model name>/sft, gvm and dvpo, and writes round_1, round_2 .. beside them; the same
# command goes on where it was stopped. Flags for a stage: LABEL, GVM and DVPO in the environment.
set -eu
[ $# -gt 2 ] && [ "$2" -gt 0 ] 2>/dev/null || { echo "usage: bash refresh.sh MODEL ROUNDS SCORER.., see its first lines" >&2; exit 1; }
model=$1 rounds=$2
shift 2
run=runs/$(basename "$model")
policy=$run/dvpo gvm=$run/gvm
for round in $(seq "$rounds"); do
    new=$run/round_$round
    mkdir -p "$new"
    deepspeed -q label.py --model "$model" --policies "round_$((round - 1))=$policy" --shares value --per_prompt 0 \
        --temperatures 0.9 0.95 1.0 1.05 1.1 --seed "$round" --out "$new/labels.jsonl" "$@" ${LABEL:-}
    deepspeed -q train_gvm.py --model "$model" --sft_model "$run/sft" --value_model "$gvm" --data "$new/labels.jsonl" \
        --reward score --tau_warmup 0 --max_steps 100 --seed "$round" --output_dir "$new/gvm" --resume True ${GVM:-}
    deepspeed -q train_dvpo.py --model "$model" --sft_model "$policy" --reference_model "$run/sft" --value_model "$new/gvm" \
        --max_steps 40 --seed "$((round + 1))" --output_dir "$new/dvpo" --resume True ${DVPO:-}
    policy=$new/dvpo gvm=$new/gvm
done
