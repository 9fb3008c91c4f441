"""Argument values of `--model smol`, per script. They replace the defaults; what is given on the command line
wins."""

MADE = "smol/build", "python -m smol.make"  # where this world's files are, and what writes them

SPLIT_SEED = 0
MODEL, PROMPTS = "smol/build/model", "smol/build/prompts.jsonl"
# Answers of policies that a GVM may be trained on, of others, and what their prefixes are worth: smol/run.py
LABELS, UNSEEN = "smol/labels.jsonl", "smol/unseen.jsonl"
VALUES = {"seen": "smol/values.jsonl", "unseen": "smol/unseen_values.jsonl"}
COMMON = {"split_seed": SPLIT_SEED, "ds_config": "ds_configs/zero1.json", "sft_model": MODEL, "data": LABELS}
OFFLINE = {**COMMON, "max_length": 96, "batch_size": 32, "micro_batch": 8}
PAIRS = {**OFFLINE, "pairs": "all", "batch_size": 16, "max_steps": 136}  # as many answers as the GVM reads

# What DVPO, PPO and ReMax have in common, so that a comparison compares the methods
RL = {**COMMON, "data": PROMPTS, "temperature": 0.7, "truth_fn": "smol.sentiment:compound",
      "max_prompt_length": 48, "response_length": 32, "rollout_batch": 16, "micro_batch": 8, "accum_steps": 1,
      "lora_r": 16, "kl_coef": 0.05, "kl_target": 3.0, "kl_horizon": 2000, "max_steps": 30, "eval_every": 15,
      "sample_every": 10, "lr": 2e-4}

SAMPLED = {"split_seed": SPLIT_SEED, "policies": ["smol/policies.json"], "dtype": "float32",
           "reward_fn": "smol.sentiment:compound", "micro_batch": 64, "max_prompt_length": 96,
           "response_length": 32}

DEFAULTS = {
    "label": {**SAMPLED, "data": PROMPTS, "per_prompt": 0, "shares": ["value", "test"]},
    "continuations": {**SAMPLED, "data": LABELS, "micro_batch": 256},
    "train_gvm": {**OFFLINE, "lora_dropout": 0.0, "reward": "score", "score_min": -1.0, "score_max": 1.0,
                  "k": 4, "tau_question_tokens": 20, "tau_answer_tokens": 32, "lr": 5e-4},
    "train_rm": {**PAIRS, "lora_dropout": 0.0, "lr": 2e-4},
    "train_dpo": {**PAIRS, "lora_r": 16, "beta": 0.1, "lr": 1e-4},
    "train_dvpo": {**RL, "ppo_epochs": 1}, "train_remax": RL, "train_grpo": {**RL, "ppo_epochs": 1},
    "train_ppo": {**RL, "ppo_epochs": 1, "critic_lr": 5e-4},
    "evaluate": {"split_seed": SPLIT_SEED, "data": LABELS, "dtype": "bfloat16", "temperature": 0.7,
                 "micro_batch": 64, "pairs": 300, "truth_fn": "smol.sentiment:compound",
                 "max_prompt_length": 48, "response_length": 32,
                 # `values` shows two answers of LABELS to a held-out question
                 "tau_policy": "plain", "question": "Give me your opinion of rain in one sentence.",
                 "responses": ["The rain is a simple yet beautiful scene in the serene setting of a window.",
                               "The rain is so bad that it makes me feel sad and disappointed."]},
}
