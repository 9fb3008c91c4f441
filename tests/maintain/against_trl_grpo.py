"""Our GRPO advantages, loss and its gradient against the GRPOTrainer of TRL 1.16, on the same batches.

    pip install --target /tmp/trl16 --no-deps "trl==1.16.*" accelerate
    PYTHONPATH=/tmp/trl16 python tests/maintain/against_trl_grpo.py

TRL is not a dependency. Its trainer is built on a random Llama, without a KL term (beta 0); its own
_compute_loss is the loss, and its own lines, cut out of the file, make the advantages. loss_type "bnpo" is
our --loss_mean token, "grpo" is --loss_mean answer; its scale_rewards "group" is our --std_norm True, "none"
is False.
"""

import inspect
import sys
import tempfile
import textwrap
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_grpo
from against_trl_dpo import random_model
from common import collate, load_policy, load_tokenizer
from plumbing.lean import LogProbs
from datasets import Dataset
from toy.make import make_tokenizer
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer

CLIP, TEMPERATURE = 0.2, 0.8
SOURCE = inspect.getsource(grpo_trainer)
FIRST = SOURCE.index("mean_grouped_rewards = torch.nanmean(")
ADVANTAGES = textwrap.dedent(" " * 12 + SOURCE[FIRST:SOURCE.index("is_std_zero = ", FIRST)])


def theirs(policy, batch, old, rewards, group, loss_type, scale, folder):
    """TRL's advantages, its loss and gradients of the policy."""
    trainer = GRPOTrainer(
        model=LlamaForCausalLM.from_pretrained(policy), reward_funcs=lambda **_: [0.0],
        args=GRPOConfig(output_dir=folder, beta=0.0, loss_type=loss_type, scale_rewards=scale, epsilon=CLIP,
                        temperature=TEMPERATURE, num_generations=group, report_to=[], use_cpu=True,
                        bf16=False, per_device_train_batch_size=len(rewards), gradient_checkpointing=False),
        processing_class=PreTrainedTokenizerFast.from_pretrained(policy),
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 2 * len(rewards)}))
    trl = {**vars(grpo_trainer), "self": trainer, "rewards": rewards, "num_generations": group}
    exec(ADVANTAGES, trl)
    P, advantages = batch.P, trl["advantages"]
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.eval()
    loss = trainer._compute_loss(trainer.model, {
        "prompt_ids": batch.ids[:, :P], "prompt_mask": batch.attention[:, :P],
        "completion_ids": batch.ids[:, P:], "completion_mask": batch.mask.long(), "advantages": advantages,
        "old_per_token_logps": old, "num_items_in_batch": batch.mask.sum()})
    loss.backward()
    return advantages, loss.item(), {name: p.grad for name, p in trainer.model.named_parameters()}


def ours(policy, batch, old, rewards, group, loss_mean, std_norm):
    """The same of train_grpo.py, its loop's division by tokens or answers written out."""
    model = load_policy(policy, load_tokenizer(policy), torch.float32)
    rewards = train_grpo.token_rewards(rewards, torch.zeros(batch.mask.shape), batch.mask)
    advantage, _, _ = train_grpo.advantages(rewards, batch.mask, group, std_norm)
    run = SimpleNamespace(args=SimpleNamespace(temperature=TEMPERATURE, response_length=16))
    logp, _ = train_grpo.response_logprobs(LogProbs(model), batch, run)
    n = batch.mask.sum()
    weight = n / len(batch.ids) / batch.mask.sum(1, keepdim=True) if loss_mean == "answer" else 1.0
    loss = train_grpo.policy_loss(logp, old, weight * advantage, batch.mask, CLIP)[0] / n
    loss.backward()
    return advantage[:, 0], loss.item(), {name: p.grad for name, p in model.named_parameters()}


def main():
    worst = {"advantage": 0.0, "loss": 0.0, "gradient": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        folder, tokenizer = Path(folder), make_tokenizer()
        for seed in range(20):
            policy = random_model(seed, tokenizer, folder / f"policy{seed}")
            generator = torch.Generator().manual_seed(seed)
            draw = lambda low, high: int(torch.randint(low, high, (1,), generator=generator))
            text = lambda low, high: [draw(5, len(tokenizer)) for _ in range(draw(low, high))]
            group, (loss_mean, loss_type) = 2 + seed % 3, [("token", "bnpo"), ("answer", "grpo")][seed % 2]
            prompts = [prompt for prompt in (text(1, 12), text(1, 12)) for _ in range(group)]
            batch = collate(prompts, [text(1, 9) + [tokenizer.eos_token_id] for _ in prompts],
                            tokenizer.pad_token_id)
            rewards = torch.randn(len(prompts), generator=generator)
            run = SimpleNamespace(args=SimpleNamespace(temperature=TEMPERATURE, response_length=16))
            with torch.no_grad():
                old, _ = train_grpo.response_logprobs(LogProbs(load_policy(policy, load_tokenizer(policy),
                                                                           torch.float32)), batch, run)
            old = old + 0.3 * torch.randn(old.shape, generator=generator) * batch.mask
            std_norm = seed % 4 < 2
            found = theirs(policy, batch, old, rewards, group, loss_type, "group" if std_norm else "none",
                           folder)
            our = ours(policy, batch, old, rewards, group, loss_mean, std_norm)
            assert max(g.abs().max() for g in found[2].values()) > 1e-3 and found[2].keys() == our[2].keys()
            worst["advantage"] = max(worst["advantage"], (found[0] - our[0]).abs().max().item())
            worst["loss"] = max(worst["loss"], abs(found[1] - our[1]))
            worst["gradient"] = max(worst["gradient"], *((found[2][name] - our[2][name]).abs().max().item()
                                                         for name in our[2]))
    for name, x in worst.items():
        print(f"{name}: largest difference over 20 batches {x:.1e}")
    assert max(worst.values()) <= 1e-5


if __name__ == "__main__":
    main()
