"""The equations, each against its definition written out slowly: returns (Eq. 1), the
normalized advantage (Eq. 2), the clipped surrogate (Eq. 3), GAE, the KL controller, the losses'
averages and the learning rates."""

import json
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sft
import train_gvm
from common import batch_normalize, epoch_rows, keyed_rng, row_seed, td_loss, td_targets
from conftest import metrics
from train_dvpo import advantages, gae, next_kl_coef, policy_loss

LENGTHS = [5, 1, 3, 6]


def ragged(lengths=LENGTHS, seed=0):
    """Random values [B, 1 + R], rewards [B] and the mask [B, R] of rows of unequal
    length; noise under the padding."""
    torch.manual_seed(seed)
    R = max(lengths)
    mask = torch.arange(R) < torch.tensor(lengths)[:, None]
    return torch.randn(len(lengths), 1 + R), torch.randn(len(lengths)), mask


# ---- Eq. 1 ----

def n_step_return(q, r, t, n, gamma):
    """n rewards are seen and Q is asked for the rest; beyond the last token T there is only the reward."""
    T = len(q) - 1
    return gamma ** n * q[t + n] if t + n <= T else gamma ** (T - t) * r


def lambda_return(q, r, t, gamma, lam):
    """(1 - lambda) sum_n lambda^(n-1) G^(n), and the rest of the weight on the full return."""
    T = len(q) - 1
    mixed = sum((1 - lam) * lam ** (n - 1) * n_step_return(q, r, t, n, gamma) for n in range(1, T - t + 1))
    return mixed + lam ** (T - t) * n_step_return(q, r, t, T - t + 1, gamma)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_targets_are_the_lambda_weighted_n_step_returns(lam, gamma):
    """Every response token's target is the mixture of n-step returns, in batches of unequal lengths."""
    q, reward, mask = ragged()
    got = td_targets(q, reward, mask, gamma, lam)
    for i, T in enumerate(LENGTHS):
        row, r = q[i, :T + 1].tolist(), reward[i].item()
        wanted = [lambda_return(row, r, t, gamma, lam) for t in range(1, T + 1)]
        assert got[i, 1:T + 1].tolist() == pytest.approx(wanted, abs=1e-5)


def test_lambda_0_is_equation_1():
    """Target gamma Q_(t+1) before the last token, and r itself, without a bootstrap, at the last one."""
    q = torch.tensor([[9.0, 0.1, 0.2, 0.3]])
    target = td_targets(q, torch.tensor([7.0]), torch.ones(1, 3, dtype=torch.bool), 0.5, 0.0)
    assert target[0].tolist() == pytest.approx([0.1, 0.1, 0.15, 7.0])


def test_lambda_1_is_the_monte_carlo_return():
    """gamma^(T-t) r, whatever Q says."""
    q, reward, mask = ragged()
    target = td_targets(q, reward, mask, 0.9, 1.0)
    for i, T in enumerate(LENGTHS):
        wanted = [0.9 ** (T - t) * reward[i].item() for t in range(1, T + 1)]
        assert target[i, 1:T + 1].tolist() == pytest.approx(wanted, abs=1e-6)


def test_the_value_of_the_prompt_has_no_discount():
    """V(s_1) looks ahead to the first token's value: no reward and no discount lies between the two."""
    q, reward, mask = ragged()
    for lam in (0.0, 0.5, 1.0):
        target = td_targets(q, reward, mask, 0.9, lam)
        assert torch.allclose(target[:, 0], (1 - lam) * q[:, 1] + lam * target[:, 1])


def test_nothing_is_learned_behind_eos():
    """Targets there are 0, and what the model says there changes neither the loss nor the count of values."""
    q, reward, mask = ragged()
    behind = torch.cat([torch.zeros(len(mask), 1, dtype=torch.bool), ~mask], dim=1)
    assert (td_targets(q, reward, mask, 0.9, 0.5)[behind] == 0).all()
    loss, count = td_loss(q, reward, mask, 0.9, 0.5)
    assert count == sum(LENGTHS) + len(LENGTHS)  # every response token and the last prompt token of each row
    assert td_loss(q + 100 * behind, reward, mask, 0.9, 0.5)[0] == loss


def test_td_loss_follows_the_semi_gradient():
    """d loss / d Q_t = -2 (G_t - Q_t): the bootstrapped target is a constant, and the
    loss is a sum over Q_0 .. Q_n."""
    q, reward, mask = ragged()
    q.requires_grad_()
    target = td_targets(q, reward, mask, 0.9, 0.5)
    assert not target.requires_grad
    valued = torch.cat([torch.ones(len(mask), 1), mask], dim=1)
    loss, _ = td_loss(q, reward, mask, 0.9, 0.5)
    loss.backward()
    assert torch.allclose(q.grad, -2 * (target - q.detach()) * valued, atol=1e-6)
    assert loss.item() == pytest.approx((((target - q) * valued) ** 2).sum().item(), rel=1e-5)


# ---- Eq. 2 ----

def test_batch_normalize_is_equation_2():
    """Mean and biased standard deviation over the response tokens alone, as numpy computes them."""
    q, _, mask = ragged()
    q = 3 * q[:, 1:] + 5
    advantage, mu, sigma = batch_normalize(q, mask)
    tokens = q.numpy()[mask.numpy()]
    assert (mu, sigma) == pytest.approx((tokens.mean(), tokens.std()), rel=1e-5)
    assert advantage[mask].tolist() == pytest.approx(((tokens - tokens.mean()) / tokens.std()).tolist(),
                                                     abs=1e-5)
    assert (advantage[~mask] == 0).all()
    assert torch.equal(batch_normalize(q + 100 * ~mask, mask)[0], advantage)


@pytest.mark.parametrize("q, mask", [([[0.7]], [[True]]),
                                     ([[0.5] * 3] * 2, [[True] * 3, [True, False, False]]),
                                     ([[0.3, 0.4]], [[False, False]])])
def test_batch_normalize_of_one_token_equal_tokens_or_none_is_zero(q, mask):
    """Without any spread no token is better than another."""
    advantage, _, _ = batch_normalize(torch.tensor(q), torch.tensor(mask))
    assert (advantage == 0).all()


# ---- advantages ----

def test_gae_is_the_discounted_sum_of_deltas():
    """A_t = sum_l lambda^l delta_{t+l} up to the row's own last token."""
    delta, _, mask = ragged()
    delta = delta[:, 1:]
    got = gae(delta, mask, 0.8)
    for i, T in enumerate(LENGTHS):
        wanted = [sum(0.8 ** l * delta[i, t + l].item() for l in range(T - t)) for t in range(T)]
        assert got[i, :T].tolist() == pytest.approx(wanted, abs=1e-5)
        assert (got[i, T:] == 0).all()


def whitened(rows):
    """Lists of numbers of unequal length, normalized together."""
    flat = np.concatenate(rows)
    return [((np.array(row) - flat.mean()) / flat.std()).tolist() for row in rows]


def assert_rows(advantage, rows):
    for got, wanted in zip(advantage, rows):
        assert got[:len(wanted)].tolist() == pytest.approx(wanted, abs=1e-4)
        assert (got[len(wanted):] == 0).all()


def test_q_is_the_value_less_the_penalty_normalized():
    """By hand: values 1, 3 | 2 less penalties 0, 1 | 3 leave 1, 2 | -1, of mean 2/3 and variance 14/9."""
    values = torch.tensor([[9.0, 1.0, 3.0], [9.0, 2.0, 9.0]])
    penalty = torch.tensor([[0.0, 1.0], [3.0, 9.0]])
    mask = torch.tensor([[True, True], [True, False]])
    advantage, mean, std = advantages("q", values, penalty, mask, 0.95)
    root = math.sqrt(14)
    assert (mean, std) == pytest.approx((2 / 3, root / 3))
    assert advantage.flatten().tolist() == pytest.approx([1 / root, 4 / root, -5 / root, 0.0], abs=1e-5)


def test_gae_with_lambda_1_is_the_return_less_the_value_before_the_action():
    """The sum of Q_t - Q_{t-1} telescopes to Q_T - Q_{t-1}, less the penalties still to come."""
    values, _, mask = ragged()
    penalty = torch.rand(mask.shape)
    rows = [[values[i, T].item() - values[i, t].item() - penalty[i, t:T].sum().item() for t in range(T)]
            for i, T in enumerate(LENGTHS)]
    advantage, mean, _ = advantages("gae", values, penalty, mask, 1.0)
    assert_rows(advantage, whitened(rows))
    assert mean == pytest.approx(np.concatenate(rows).mean(), abs=1e-5)


def test_gae_weighs_later_deltas_by_lambda():
    """A_t = sum_l lambda^l (Q_{t+l} - Q_{t+l-1} - penalty_{t+l}), before the normalization."""
    values, _, mask = ragged()
    penalty = torch.rand(mask.shape)
    rows = [[sum(0.7 ** (k - t) * (values[i, k + 1] - values[i, k] - penalty[i, k]).item()
                 for k in range(t, T))
             for t in range(T)] for i, T in enumerate(LENGTHS)]
    assert_rows(advantages("gae", values, penalty, mask, 0.7)[0], whitened(rows))


# ---- Eq. 3 ----

@pytest.mark.parametrize("ratio, advantage, surrogate, slope, clipped", [
    (1.1, 2.0, 2.2, 2.2, 0), (1.5, 2.0, 2.4, 0.0, 1), (0.5, 2.0, 1.0, 1.0, 0),
    (1.1, -2.0, -2.2, -2.2, 0), (1.5, -2.0, -3.0, -3.0, 0), (0.5, -2.0, -1.6, 0.0, 1)])
def test_the_surrogate_clips_only_what_would_gain(ratio, advantage, surrogate, slope, clipped):
    """epsilon 0.2. A token already moved far enough the right way gets no gradient; the wrong way it keeps
    its own (d ratio / d log pi = ratio)."""
    logp = torch.tensor([[math.log(ratio) - 3.0]], requires_grad=True)
    loss, stats = policy_loss(logp, torch.tensor([[-3.0]]), torch.tensor([[advantage]]),
                              torch.tensor([[True]]), 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(-surrogate, rel=1e-5)
    assert logp.grad.item() == pytest.approx(-slope, abs=1e-5)
    assert stats[1] == clipped


def test_policy_loss_sums_over_response_tokens():
    """Padding counts for nothing in the loss, in its gradient and in the statistics (k2
    KL, ratio and its square)."""
    _, _, mask = ragged()
    torch.manual_seed(1)
    logp, old, advantage = (0.1 * torch.randn(mask.shape) for _ in range(3))
    logp.requires_grad_()
    noise = 50.0 * ~mask
    loss, stats = policy_loss(logp, old + noise, advantage + noise, mask, 0.2)
    loss.backward()
    log_ratio = (logp - old).detach()[mask].double()
    ratio = log_ratio.exp()
    surrogate = torch.min(ratio * advantage[mask], ratio.clamp(0.8, 1.2) * advantage[mask])
    assert loss.item() == pytest.approx(-surrogate.sum().item(), abs=1e-5)
    assert (logp.grad[~mask] == 0).all() and (logp.grad[mask] != 0).any()
    wanted = [(log_ratio ** 2).sum() / 2, ratio.sum(), (ratio ** 2).sum()]
    assert stats[[0, 2, 3]].tolist() == pytest.approx([x.item() for x in wanted], rel=1e-4)


@pytest.mark.parametrize("log_ratio", [1e4, -1e4])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_an_absurd_log_ratio_stays_finite(log_ratio, advantage):
    """exp(10000) would be inf, and inf * 0 NaN."""
    logp = torch.tensor([[log_ratio, 0.0]], requires_grad=True)
    loss, stats = policy_loss(logp, torch.zeros(1, 2), torch.full((1, 2), advantage),
                              torch.tensor([[True, False]]), 0.2)
    loss.backward()
    assert loss.isfinite() and logp.grad.isfinite().all() and stats.isfinite().all()


def test_a_row_without_tokens_adds_nothing():
    """An all-masked row leaves loss and gradient at exactly 0."""
    logp = torch.randn(1, 3, requires_grad=True)
    loss, stats = policy_loss(logp, torch.randn(1, 3), torch.randn(1, 3),
                              torch.zeros(1, 3, dtype=torch.bool), 0.2)
    loss.backward()
    assert loss == 0 and (logp.grad == 0).all() and (stats == 0).all()


@pytest.mark.parametrize("kl, error", [(6.6, 0.1), (60.0, 0.2), (5.4, -0.1), (0.0, -0.2), (-3.0, -0.2)])
def test_beta_follows_ziegler(kl, error):
    """beta_{t+1} = beta_t (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon)."""
    assert next_kl_coef(0.3, kl, target=6.0, horizon=100, episodes=8) == \
           pytest.approx(0.3 * (1 + error * 8 / 100))


def test_beta_is_fixed_without_a_target():
    """--kl_target 0 switches the controller off."""
    assert next_kl_coef(0.3, 60.0, target=0.0, horizon=100, episodes=8) == 0.3


# ---- losses and learning rates of the other stages ----

def test_sft_loss_is_the_negative_log_likelihood_of_the_answer():
    """Per token: the logits in column j are those of the state before response token j + 1."""
    torch.manual_seed(0)
    lengths, P, R, V = [3, 1, 2], 4, 3, 7
    ids, logits = torch.randint(V, (3, P + R)), torch.randn(3, 1 + R, V)
    mask = torch.arange(R) < torch.tensor(lengths)[:, None]
    wanted = 0.0
    for i, T in enumerate(lengths):
        for j in range(T):
            p = torch.softmax(logits[i, j].double(), 0)[ids[i, P + j]].item()
            wanted -= math.log(p)
    loss, count = sft.sft_loss(logits, ids, mask, P)
    assert loss.item() == pytest.approx(wanted, rel=1e-5) and count == sum(lengths)


def test_learning_rates_end_where_the_schedule_ends():
    """Warm-up to the peak, then down to 0 right after the last optimizer step, neither earlier nor later."""
    args = SimpleNamespace(lr=1.0, warmup_steps=2)
    rates = [sft.learning_rate(step, 10, args) for step in range(11)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[6] == pytest.approx(0.5) and rates[10] == pytest.approx(0.0)
    assert all(a > b > -1e-12 for a, b in zip(rates[2:], rates[3:]))
    assert [train_gvm.learning_rate(step, 4, args) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("stage, name", [(sft, "sft"), (train_gvm, "gvm")])
def test_runs_go_through_the_whole_schedule(chain, flags, stage, name):
    """A run's steps are optimizer steps: its last learning rate is the one before the schedule's end."""
    rows, lr = metrics(getattr(chain, name)), getattr(flags, name)["lr"]
    args = SimpleNamespace(lr=lr, warmup_steps=2)
    assert [row["lr"] for row in rows] == [stage.learning_rate(step, len(rows), args)
                                           for step in range(len(rows))]
    assert stage.learning_rate(len(rows), len(rows), args) == pytest.approx(0.0, abs=1e-12)


def test_the_logged_beta_moves_as_the_logged_kl_says(chain, flags):
    """Each step's beta follows from the step before; an episode is one rollout."""
    rows = metrics(chain.dvpo)
    args = json.loads((chain.dvpo / "args.json").read_text())
    assert rows[0]["objective/kl_coef"] == args["kl_coef"]
    for before, after in zip(rows, rows[1:]):
        wanted = next_kl_coef(before["objective/kl_coef"], before["objective/kl"], args["kl_target"],
                              args["kl_horizon"], flags.dvpo["rollout_batch"])
        assert (after["objective/kl_coef"] == pytest.approx(wanted)
                and after["objective/kl_coef"] != args["kl_coef"])


# ---- the order of the data ----

def test_epochs_visit_every_row_once_and_any_step_can_be_asked_for():
    """Data order is a function of the step: asking from the middle gives what a run
    from the start would see."""
    rows = epoch_rows(7, 0, 21, seed=3)
    assert all(sorted(rows[i:i + 7]) == list(range(7)) for i in (0, 7, 14)) and rows[:7] != rows[7:14]
    assert epoch_rows(7, 5, 10, seed=3) == rows[5:15]


def test_the_answers_of_a_pair_share_a_batch():
    """Preference data: rows 2 i and 2 i + 1 always together, every row once an epoch; else row by row."""
    pairs = SimpleNamespace(reward="preference", batch_size=4, seed=3, k=0)
    batches = [train_gvm.rows_of_step([None] * 12, step, pairs) for step in range(6)]
    assert all(row ^ 1 in batch for batch in batches for row in batch)
    assert sorted(sum(batches[:3], [])) == sorted(sum(batches[3:], [])) == list(range(12))
    assert batches[:3] != batches[3:]
    alone = SimpleNamespace(reward="score", batch_size=4, seed=3, k=0)
    assert [train_gvm.rows_of_step([None] * 12, step, alone) for step in range(2)] == [
        epoch_rows(12, 4 * step, 4, 3) for step in range(2)]


@pytest.mark.parametrize("reward", ["score", "preference"])
def test_a_batch_holds_about_so_many_policies(reward):
    """Of 20 policies 4 in a batch of 16 rows, where single rows would be of 11; at the borders between
    policies some more. Each row once an epoch, pairs together. Few policies: as many rows of each, but pairs
    as they come."""
    names = [f"p{i // 16 if reward == 'score' else i // 32 * 2 + i % 2}" for i in range(320)]
    args = SimpleNamespace(reward=reward, batch_size=16, seed=3, k=2, batch_policies=4)
    batches = [train_gvm.rows_of_step(names, step, args) for step in range(40)]
    assert sorted(sum(batches[:20], [])) == sorted(sum(batches[20:], [])) == list(range(320))
    assert np.mean([len({names[i] for i in batch}) for batch in batches]) < 4.2
    assert len({tuple(batch) for batch in batches}) == 40
    if reward == "preference":
        assert all(row ^ 1 in batch for batch in batches for row in batch)
    few = [f"p{i % 4}" for i in range(320)]
    batches = [train_gvm.rows_of_step(few, step, args) for step in range(20)]
    assert sorted(sum(batches, [])) == list(range(320))
    if reward == "score":
        assert all(Counter(few[i] for i in batch) == dict.fromkeys(set(few), 4) for batch in batches)
    else:
        plain = SimpleNamespace(**{**vars(args), "k": 0})
        assert batches[3] == train_gvm.rows_of_step(few, 3, plain)


def test_draws_depend_on_their_key_alone():
    """(name, seed, step) names a draw: no state, so ranks and restarts agree."""
    assert (keyed_rng("a", 1, 2).integers(2**60) == keyed_rng("a", 1, np.int64(2)).integers(2**60)
            != keyed_rng("a", 1, 3).integers(2**60))


def test_no_two_streams_are_one():
    """Keys of unequal length, zeros behind a key, large numbers, another purpose: each its own stream."""
    keys = [("a", 1, 7), ("a", 1, 7, 0), ("a", 1, 7, 0, 0), ("b", 1, 7), ("a", 17), ("a", 1, "7"),
            ("a", 1, 7 + 2**32), ("a", 1, -7), ("a", "1", 7)]
    assert len({keyed_rng(*key).integers(2**62) for key in keys}) == len(keys)
    assert row_seed(1, 7) != int(keyed_rng("a", 1, 7, 1, 0).integers(2**62))
