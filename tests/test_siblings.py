"""ReMax and DPO: their advantage, loss and gradient against the definitions, what is read, trained and
kept."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import train_dpo
import train_remax
import train_rm
from common import collate, keyed_rng, load_policy, load_tokenizer
from conftest import metrics, recorded, run_of, run_stage
from plumbing import rl
from plumbing.errors import BadInput
from plumbing.lean import LogProbs
from plumbing.ranks import init_distributed

CPU = torch.device("cpu")


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def logprob_by_hand(model, prompt, response):
    """Sum over the response of log pi(y_t | x, y_<t), each token from a forward pass of its own."""
    total = 0.0
    for t, token in enumerate(response):
        logits = model(input_ids=torch.tensor([prompt + response[:t]])).logits[0, -1].double()
        total = total + torch.log_softmax(logits, 0)[token]
    return total


# ---- ReMax: definitions ----

def test_remax_advantage_of_a_hand_made_batch():
    """Two answers of 3 and 1 tokens. Scores 0.9 and -0.4, baselines 0.5 and 0.1, beta KL as given:
    returns to go are 0.9 - 0.3 - 0.1 = 0.5, 0.9 - 0.3 - ... and so on, less the baseline of the row."""
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    penalty = torch.tensor([[0.1, 0.2, 0.3], [0.05, 9.0, 9.0]])
    rewards = train_remax.token_rewards(torch.tensor([0.9, -0.4]), penalty, mask)
    got, mean, std = train_remax.advantages(rewards, torch.tensor([0.5, 0.1]), mask)
    wanted = [[0.9 - 0.6 - 0.5, 0.9 - 0.5 - 0.5, 0.9 - 0.3 - 0.5], [-0.4 - 0.05 - 0.1]]
    assert got[0].tolist() == pytest.approx(wanted[0], abs=1e-6)
    assert got[1].tolist() == pytest.approx([*wanted[1], 0, 0], abs=1e-6)
    tokens = sum(wanted, [])
    assert (mean, std) == pytest.approx((np.mean(tokens), np.std(tokens)), abs=1e-6)


def test_the_baseline_takes_variance_away_and_adds_no_bias():
    """Over all answers of a policy with three: the mean of (r - b) grad log pi is that of r grad log pi, and
    with b near the mean reward its variance is smaller."""
    theta, reward = torch.tensor([0.3, -0.5, 1.1]), torch.tensor([2.0, 2.5, 3.0])
    pi = torch.softmax(theta, 0)
    means, variances = [], []
    for b in (0.0, reward[pi.argmax()].item()):  # without one, and the greedy answer's
        grads = []
        for y in range(3):
            x = theta.clone().requires_grad_()
            advantage, _, _ = train_remax.advantages(reward[y].reshape(1, 1), torch.tensor([b]),
                                                     torch.ones(1, 1).bool())
            train_remax.reinforce_loss(torch.log_softmax(x, 0)[y].reshape(1, 1), advantage,
                                       torch.ones(1, 1).bool()).backward()
            grads.append(x.grad)
        grads = torch.stack(grads)
        means.append((pi[:, None] * grads).sum(0))
        variances.append((pi[:, None] * (grads - means[-1]) ** 2).sum())
    assert torch.allclose(means[0], means[1], atol=1e-6) and means[0].abs().max() > 0.01
    assert variances[1] < 0.2 * variances[0]


# ---- ReMax: runs ----

@pytest.fixture(scope="module")
def remax(chain, baseline, flags, tmp_path_factory):
    """One run of 3 steps; scored = (arguments, result) of each call of score, updates of update."""
    folder, scored, updates, asked = tmp_path_factory.mktemp("remax"), [], [], []
    with pytest.MonkeyPatch.context() as patch:
        recorded(patch, train_remax, "score", scored)
        recorded(patch, train_remax, "update", updates)
        recorded(patch, rl, "model_scores", asked)
        run_stage(train_remax, **flags.remax, sft_model=chain.sft, reward_model=baseline.rm,
                  output_dir=folder / "out", missing_eos_penalty=0.5, eval_every=0)
    return SimpleNamespace(folder=folder / "out", scored=scored, updates=updates, asked=asked)


def test_the_baseline_is_the_greedy_answer_of_the_policy(remax, chain):
    """At the first step against stock transformers' greedy decoding of the SFT model, prompt by prompt."""
    _, rows, greedy, _ = remax.scored[0][0]
    model = plain(chain.sft)
    assert len(rows) == len(greedy) == 4
    for row, other in zip(rows, greedy):
        assert row["prompt_ids"] == other["prompt_ids"]
        ids = model.generate(torch.tensor([row["prompt_ids"]]), do_sample=False, max_new_tokens=6,
                             eos_token_id=1, pad_token_id=1)[0, len(row["prompt_ids"]):].tolist()
        assert other["response_ids"] == ids
    assert any(row["response_ids"] != other["response_ids"] for row, other in zip(rows, greedy))


def test_the_reward_model_is_asked_once_an_answer(remax):
    assert len(remax.asked) == 3  # steps
    for args, scores in remax.asked:
        assert len(args[1]) == len(scores) == 8  # 4 prompts, a sampled and a greedy answer to each


def test_advantages_in_the_loop(remax):
    """Score, beta KL, what a missing EOS costs in the answer and in the baseline, from what the loop was
    given; the log has scores and baselines as the reward model gave them."""
    for step, (((_, rows, greedy, _), scored), ((_, _, advantage, _, _), _)) in enumerate(
            zip(remax.scored, remax.updates, strict=True)):
        beta = metrics(remax.folder)[step]["objective/kl_coef"]
        for i, (row, other) in enumerate(zip(rows, greedy)):
            T = len(row["response_ids"])
            kl = (scored.logp - scored.ref_logp)[i, :T].double()
            score = scored.scores[i].item() - 0.5 * row["truncated"]
            b = scored.baselines[i].item() - 0.5 * other["truncated"]
            wanted = [score - beta * kl[t:].sum().item() - b for t in range(T)]
            assert advantage[i, :T].tolist() == pytest.approx(wanted, abs=1e-5)
            assert (advantage[i, T:] == 0).all()
        row, asked = metrics(remax.folder)[step], remax.asked[step][1]
        assert row["objective/scores"] == pytest.approx(np.mean(asked[:4]), abs=1e-6)
        assert row["objective/baseline"] == pytest.approx(np.mean(asked[4:]), abs=1e-6)
    assert any(row["truncated"] for (_, _, greedy, _), _ in remax.scored for row in greedy)


def test_remax_starts_from_kl_0_and_only_the_policy_moves(remax, chain, baseline):
    rows = metrics(remax.folder)
    assert rows[0]["objective/kl"] == 0 and rows[1]["objective/kl"] != 0
    assert all(math.isfinite(x) for row in rows for x in row.values())
    assert all(row["policy/updates"] == 2 and row["grad_norm"] > 0 for row in rows)
    before, after = plain(chain.sft).state_dict(), plain(remax.folder).state_dict()
    assert any(not torch.equal(before[k], after[k]) for k in before)


def test_one_step_of_remax_is_the_gradient_of_its_definition(chain, tmp_path, monkeypatch):
    """Plain SGD over a batch in two micro batches: the weights move by -lr times the gradient of
    -sum A_t log pi(a_t | s_t) / tokens, every log pi from a forward pass of its own, in float64."""
    import deepspeed
    init_distributed()
    tokenizer = load_tokenizer(chain.sft)
    prompts, responses = [[0, 3, 6, 9], [0, 20], [0, 5, 7]], [[5, 1], [12, 4, 8, 9], [3, 1]]
    prompts, responses = prompts + [[0, 4]], responses + [[6, 7, 1]]
    batch = collate(prompts, responses, 1)
    torch.manual_seed(0)
    advantage = torch.randn(batch.mask.shape) * batch.mask
    policy = load_policy(chain.sft, tokenizer, torch.float32)
    config = {"gradient_clipping": 0.0, "train_micro_batch_size_per_gpu": 1,
              "managed_gradient_accumulation": False, "zero_allow_untested_optimizer": True}
    engine, *_ = deepspeed.initialize(model=LogProbs(policy), config=config,
                                      optimizer=torch.optim.SGD(policy.parameters(), lr=0.1))
    monkeypatch.setattr(train_remax, "step_norm", lambda engine: 1.0)  # SGD keeps none here
    run = run_of(tokenizer, micro_batch=2, accum_steps=2, temperature=0.7, lr=0.1, seed=1, response_length=4)
    with torch.no_grad():
        old, entropy = train_remax.response_logprobs(engine, batch, run)
    before = {k: v.clone().double() for k, v in policy.state_dict().items()}
    scored = train_remax.Scored(batch, entropy, old, old, None, None)
    stats, first_ratio = train_remax.update(engine, scored, advantage, 0, run)
    assert stats["policy/updates"] == 1 and first_ratio < 1e-5

    exact = plain(chain.sft).double()
    loss, tokens = 0.0, 0
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        for t, token in enumerate(response):
            logits = exact(input_ids=torch.tensor([prompt + response[:t]])).logits[0, -1]
            loss = loss - advantage[i, t] * torch.log_softmax(logits / 0.7, 0)[token]
            tokens += 1
    (loss / tokens).backward()
    assert stats["loss/policy_avg"] == pytest.approx((loss / tokens).item(), abs=1e-5)
    for name, p in exact.named_parameters():
        moved = (policy.state_dict()[name].double() - before[name]) / -0.1
        assert torch.allclose(moved, p.grad, atol=2e-5), name


def test_lora_remax_saves_a_plain_policy(chain, baseline, flags, tmp_path):
    run_stage(train_remax, **{**flags.remax, "lora_r": 2, "max_steps": 2}, sft_model=chain.sft,
              reward_model=baseline.rm, output_dir=tmp_path / "out")
    rows = metrics(tmp_path / "out")
    assert rows[0]["objective/kl"] == 0 and rows[1]["objective/kl"] != 0
    assert not (tmp_path / "out/adapter_config.json").exists()
    before, after = plain(chain.sft).state_dict(), plain(tmp_path / "out").state_dict()
    assert before.keys() == after.keys() and any(not torch.equal(before[k], after[k]) for k in before)


def test_a_reward_of_ones_own(chain, flags, tmp_path, monkeypatch):
    """--reward_fn needs no reward model, is given answers and greedy answers together, and must answer for
    each."""
    (tmp_path / "own_reward.py").write_text("def length(rows, policy, tokenizer):\n"
                                            "    return [len(row['response_ids']) / 6 for row in rows]\n"
                                            "def short(rows, policy, tokenizer):\n    return [1.0]\n")
    monkeypatch.chdir(tmp_path)
    run_stage(train_remax, **flags.remax, sft_model=chain.sft, reward_fn="own_reward:length",
              output_dir=tmp_path / "out")
    row = metrics(tmp_path / "out")[0]
    assert row["objective/scores"] == pytest.approx(row["completions/mean_length"] / 6)
    assert row["objective/baseline"] == pytest.approx(row["completions/greedy_length"] / 6)
    with pytest.raises(BadInput, match="returned 1 rewards for 8 rows"):
        run_stage(train_remax, **flags.remax, sft_model=chain.sft, reward_fn="own_reward:short",
                  output_dir=tmp_path / "other")


# ---- DPO: definitions ----

@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dpo_loss_by_hand(smoothing):
    """-(1 - eps) log s(h) - eps log s(-h) summed over pairs, h = beta (log ratio chosen - log ratio
    rejected)."""
    logp = torch.tensor([[-3.0, -7.5, -1.0], [-4.0, -2.5, -1.0]])
    ref = torch.tensor([[-3.5, -7.0, -1.0], [-3.0, -3.0, -1.0]])
    chosen, rejected = train_dpo.implied_rewards(logp, ref, 0.3)
    wanted = 0.0
    for i in range(3):
        h = 0.3 * ((logp[0, i] - ref[0, i]) - (logp[1, i] - ref[1, i])).item()
        s = 1 / (1 + math.exp(-h))
        wanted -= (1 - smoothing) * math.log(s) + smoothing * math.log(1 - s)
    assert train_dpo.dpo_loss(chosen, rejected, smoothing).item() == pytest.approx(wanted, abs=1e-5)
    far = train_dpo.dpo_loss(torch.tensor([-1e4]), torch.tensor([1e4]), smoothing)
    assert far.isfinite()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_log_probs_of_answers_against_a_loop_over_tokens(family, models_folder):
    tokenizer = load_tokenizer(models_folder / family)
    model = LogProbs(load_policy(models_folder / family, tokenizer, torch.float32)).eval()
    exact = plain(models_folder / family)
    rows = [([0, 3, 6, 9], [5, 1], [12, 4, 8, 1]), ([0, 20], [7, 7, 7, 7, 1], [1])]
    args = SimpleNamespace(micro_batch=2, max_length=64)
    with torch.no_grad():
        for got, place in zip(train_dpo.answer_logprobs(model, rows, tokenizer, args, CPU), (1, 2)):
            assert got.tolist() == pytest.approx(
                [logprob_by_hand(exact, row[0], row[place]).item() for row in rows], abs=1e-4)


# ---- DPO: runs ----

def run_dpo(flags, chain, folder, **changes):
    run_stage(train_dpo, **{**flags.dpo, "sft_model": chain.sft, "output_dir": folder, **changes})
    return metrics(folder)


@pytest.fixture(scope="module")
def dpo(chain, flags, tmp_path_factory):
    """A run of 6 steps, with (arguments, result) of reference_logprobs and the calls of logprobs_of."""
    folder, references, computed = tmp_path_factory.mktemp("dpo") / "out", [], []
    with pytest.MonkeyPatch.context() as patch:
        recorded(patch, train_dpo, "reference_logprobs", references)
        recorded(patch, train_dpo, "logprobs_of", computed)
        rows = run_dpo(flags, chain, folder, eval_every=3)
    return SimpleNamespace(folder=folder, rows=rows, reference=references[0], computed=computed)


def test_dpo_starts_at_log_2_and_learns_the_preference(dpo, chain):
    assert dpo.rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert dpo.rows[0]["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert dpo.rows[-1]["loss"] < 0.6 and dpo.rows[-1]["rewards/accuracies"] > 0.7
    assert dpo.rows[-1]["eval/accuracy"] > 0.7 and dpo.rows[-1]["eval/loss"] < math.log(2)
    for row in dpo.rows:
        assert row["rewards/margins"] == pytest.approx(row["rewards/chosen"] - row["rewards/rejected"])
    assert "timing/reference" in dpo.rows[0] and "timing/reference" not in dpo.rows[1]
    before, after = plain(chain.sft).state_dict(), plain(dpo.folder).state_dict()
    assert any(not torch.equal(before[k], after[k]) for k in before)


def test_the_reference_is_the_sft_model_and_stays_it(dpo, chain):
    """The cached numbers are the SFT model's, token by token, also now that the policy has moved."""
    (_, rows, path, *_), (logprobs, _) = dpo.reference
    exact = plain(chain.sft)
    with np.load(path) as kept:
        assert (kept["logprobs"] == logprobs).all() and logprobs.dtype == np.float32
    with torch.no_grad():
        for (prompt, chosen, rejected), found in list(zip(rows, logprobs))[:6]:
            assert found.tolist() == pytest.approx([logprob_by_hand(exact, prompt, y).item()
                                                    for y in (chosen, rejected)], abs=1e-4)


def test_the_reference_is_computed_once_for_the_pairs_that_are_used(dpo, chain, flags, tmp_path, monkeypatch,
                                                                    capsys):
    """Once before the first step, the held-out pairs at step 3 and 6; of the training pairs those of 6 steps.
    A second run in the folder reads them; another seed, model, or a damaged file makes them anew."""
    assert len(dpo.computed) == 3
    computed = []
    recorded(monkeypatch, train_dpo, "logprobs_of", computed)

    def again(**changes):
        computed.clear()
        rows = run_dpo(flags, chain, dpo.folder, eval_every=0, **changes)
        return rows, len(computed)
    rows, times = again()
    assert times == 0 and "pairs from" in capsys.readouterr().out
    same = lambda rows: [[row["loss"], row["logps/chosen"]] for row in rows]
    assert same(rows) == same(dpo.rows)
    path = dpo.folder / "reference.npz"
    whole = path.read_bytes()
    places = [0, 4, 6, 100, len(whole) // 2, len(whole) - 100, len(whole) - 60, len(whole) - 10]
    flipped = [whole[:i] + bytes([whole[i] ^ 255]) + whole[i + 1:] for i in places]
    found = []
    for damaged in (whole[:len(whole) // 2], b"", *flipped):
        path.write_bytes(damaged)
        rows, times = again()
        assert same(rows) == same(dpo.rows)
        assert ("cannot be read" in capsys.readouterr().out) == (times == 1)
        found.append(times)
    assert found[:2] == [1, 1] and sum(found) >= 6  # the rest are bytes of the zip file that nobody reads
    assert again(seed=2)[1] == 1 and again(sft_model=chain.dvpo)[1] == 1


@pytest.mark.parametrize("beta, smoothing", [(0.5, 0.0), (0.3, 0.2)])
def test_two_steps_of_dpo_are_those_of_its_definition(beta, smoothing, chain, flags, tmp_path):
    """Four pairs a step in two micro batches. In float64, every log pi from a forward pass of its own: the
    norm of the first gradient is the log's, every weight moves under Adam's first step against the sign of
    its gradient, and the weights after it give the loss and the rewards of the second step."""
    notes = []
    with pytest.MonkeyPatch.context() as patch:
        recorded(patch, train_dpo, "preference_rows", notes)
        for steps in (1, 2):
            run_dpo(flags, chain, tmp_path / str(steps), batch_size=4, micro_batch=2, max_steps=steps,
                    lr=1e-3, epochs=2, beta=beta, label_smoothing=smoothing, eval_every=0, save_every=0)
    pairs = notes[0][1][0]
    picks = keyed_rng("epoch", 1, 0).permutation(len(pairs))

    def rewards_and_loss(model, reference, step):
        """Mean rewards of chosen and rejected answers, mean loss."""
        r = [beta * (logprob_by_hand(model, prompt, y) - logprob_by_hand(reference, prompt, y).detach())
             for prompt, *answers in (pairs[i] for i in picks[4 * step:4 * step + 4]) for y in answers]
        h = [a - b for a, b in zip(r[::2], r[1::2])]
        loss = sum(-(1 - smoothing) * torch.log(torch.sigmoid(x)) - smoothing * torch.log(torch.sigmoid(-x))
                   for x in h) / 4
        return sum(r[::2]) / 4, sum(r[1::2]) / 4, loss
    exact, reference = plain(chain.sft).double(), plain(chain.sft).double()
    rewards_and_loss(exact, reference, 0)[2].backward()
    norm = torch.stack([p.grad.norm() for p in exact.parameters()]).norm().item()
    first, second = metrics(tmp_path / "2")
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-4) and norm > 0.01
    before, after = plain(chain.sft).state_dict(), plain(tmp_path / "1").state_dict()
    checked = 0
    for name, p in exact.named_parameters():
        large = p.grad.abs() > 1e-4
        moved = (after[name].double() - before[name].double())[large]
        assert (moved.sign() == -p.grad[large].sign()).all(), name
        checked += large.sum().item()
    assert checked > 1000
    # The second step of a longer run has another learning rate, but its loss is of the weights before it:
    # those of a run of one step at the rate that the first of two steps had, which is the full one in both
    with torch.no_grad():
        chosen, rejected, loss = rewards_and_loss(plain(tmp_path / "1").double(), reference, 1)
    assert (second["rewards/chosen"], second["rewards/rejected"], second["loss"]) == pytest.approx(
        (chosen.item(), rejected.item(), loss.item()), abs=1e-4)
    assert abs(second["loss"] - math.log(2)) > 0.01


def test_log_probs_that_are_not_finite_are_not_kept(chain, flags, tmp_path):
    from safetensors.torch import load_file, save_file
    import shutil
    shutil.copytree(chain.sft, tmp_path / "sft")
    weights = load_file(tmp_path / "sft/model.safetensors")
    weights["model.embed_tokens.weight"][14].fill_(float("nan"))  # of one word: found when it is read
    save_file(weights, tmp_path / "sft/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match="its log-prob of an answer to .* is not finite"):
        run_dpo(flags, chain, tmp_path / "out", sft_model=tmp_path / "sft")
    assert not (tmp_path / "out/reference.npz").exists()


def test_lora_dpo_starts_from_its_reference_and_saves_a_plain_policy(chain, flags, tmp_path):
    rows = run_dpo(flags, chain, tmp_path / "out", lora_r=2, lr=1e-2)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and rows[-1]["loss"] < 0.68
    assert not (tmp_path / "out/adapter_config.json").exists()
    assert plain(chain.sft).state_dict().keys() == plain(tmp_path / "out").state_dict().keys()


def test_dpo_sees_the_pairs_of_the_reward_model(chain, flags, tmp_path, monkeypatch):
    """The same pairs from the same data, with --pairs one and all."""
    for pairs in ("one", "all"):
        notes = []
        with monkeypatch.context() as patch:
            for module in (train_rm, train_dpo):
                recorded(patch, module, "preference_rows", notes)
            run_stage(train_rm, **{**flags.rm, "pairs": pairs, "max_steps": 1}, sft_model=chain.sft,
                      output_dir=tmp_path / f"rm_{pairs}")
            run_dpo(flags, chain, tmp_path / f"dpo_{pairs}", pairs=pairs, max_steps=1)
        assert notes[0][1] == notes[1][1] and len(notes[0][1][0]) > 10


def test_the_key_of_the_cache_is_in_the_file_and_no_pickle_is_read(dpo):
    with np.load(dpo.folder / "reference.npz", allow_pickle=False) as kept:
        assert set(kept.files) == {"key", "logprobs"}
    assert json.loads((Path(dpo.folder) / "args.json").read_text())["beta"] > 0
