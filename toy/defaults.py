"""Argument values of `--model toy`, per script. They replace the defaults; what is given on the command line
wins."""

MADE = "toy/build", "python -m toy.make"  # where this world's files are, and what writes them

SPLIT_SEED = 100                        # under this seed the most facts occur in every share of the prompts

COMMON = {"split_seed": SPLIT_SEED, "max_length": 64, "ds_config": "ds_configs/fp32.json"}

# What DVPO and PPO have in common, so that a comparison compares the methods
RL = {"split_seed": SPLIT_SEED, "ds_config": "ds_configs/fp32.json", "data": "toy/build/preferences.jsonl",
      "truth_fn": "toy.exact:true_reward", "max_prompt_length": 32, "response_length": 24,
      "rollout_batch": 32, "micro_batch": 16, "accum_steps": 1, "ppo_epochs": 2, "kl_coef": 0.2,
      "kl_target": 0.3, "kl_horizon": 2000, "max_steps": 60, "eval_every": 30, "sample_every": 20}

DEFAULTS = {
    "sft": {**COMMON, "base_model": "toy/build/model", "data": "toy/build/sft.jsonl", "lr": 2e-3,
            "warmup_steps": 10, "max_steps": 500, "epochs": 1000, "batch_size": 64, "micro_batch": 64},
    "train_gvm": {**COMMON, "data": "toy/build/preferences.jsonl", "reward": "score", "k": 4,
                  "tau_question_tokens": 20, "tau_answer_tokens": 24, "lora_dropout": 0.0, "lr": 2e-3,
                  "max_steps": 700, "epochs": 1000, "batch_size": 64, "micro_batch": 32, "eval_every": 350},
    "train_rm": {**COMMON, "data": "toy/build/preferences.jsonl", "pairs": "all", "lora_dropout": 0.0,
                 "lr": 1e-3, "max_steps": 600, "epochs": 1000, "batch_size": 64, "micro_batch": 64},
    "train_dvpo": {**RL, "lr": 1e-4},
    "train_ppo": {**RL, "lr": 1e-4, "critic_lr": 1e-3},
    "train_remax": {**RL, "lr": 2e-4}, "train_grpo": {**RL, "lr": 2e-4},
    "train_dpo": {**COMMON, "data": "toy/build/preferences.jsonl", "pairs": "all", "beta": 2.0, "lr": 1e-4,
                  "max_steps": 300, "epochs": 1000, "batch_size": 64, "micro_batch": 64},
    "label": {"split_seed": SPLIT_SEED, "data": "toy/build/preferences.jsonl", "dtype": "float32",
              "micro_batch": 64, "max_prompt_length": 32, "response_length": 24},
    "continuations": {"split_seed": SPLIT_SEED, "dtype": "float32", "micro_batch": 64,
                      "max_prompt_length": 32, "response_length": 24},
    "evaluate": {"split_seed": SPLIT_SEED, "data": "toy/build/preferences.jsonl", "dtype": "float32",
                 "micro_batch": 64, "pairs": 300, "reference_fn": "toy.reference:values",
                 "unseen_data": "toy/build/unseen.jsonl", "truth_fn": "toy.exact:true_reward",
                 "max_prompt_length": 32, "response_length": 24},
    "judge": {"split_seed": SPLIT_SEED, "data": "toy/build/preferences.jsonl", "dtype": "float32",
              "micro_batch": 64, "response_length": 24},
}
