"""The PPO baseline and its reward model: rewards, GAE, returns and the value loss against their definitions,
what the critic and the reward model read where, what is trained and what stays, and what is on disk."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import evaluate
import train_dvpo
import train_ppo
import train_rm
from common import (answer_ids, chat_ids, collate, load_gvm, load_reward_model, load_tokenizer,
                    load_value_base, reward_scores)
from conftest import argv_of, clean_env, fingerprint, metrics, recorded, run_of, run_stage, word_tokenizer
from plumbing import rl
from plumbing.args import command_args
from plumbing.errors import BadInput

CPU = torch.device("cpu")
CHAT = [{"role": "user", "content": "is thing1 red ?"}]
LENGTHS = [5, 1, 3, 6]


def ragged(seed=0):
    """Random rewards and values [B, R] of rows of unequal length, noise under the padding, and the mask."""
    torch.manual_seed(seed)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return torch.randn(len(LENGTHS), 6), torch.randn(len(LENGTHS), 6), mask


# ---- the definitions ----

@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_advantages_are_the_double_sum_over_deltas(lam, seed):
    """A_t = sum_(l >= t) lambda^(l-t) (r_l + V_(l+1) - V_l), V = 0 behind the last token; returns A + V; then
    (A - mean) / std over all response tokens."""
    rewards, values, mask = ragged(seed)
    got, returns, mean, std = train_ppo.advantages(rewards * mask, values, mask, lam)
    tokens = []
    for i, T in enumerate(LENGTHS):
        r, v = rewards[i].double().tolist(), values[i].double().tolist()[:T] + [0.0]
        raw = [sum(lam ** (k - t) * (r[k] + v[k + 1] - v[k]) for k in range(t, T)) for t in range(T)]
        assert returns[i, :T].tolist() == pytest.approx([a + b for a, b in zip(raw, v)], abs=1e-6)
        tokens += raw
    assert (mean, std) == pytest.approx((np.mean(tokens), np.std(tokens)), abs=1e-6)
    assert got[mask].tolist() == pytest.approx(((np.array(tokens) - mean) / std).tolist(), abs=2e-6)
    assert (got[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_with_lambda_1_the_critics_target_is_the_sum_of_rewards_to_come():
    rewards, values, mask = ragged()
    _, returns, _, _ = train_ppo.advantages(rewards * mask, values, mask, 1.0)
    for i, T in enumerate(LENGTHS):
        assert returns[i, :T].tolist() == pytest.approx(
            [rewards[i, t:T].double().sum().item() for t in range(T)], abs=1e-5)


def test_the_score_is_paid_at_the_last_token_and_the_penalty_everywhere():
    """Rows that fill the batch, end early, or are one EOS: score on the last valid token of each."""
    penalty, _, mask = ragged()
    scores = torch.tensor([1.0, 2.0, -3.0, 4.0])
    rewards = train_ppo.token_rewards(scores, penalty, mask)
    for i, T in enumerate(LENGTHS):
        wanted = [-penalty[i, t].item() + (scores[i].item() if t == T - 1 else 0.0) for t in range(T)]
        assert rewards[i].tolist() == pytest.approx(wanted + [0.0] * (6 - T), abs=1e-6)


@pytest.mark.parametrize("value, old, target, loss, slope, clipped", [
    (1.1, 1.0, 2.0, 0.5 * 0.9 ** 2, -0.9, 0),        # within the range: plain squared error
    (1.5, 1.0, 2.0, 0.5 * 0.8 ** 2, 0.0, 1),         # ran ahead towards the target: held, no gradient
    (0.5, 1.0, 2.0, 0.5 * 1.5 ** 2, -1.5, 0),        # ran away from it: the larger, plain error pulls back
    (2.5, 1.0, 2.0, 0.5 * 0.8 ** 2, 0.0, 1)])        # overshot: the clipped error is the larger
def test_the_value_loss_clips_by_hand(value, old, target, loss, slope, clipped):
    v = torch.tensor([[value]], requires_grad=True)
    got, n = train_ppo.value_loss(v, torch.tensor([[old]]), torch.tensor([[target]]),
                                  torch.tensor([[True]]), 0.2)
    got.backward()
    assert (got.item(), v.grad.item(), n.item()) == pytest.approx((loss, slope, clipped), abs=1e-6)


def test_the_value_loss_sums_over_response_tokens_alone():
    old, target, mask = ragged()
    values = old + 0.1
    got, _ = train_ppo.value_loss(values, old, target, mask, 0.2)
    assert got.item() == pytest.approx(0.5 * ((values - target) ** 2)[mask].sum().item(), rel=1e-5)
    assert train_ppo.value_loss(values + 9 * ~mask, old, target, mask, 0.2)[0] == got


def test_pair_loss_is_bradley_terry():
    """-log P(chosen beats rejected), P = e^c / (e^c + e^r), summed over pairs; finite for absurd scores."""
    chosen, rejected = torch.tensor([1.0, -2.0, 0.3]), torch.tensor([0.5, 1.0, 0.3])
    wanted = -sum(np.log(np.exp(c) / (np.exp(c) + np.exp(r)))
                  for c, r in zip(chosen.tolist(), rejected.tolist()))
    assert train_rm.pair_loss(chosen, rejected).item() == pytest.approx(wanted, rel=1e-6)
    assert train_rm.pair_loss(torch.tensor([-1e4]), torch.tensor([1e4])).isfinite()


# ---- alignment ----

@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_critic_is_read_before_the_action(family, models_folder):
    """V(s_t) of each token against the model run on that row's prefix alone: prompt and y_<t, not y_t."""
    critic = load_value_base(models_folder / family, torch.float32).eval()
    prompts, responses = [[0, 3, 6, 9], [0, 20]], [[5, 1], [12, 4, 8, 9]]
    batch = collate(prompts, responses, 1)
    with torch.no_grad():
        got = train_ppo.response_values(critic, batch)
        assert got.shape == batch.mask.shape
        for i, (prompt, response) in enumerate(zip(prompts, responses)):
            for t in range(len(response)):
                alone = critic(input_ids=torch.tensor([prompt + response[:t]])).logits[0, -1, 0]
                assert got[i, t].item() == pytest.approx(alone.item(), abs=1e-5)
    assert got[batch.mask].std() > 1e-3


def test_the_reward_model_scores_sampled_ids_at_their_last_token(baseline, chain):
    """Truncated answers, answers that are one EOS, EOS inside the prompt: against stock transformers on each
    row alone, on the scale of rm.json."""
    stock = AutoPeftModelForSequenceClassification.from_pretrained(baseline.rm, num_labels=1).eval()
    stock.config.pad_token_id = None
    reward_model = load_reward_model(baseline.rm, torch.float32)
    tokenizer, settings = reward_model[1], json.loads((baseline.rm / "rm.json").read_text())
    rows = [{"prompt": CHAT, "response_ids": ids, "response": "", "truncated": ids[-1] != 1}
            for ids in ([12, 1], [1], [10, 9, 12, 14, 8, 1], [10, 9, 12])]
    got = rl.model_scores(reward_model, rows, run_of(load_tokenizer(chain.sft), micro_batch=2))
    for row, reward in zip(rows, got):
        ids = torch.tensor([chat_ids(tokenizer, CHAT) + row["response_ids"]])
        with torch.no_grad():
            score = stock(input_ids=ids).logits.item()
        assert reward == pytest.approx((score - settings["center"]) / settings["scale"], abs=1e-5)
    assert np.std(got) > 1e-3


def test_a_reward_model_of_another_vocabulary_reads_the_text(models_folder, chain, tmp_path):
    """Words have other ids there: the answer is tokenized anew, EOS put behind it only where it ended."""
    words = ["</s>", "<s>", "<unk>", "assistant", ".", ":", "user", "yes", "no", "it", "is", "red", "?",
             "thing1"]
    AutoModelForSequenceClassification.from_pretrained(models_folder / "llama",
                                                       num_labels=1).save_pretrained(tmp_path)
    word_tokenizer(words).save_pretrained(tmp_path)
    reward_model = load_reward_model(tmp_path, torch.float32)
    model, tokenizer, *scale = reward_model
    policy_tokenizer = load_tokenizer(chain.sft)
    ids = answer_ids(policy_tokenizer, "yes it is red .")
    rows = [{"prompt": CHAT, "response": "yes it is red .", "truncated": cut, "response_ids": ids[:6 - cut]}
            for cut in (False, True)]
    got = rl.model_scores(reward_model, rows, run_of(policy_tokenizer, micro_batch=2))
    whole = reward_scores(model, tokenizer, [(CHAT, "yes it is red .")], CPU, 1)[0]
    cut = reward_scores(model, tokenizer, [(CHAT, answer_ids(tokenizer, "yes it is red .")[:-1])], CPU, 1)[0]
    assert got == pytest.approx([whole, cut], abs=1e-5) and abs(whole - cut) > 1e-3
    assert scale == [0.0, 1.0]


def test_a_reward_model_that_ends_answers_otherwise_reads_the_text(baseline, chain):
    """The policy's vocabulary but another EOS (base model, chat model): its own EOS is put behind."""
    model, tokenizer, center, scale = load_reward_model(baseline.rm, torch.float32)
    tokenizer.eos_token = "."
    rows = [{"prompt": CHAT, "response": "yes it is red", "truncated": False,
             "response_ids": answer_ids(load_tokenizer(chain.sft), "yes it is red")}]
    got = rl.model_scores((model, tokenizer, center, scale), rows,
                          run_of(load_tokenizer(chain.sft), micro_batch=1))
    wanted, = reward_scores(model, tokenizer, [(CHAT, "yes it is red")], CPU, 1)
    assert answer_ids(tokenizer, "yes it is red") != rows[0]["response_ids"]
    assert got == pytest.approx([(wanted - center) / scale], abs=1e-5)


# ---- training ----

def test_reward_model_and_reference_stay_and_policy_and_critic_move(baseline, chain):
    (reward, reward_before), (reference, reference_before) = baseline.frozen
    assert reward.config.num_labels == 1 and reference.lm.lm_head  # these two models, in this order
    assert fingerprint(reward) == reward_before and fingerprint(reference) == reference_before
    assert not any(p.requires_grad or p.grad is not None for m in (reward, reference) for p in m.parameters())
    start, end = load_file(chain.sft / "model.safetensors"), load_file(baseline.ppo / "model.safetensors")
    assert not [name for name in start if torch.equal(start[name], end[name])]
    assert fingerprint(baseline.critic.module) != baseline.start


def test_the_first_step_starts_from_kl_0_and_every_number_is_finite(baseline):
    rows = metrics(baseline.ppo)
    assert rows[0]["objective/kl"] == pytest.approx(0.0, abs=1e-6) and rows[-1]["objective/kl"] != 0
    for row in rows + metrics(baseline.rm):
        assert all(np.isfinite(value) for value in row.values())
    for row in rows:  # reward of the whole answer = score - beta KL, as it is logged
        assert row["objective/rlhf_reward"] == pytest.approx(
            row["objective/scores"] - row["objective/kl_coef"] * row["objective/kl"], abs=1e-6)


def test_during_warm_up_only_the_critic_learns(baseline, chain, flags, tmp_path, monkeypatch):
    """--critic_warmup: the policy and beta are bit-identical, the critic is not."""
    updates = []
    recorded(monkeypatch, train_ppo, "update", updates)
    run_stage(train_ppo, **flags.ppo, sft_model=chain.sft, reward_model=baseline.rm, critic_warmup=3,
              output_dir=tmp_path / "all")
    start, end = load_file(chain.sft / "model.safetensors"), load_file(tmp_path / "all/model.safetensors")
    assert all(torch.equal(start[name], end[name]) for name in start)
    assert fingerprint(updates[0][0][0].critic.module) != baseline.start
    rows = metrics(tmp_path / "all")
    assert [row["objective/kl"] for row in rows] == [0, 0, 0] and rows[-1]["objective/kl_coef"] == 0.2
    assert all(row["loss/value_avg"] > 0 and row["critic/grad_norm"] > 0 for row in rows)
    assert all(row["policy/updates"] == row["grad_norm"] == row["lr"] == 0 for row in rows)
    # one step of three: KL is 0 at steps 0 and 1, the policy of step 2 has moved
    run_stage(train_ppo, **flags.ppo, sft_model=chain.sft, reward_model=baseline.rm, critic_warmup=1,
              output_dir=tmp_path / "one")
    kl = [row["objective/kl"] for row in metrics(tmp_path / "one")]
    assert kl[:2] == [0, 0] and kl[2] != 0


@pytest.mark.parametrize("sign", [1, -1])
def test_ppo_makes_what_is_rewarded_more_likely(sign, baseline, chain, flags, tmp_path, monkeypatch):
    """Reward is the share of some words in the answer, or minus that: after 20 steps they are more frequent,
    or less frequent, than at the start by a third. The KL penalty is off."""
    words, shares = range(3, 15), []

    def share(reward_model, rows, *rest):
        found = [sum(ids.count(word) for word in words) / len(ids)
                 for ids in (row["response_ids"] for row in rows)]
        shares.append(np.mean(found))
        return [sign * x for x in found]
    monkeypatch.setattr(rl, "model_scores", share)
    run_stage(train_ppo, **{**flags.ppo, "max_steps": 20, "rollout_batch": 16, "micro_batch": 16, "lr": 3e-3},
              sft_model=chain.sft, reward_model=baseline.rm, kl_coef=0.0, eval_every=0, output_dir=tmp_path)
    start, end = np.mean(shares[:3]), np.mean(shares[-5:])
    assert 0.2 < start < 0.7 and (end > 4 / 3 * start if sign > 0 else end < 2 / 3 * start)


def test_beta_kl_and_a_missing_eos_are_taken_off_the_rewards(baseline, chain, flags, tmp_path, monkeypatch):
    """What main hands to token_rewards on a policy that has left the reference: beta (log pi_old - log
    pi_ref) of each token, and the missing-EOS penalty once, on the last token of a truncated answer."""
    monkeypatch.setattr(rl, "model_scores", lambda reward_model, rows, *rest: [0.0] * len(rows))
    given = []
    recorded(monkeypatch, train_ppo, "token_rewards", given)
    scored = []
    recorded(monkeypatch, train_ppo, "score", scored)
    run_stage(train_ppo, **{**flags.ppo, "max_steps": 4}, sft_model=chain.sft, reward_model=baseline.rm,
              kl_coef=0.5, kl_target=0, missing_eos_penalty=0.25, eval_every=0, output_dir=tmp_path)
    for ((_, penalty, _), rewards), ((_, rows, _), found) in zip(given, scored, strict=True):
        for i, row in enumerate(rows):
            T = len(row["response_ids"])
            wanted = (0.5 * (found.logp - found.ref_logp))[i, :T].tolist()
            wanted[-1] += 0.25 * row["truncated"]
            assert penalty[i, :T].tolist() == pytest.approx(wanted, abs=1e-6)
            assert rewards[i, :T].tolist() == pytest.approx([-x for x in wanted], abs=1e-6)
    assert any(row["truncated"] for (_, rows, _), _ in scored for row in rows)


def test_the_early_stop_ends_a_steps_updates(baseline, chain, flags, tmp_path):
    for limit, updates in ((1e-6, 2), (0.0, 6)):
        run_stage(train_ppo, **{**flags.ppo, "max_steps": 1, "ppo_epochs": 3}, sft_model=chain.sft,
                  reward_model=baseline.rm, early_stop_kl=limit, output_dir=tmp_path)
        row, = metrics(tmp_path)
        assert row["policy/updates"] == updates and row["policy/early_stopped"] == (updates == 2)


def test_a_critic_learns_a_constant_reward(baseline, chain, flags, tmp_path, monkeypatch):
    """Every answer is worth 1: the critic's values go to 1 and the loss falls."""
    monkeypatch.setattr(rl, "model_scores", lambda reward_model, rows, *rest: [1.0] * len(rows))
    run_stage(train_ppo, **{**flags.ppo, "max_steps": 12, "critic_lr": 1e-2}, sft_model=chain.sft,
              reward_model=baseline.rm, critic_warmup=12, cliprange_value=10, output_dir=tmp_path)
    rows = metrics(tmp_path)
    assert abs(rows[-1]["critic/mean"] - 1) < 0.2 < abs(rows[0]["critic/mean"] - 1)
    assert rows[-1]["loss/value_avg"] < 0.2 * rows[0]["loss/value_avg"]


def test_lora_trains_policy_and_critic_and_saves_a_plain_policy(baseline, chain, flags, tmp_path,
                                                                monkeypatch):
    updates = []
    recorded(monkeypatch, train_ppo, "update", updates)
    run_stage(train_ppo, **{**flags.ppo, "lr": 1e-2}, sft_model=chain.sft, reward_model=baseline.rm, lora_r=4,
              output_dir=tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    engine, critic = updates[0][0][0].policy, updates[0][0][0].critic
    for model in (engine.module, critic.module):
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert trained and all("lora_" in name or "modules_to_save" in name for name in trained)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[0, 3, 6, 9, 15, 27, 7, 4, 6, 12, 9]])
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=ids).logits, engine.module(input_ids=ids).logits, atol=1e-5)
    assert any(p.abs().max() > 0 for name, p in critic.module.named_parameters() if "lora_B" in name)


def test_the_reward_model_learns_the_datas_preference(chain, flags, tmp_path):
    """Score depends on the text alone here: held-out pairs are ranked right after 40 steps."""
    run_stage(train_rm, **{**flags.rm, "max_steps": 40, "epochs": 10}, sft_model=chain.sft, eval_every=40,
              output_dir=tmp_path)
    rows = metrics(tmp_path)
    assert rows[-1]["eval/accuracy"] >= 0.9 and rows[-1]["eval/margin"] > 0
    assert np.mean([row["loss"] for row in rows[-5:]]) < 0.5 < rows[0]["loss"]
    assert rows[-1]["lr"] == pytest.approx(1e-2 / 40)  # linear decay over the whole run


def test_a_reward_model_of_all_pairs_sees_more_of_the_same_prompts(chain, flags, tmp_path, capsys):
    """--pairs all: the rows are those of data.all_pairs, and the share of the prompts is the same."""
    tokenizer = load_tokenizer(chain.sft)
    found = {kind: train_rm.preference_rows(tokenizer, train_rm.Args(data=flags.rm["data"], max_length=64,
                                                                     pairs=kind)) for kind in ("one", "all")}
    for one, all_ in zip(found["one"], found["all"]):
        assert len(all_) > len(one) > 0
        assert {tuple(prompt) for prompt, *_ in one} == {tuple(prompt) for prompt, *_ in all_}
        assert {tuple(map(tuple, row)) for row in one} <= {tuple(map(tuple, row)) for row in all_}
    run_stage(train_rm, **flags.rm, pairs="all", sft_model=chain.sft, output_dir=tmp_path)
    assert f"{len(found['all'][0])} pairs" in capsys.readouterr().out


def test_a_reward_of_ones_own_needs_no_reward_model(chain, flags, tmp_path, monkeypatch):
    """--reward_fn: its numbers are the scores, and the critic starts from the SFT model."""
    monkeypatch.setattr("toy_truth.constant", lambda rows, policy, tokenizer:
                        [float(len(row["response_ids"])) for row in rows])
    run_stage(train_ppo, **flags.ppo, sft_model=chain.sft, reward_fn="toy_truth:constant",
              output_dir=tmp_path)
    rows = metrics(tmp_path)
    assert len(rows) == 3 and all(row["critic/grad_norm"] > 0 for row in rows)
    for row in rows:
        assert row["objective/scores"] == pytest.approx(row["completions/mean_length"])


# ---- where the critic starts, and what is on disk ----

def test_a_critic_from_the_reward_model_says_what_it_says(baseline, chain):
    """At every token of an answer: the head on the backbone, on the scale of the standardized scores. No row
    of its embedding is a padding row, which would never be trained."""
    tokenizer, settings = load_tokenizer(chain.sft), json.loads((baseline.rm / "rm.json").read_text())
    critic = train_ppo.load_critic(str(baseline.rm), torch.float32).eval()
    model, *_ = load_reward_model(baseline.rm, torch.float32)
    assert critic.get_input_embeddings().padding_idx is None
    ids = chat_ids(tokenizer, CHAT) + answer_ids(tokenizer, "yes it is red .")
    with torch.no_grad():
        got = critic(input_ids=torch.tensor([ids])).logits[0, :, 0].tolist()
        wanted = [(model(input_ids=torch.tensor([ids[:t + 1]])).logits.item() - settings["center"])
                  / settings["scale"] for t in range(len(ids))]
    assert got == pytest.approx(wanted, abs=1e-5) and np.std(got) > 1e-3


def test_a_critic_from_a_gvm_or_an_sft_model(chain):
    tokenizer = load_tokenizer(chain.sft)
    ids = torch.tensor([chat_ids(tokenizer, CHAT) + answer_ids(tokenizer, "yes it is red .")])
    critic = train_ppo.load_critic(str(chain.gvm), torch.float32).eval()
    assert not hasattr(critic, "peft_config")
    with torch.no_grad():
        assert torch.allclose(critic(input_ids=ids).logits,
                              load_gvm(chain.gvm, torch.float32)[0].eval()(input_ids=ids).logits, atol=1e-5)
    assert all(p.requires_grad for p in critic.parameters())  # a loaded adapter had frozen them
    critic = train_ppo.load_critic(str(chain.sft), torch.float32)
    start = load_file(chain.sft / "model.safetensors")
    assert all(torch.equal(p, start[name]) for name, p in critic.named_parameters() if "score" not in name)


@pytest.mark.slow
def test_the_reward_model_loads_anywhere_with_stock_libraries(baseline, tmp_path):
    """A fresh process in another folder, without this repository, no argument but the folder."""
    code = ("import sys, torch; from peft import AutoPeftModelForSequenceClassification as A;"
            "m = A.from_pretrained(sys.argv[1]).eval(); assert m.config.num_labels == 1;"
            "ids = torch.tensor([[0, 3, 6, 9, 15, 27, 7, 4, 6, 12, 1]]);"
            "torch.save(m(input_ids=ids).logits, sys.argv[2])")
    env = {k: v for k, v in clean_env().items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code, str(baseline.rm), str(tmp_path / "out.pt")],
                          cwd=tmp_path, env=env, timeout=120, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    with torch.no_grad():
        wanted = baseline.rm_engine.module.eval()(
            input_ids=torch.tensor([[0, 3, 6, 9, 15, 27, 7, 4, 6, 12, 1]])).logits
    assert torch.load(tmp_path / "out.pt").item() == pytest.approx(wanted.item(), abs=1e-5)


# ---- bad input ----

def test_a_model_without_a_trained_head_is_no_reward_model(chain, flags, tmp_path):
    with pytest.raises(BadInput, match="no trained one-label head"):
        run_stage(train_ppo, **flags.ppo, sft_model=chain.sft, reward_model=chain.sft, output_dir=tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_reward_model_that_has_not_been_trained(chain, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="train_rm.py --model"):
        run_stage(train_ppo, **flags.ppo, sft_model=chain.sft)


@pytest.mark.parametrize("wrong, named", [
    ({"lora_r": 0}, "--lora_r"), ({"critic_model": "sft"}, "--critic_model"),
    ({"reward_model": "sft"}, "not LoRA on the SFT model")])
def test_what_cannot_share_a_base(wrong, named, baseline, chain, flags):
    """No LoRA, a critic of its own, or a reward model with its own weights."""
    wrong = {name: chain.sft if value == "sft" else value for name, value in wrong.items()}
    with pytest.raises(BadInput, match=named):
        run_stage(train_ppo, **{**flags.ppo, "sft_model": chain.sft, "reward_model": baseline.rm, "lora_r": 4,
                                "share_base": True, **wrong})


def test_a_broken_rm_json(baseline, chain, flags, tmp_path):
    for path in baseline.rm.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    for content in ("{", "{}"):
        (tmp_path / "rm.json").write_text(content)
        with pytest.raises(BadInput, match="rm.json cannot be read"):
            run_stage(train_ppo, **flags.ppo, sft_model=chain.sft, reward_model=tmp_path)


def test_lengths_beyond_the_reward_models_context(baseline, chain, flags, models_folder, tmp_path):
    """The policy could read more than its reward model can: said before anything is sampled."""
    model = AutoModelForSequenceClassification.from_pretrained(chain.sft, num_labels=1)
    model.config.max_position_embeddings = 32
    model.save_pretrained(tmp_path)
    load_tokenizer(chain.sft).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="38 tokens are more than the 32 of --reward_model"):
        run_stage(train_ppo, **flags.ppo, sft_model=chain.sft, reward_model=tmp_path,
                  output_dir=tmp_path / "out")


def test_a_critic_of_another_vocabulary(baseline, chain, flags, models_folder, tmp_path):
    for path in chain.sft.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    word_tokenizer([*reversed(["<s>", "</s>", "<unk>", "user"])]).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="--critic_model .*another vocabulary"):
        run_stage(train_ppo, **flags.ppo, sft_model=chain.sft, reward_model=baseline.rm,
                  critic_model=tmp_path, output_dir=tmp_path / "out")


@pytest.mark.parametrize("lora_r", [0, 2])
def test_a_kept_critic_is_the_one_of_the_run(lora_r, chain, baseline, flags, tmp_path, monkeypatch):
    """Its folder gives the values that the run read in the step behind it; it is no GVM for other readers."""
    scores = []
    recorded(monkeypatch, train_ppo, "score", scores)
    run = {**flags.ppo, "sft_model": chain.sft, "reward_model": baseline.rm, "lora_r": lora_r}
    run_stage(train_ppo, **run, critic_every=2, output_dir=tmp_path / "ppo")
    assert {path.name for path in tmp_path.glob("ppo/critic_*")} == {"critic_2", "critic_3"}
    scored = scores[2][1]
    critic, settings = load_gvm(tmp_path / "ppo/critic_2", torch.float32)
    with torch.no_grad():
        assert torch.allclose(train_ppo.response_values(critic, scored.batch) * scored.batch.mask,
                              scored.values * scored.batch.mask, atol=1e-5)
    again = rl.load_critic(str(tmp_path / "ppo/critic_2"), torch.float32)
    assert fingerprint(again) == fingerprint(critic) and all(p.requires_grad for p in again.parameters())

    run_stage(train_ppo, **run, critic_every=0, output_dir=tmp_path / "ppo")  # keeping it changes nothing
    assert not list(tmp_path.glob("ppo/critic_*"))  # they were not of this run
    run_stage(train_ppo, **run, critic_every=2, output_dir=tmp_path / "ppo")
    run_stage(train_ppo, **run, output_dir=tmp_path / "without")
    kept, without = (load_file(tmp_path / name / "model.safetensors") for name in ("ppo", "without"))
    assert all(torch.equal(kept[name], w) for name, w in without.items())
    with pytest.raises(BadInput, match="critic_2: a critic of train_ppo.py"):
        run_stage(train_dvpo, **flags.dvpo, sft_model=chain.sft, value_model=tmp_path / "ppo/critic_2",
                  output_dir=tmp_path / "dvpo")
    with pytest.raises(BadInput, match="critic_2: a value model; a reward model is"):
        run_stage(train_ppo, **{**run, "reward_model": tmp_path / "ppo/critic_2"},
                  output_dir=tmp_path / "scored")
    with pytest.raises(BadInput, match="a model that this run reads lies here"):  # it would be written over
        run_stage(train_ppo, **run, critic_model=tmp_path / "ppo/critic_2", critic_every=1,
                  output_dir=tmp_path / "ppo")
    with pytest.raises(BadInput, match="--critic_every keeps a critic"):
        run_stage(train_ppo, **{**run, "lora_r": 2}, share_base=True, critic_every=1,
                  output_dir=tmp_path / "shared")


def test_a_critic_is_ranked_and_compared_on_the_states_before_the_tokens(chain, baseline, flags, tmp_path,
                                                                         monkeypatch):
    """V(s_1) .. V(s_n) are looked at, and nothing behind them."""
    run_stage(train_ppo, **flags.ppo, sft_model=chain.sft, reward_model=baseline.rm, critic_every=3,
              output_dir=tmp_path / "ppo")
    folder, seen = tmp_path / "ppo/critic_3", []
    reference = lambda rows: [{name: [0.0] * (1 + len(row["response_ids"])) for name in ("exact", "bayes")}
                              | {"decided": [False] * len(row["response_ids"]) + [True]} for row in rows]
    monkeypatch.setattr(evaluate, "load_plug", lambda *_: reference)
    recorded(monkeypatch, evaluate, "token_values", seen)
    words = argv_of({"value_model": folder, "model": flags.ppo["model"], "data": flags.ppo["data"],
                     "dtype": "float32", "reference_fn": "a:b"})
    _, args = command_args(evaluate.Args, evaluate.COMMANDS, ["gvm", *words], outputs=())
    result = evaluate.evaluate_gvm(args, CPU)
    for (_, jobs), values in seen:
        assert [len(v) for v in values] == [len(answer) for _, answer in jobs]
    assert result["calibration"] is None
    assert result["reference"]["seen"]["decided"] == {}  # the slot behind EOS is not compared
    assert result["reference"]["seen"]["before"]["gvm_exact"] > 0
