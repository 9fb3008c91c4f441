"""GRPO: its advantage and loss against the definitions, what a group is, and what the loop makes of it."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import train_grpo
from common import collate, epoch_rows, load_policy, load_tokenizer
from conftest import metrics, recorded, run_of, run_stage
from plumbing.lean import LogProbs
from plumbing.ranks import init_distributed


# ---- definitions ----

@pytest.mark.parametrize("std_norm", [True, False])
def test_advantage_of_a_hand_made_batch(std_norm):
    """Two groups of two: 0.9 - 0.6 and -0.4 - 0.05, 0.25 and 0.25."""
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0]]).bool()
    penalty = torch.tensor([[0.1, 0.2, 0.3], [0.05, 9, 9], [0.5, -0.5, 9], [0.0, 9, 9]])
    rewards = train_grpo.token_rewards(torch.tensor([0.9, -0.4, 0.25, 0.25]), penalty, mask)
    got, mean, std = train_grpo.advantages(rewards, mask, 2, std_norm)
    apart = 0.75 / 2 / (0.75 / math.sqrt(2) + 1e-4 if std_norm else 1)  # std with n - 1: 0.75 / sqrt(2)
    wanted = [[apart] * 3, [-apart, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert torch.allclose(got, torch.tensor(wanted), atol=1e-6)
    tokens = [apart] * 3 + [-apart] + [0] * 3
    assert (mean, std) == pytest.approx((np.mean(tokens), np.std(tokens)), abs=1e-6)


@pytest.mark.parametrize("loss_mean", ["token", "answer"])
def test_one_step_is_the_gradient_of_its_definition(loss_mean, chain, monkeypatch):
    """Plain SGD over a batch in two micro batches, away from the policy that sampled: the weights move by -lr
    times the gradient of the clipped surrogate, over tokens or over answers, every log pi from a forward pass
    of its own, in float64."""
    import deepspeed
    init_distributed()
    tokenizer = load_tokenizer(chain.sft)
    prompts = [[0, 3, 6, 9], [0, 20], [0, 5, 7], [0, 4]]
    responses = [[5, 1], [12, 4, 8, 9], [3, 1], [6, 7, 1]]
    batch = collate(prompts, responses, 1)
    torch.manual_seed(0)
    advantage = torch.randn(4, 1) * batch.mask
    policy = load_policy(chain.sft, tokenizer, torch.float32)
    config = {"gradient_clipping": 0.0, "train_micro_batch_size_per_gpu": 1,
              "managed_gradient_accumulation": False, "zero_allow_untested_optimizer": True}
    engine, *_ = deepspeed.initialize(model=LogProbs(policy), config=config,
                                      optimizer=torch.optim.SGD(policy.parameters(), lr=0.1))
    monkeypatch.setattr(train_grpo, "step_norm", lambda engine: 1.0)  # SGD keeps none here
    run = run_of(tokenizer, micro_batch=2, accum_steps=2, temperature=0.7, lr=0.1, seed=1, response_length=4,
                 ppo_epochs=1, cliprange=0.2, loss_mean=loss_mean)
    with torch.no_grad():
        now, entropy = train_grpo.response_logprobs(engine, batch, run)
    old = now + 0.4 * torch.randn(now.shape) * batch.mask
    before = {k: v.clone().double() for k, v in policy.state_dict().items()}
    stats, _ = train_grpo.update(engine, train_grpo.Scored(batch, entropy, old, now, None), advantage, 0, run)
    assert stats["policy/updates"] == 1 and 0 < stats["policy/clipfrac_avg"] < 1

    exact = AutoModelForCausalLM.from_pretrained(chain.sft).eval().double()
    answers = []
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        answers.append([])
        for t, token in enumerate(response):
            logits = exact(input_ids=torch.tensor([prompt + response[:t]])).logits[0, -1]
            ratio = (torch.log_softmax(logits / 0.7, 0)[token] - old[i, t].double()).exp()
            answers[-1].append(-torch.min(ratio * advantage[i, t], ratio.clamp(0.8, 1.2) * advantage[i, t]))
    loss = (sum(map(sum, answers)) / sum(map(len, answers)) if loss_mean == "token" else
            sum(sum(answer) / len(answer) for answer in answers) / 4)
    loss.backward()
    assert stats["loss/policy_avg"] == pytest.approx(loss.item(), abs=1e-5)
    for name, p in exact.named_parameters():
        moved = (policy.state_dict()[name].double() - before[name]) / -0.1
        assert torch.allclose(moved, p.grad, atol=2e-5), name


# ---- runs ----

@pytest.fixture(scope="module")
def grpo(chain, baseline, flags, tmp_path_factory):
    """One run of 3 steps; scored = (arguments, result) of each call of score, updates of update."""
    folder, scored, updates = tmp_path_factory.mktemp("grpo"), [], []
    with pytest.MonkeyPatch.context() as patch:
        recorded(patch, train_grpo, "score", scored)
        recorded(patch, train_grpo, "update", updates)
        run_stage(train_grpo, **flags.grpo, sft_model=chain.sft, reward_model=baseline.rm,
                  output_dir=folder / "out", missing_eos_penalty=0.5, eval_every=0)
    return SimpleNamespace(folder=folder / "out", scored=scored, updates=updates)


def test_a_group_is_of_one_prompt_and_sampled_apart(grpo):
    """Successive prompts of the epoch's order, each with two answers of their own noise."""
    prompts, differ = [], 0
    for ((_, rows, _), _) in grpo.scored:
        assert len(rows) == 4
        for one, other in zip(rows[::2], rows[1::2]):
            assert one["prompt_ids"] == other["prompt_ids"]
            differ += one["response_ids"] != other["response_ids"]
            prompts.append(tuple(one["prompt_ids"]))
    assert differ > 0 and len(set(prompts)) == len(prompts) == 6  # no prompt twice within an epoch
    assert len(set(epoch_rows(100, 2, 2, 1)) & set(epoch_rows(100, 0, 2, 1))) == 0


def test_advantages_in_the_loop(grpo):
    """Score, beta KL and what a missing EOS costs, from what the loop was given, within the group."""
    for step, (((_, rows, _), scored), ((_, _, advantage, _, _), _)) in enumerate(
            zip(grpo.scored, grpo.updates, strict=True)):
        row, returns = metrics(grpo.folder)[step], []
        for i, answer in enumerate(rows):
            T = len(answer["response_ids"])
            kl = (scored.logp - scored.ref_logp)[i, :T].double().sum().item()
            missing = 0.5 * answer["truncated"]
            returns.append(scored.scores[i].item() - row["objective/kl_coef"] * kl - missing)
        group = np.array(returns).reshape(-1, 2)
        wanted = (group - group.mean(1, keepdims=True)) / (group.std(1, ddof=1, keepdims=True) + 1e-4)
        for i, answer in enumerate(rows):
            T = len(answer["response_ids"])
            assert advantage[i, :T].tolist() == pytest.approx([wanted.ravel()[i]] * T, abs=1e-3)
            assert (advantage[i, T:] == 0).all()
        assert row["objective/scores"] == pytest.approx(scored.scores.mean().item(), abs=1e-6)
    assert any(row["truncated"] for (_, rows, _), _ in grpo.scored for row in rows)


def test_it_starts_from_kl_0_and_passes_over_the_batch_are_counted(grpo, chain):
    rows = metrics(grpo.folder)
    assert rows[0]["objective/kl"] == 0 and rows[1]["objective/kl"] != 0
    assert all(math.isfinite(x) for row in rows for x in row.values())
    assert all(row["policy/updates"] == 4 and row["grad_norm"] > 0 for row in rows)  # 2 passes of 2 batches
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict()
                     for path in (chain.sft, grpo.folder))
    assert any(not torch.equal(before[k], after[k]) for k in before)


def test_lora_saves_a_plain_policy(chain, baseline, flags, tmp_path):
    run_stage(train_grpo, **{**flags.grpo, "lora_r": 2, "max_steps": 2}, sft_model=chain.sft,
              reward_model=baseline.rm, output_dir=tmp_path / "out")
    rows = metrics(tmp_path / "out")
    assert rows[0]["objective/kl"] == 0 and rows[1]["objective/kl"] != 0
    assert not (tmp_path / "out/adapter_config.json").exists()
