"""Theorem 3.1 on an MDP small enough to write down: 3 tokens, answers of 3 tokens, every expectation a sum.

For one fixed policy reward and value carry the same information and give the same policy gradient, up to
their errors. Once the policy moves, a reward model's gradient moves with it, a frozen Q's does not: both
halves are checked, with the project's own losses in place of formulas of the test's."""

import itertools

import pytest
import torch

from common import td_targets
from train_dvpo import policy_loss
from train_ppo import gae, token_rewards

A, T = 3, 3
ANSWERS = list(itertools.product(range(A), repeat=T))                             # 27 leaves of the tree
STATES = {s: i for i, s in enumerate(s for t in range(T) for s in itertools.product(range(A), repeat=t))}
VISITED = torch.tensor([[STATES[y[:t]] for t in range(T)] for y in ANSWERS])      # [27, T] state before a_t
TOKENS = torch.tensor(ANSWERS)                                                    # [27, T]
MASK = torch.ones(len(ANSWERS), T, dtype=torch.bool)


def world(seed=0):
    """Logits of a tabular softmax policy [states, A] and a reward per answer [27]."""
    torch.manual_seed(seed)
    return torch.randn(len(STATES), A, dtype=torch.float64), torch.randn(len(ANSWERS), dtype=torch.float64)


def logprobs(theta):
    """log pi(a_t | s_t) along every answer, [27, T]."""
    return torch.log_softmax(theta, -1)[VISITED, TOKENS]


def probability(theta):
    return logprobs(theta).sum(1).exp()                                            # [27]


def values(theta, reward):
    """Q(s_t, a_t) = E[r | y_<=t] along every answer, [27, T]: mean over the answers with that beginning."""
    p = probability(theta).detach()
    q = torch.zeros(len(ANSWERS), T, dtype=torch.float64)
    for i, y in enumerate(ANSWERS):
        for t in range(T):
            same = torch.tensor([other[:t + 1] == y[:t + 1] for other in ANSWERS])
            q[i, t] = (p * reward)[same].sum() / p[same].sum()
    return q


def reward_of(theta, q):
    """Back from values to rewards: r(s, a) = Q(s, a) - sum_a' pi(a' | s') Q(s', a'), [27, T]."""
    pi, r = torch.softmax(theta, -1), torch.zeros_like(q)
    for i, y in enumerate(ANSWERS):
        for t in range(T):
            follow = 0.0
            if t + 1 < T:
                for a in range(A):
                    child = next(j for j, other in enumerate(ANSWERS) if other[:t + 2] == (*y[:t + 1], a))
                    follow += pi[STATES[y[:t + 1]], a] * q[child, t + 1]
            r[i, t] = q[i, t] - follow
    return r


def gradient(theta, weight):
    """Gradient of DVPO's and PPO's surrogate where weight [27, T] is each token's advantage; the sum over
    answers is weighted by their probability, as sampling would."""
    theta = theta.clone().requires_grad_()
    logp = logprobs(theta)
    loss, _ = policy_loss(logp, logp.detach(), probability(theta).detach()[:, None] * weight, MASK, 0.2)
    return -torch.autograd.grad(loss, theta)[0]


def reward_gradient(theta, reward):
    """PPO without a critic (lambda 1, V = 0): every token is worth the answer's reward."""
    nothing = torch.zeros(len(ANSWERS), T, dtype=torch.float64)
    return gradient(theta, gae(token_rewards(reward, nothing, MASK), MASK, 1.0))


def true_gradient(theta, reward):
    """d E_pi[r] / d theta, by differentiating the sum itself."""
    theta = theta.clone().requires_grad_()
    return torch.autograd.grad((probability(theta) * reward).sum(), theta)[0]


def gap(one, other):
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize("seed", range(3))
def test_reward_to_value_to_reward_is_exact(seed):
    """The reward that the values imply is r at the last token and 0 before it."""
    theta, reward = world(seed)
    back = reward_of(theta, values(theta, reward))
    assert torch.allclose(back[:, -1], reward, atol=1e-12) and back[:, :-1].abs().max() < 1e-12


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_the_td_loss_has_the_exact_values_as_its_fixed_point(lam):
    """E[G_t - Q_t | s_t, a_t] = 0 at Q = Q^pi for every lambda, over all continuations of every beginning;
    and not at other values."""
    theta, reward = world()
    q, p = values(theta, reward), probability(theta)
    q0 = torch.full((len(ANSWERS), 1), (p * reward).sum().item(), dtype=torch.float64)

    def error(q):
        target = td_targets(torch.cat([q0, q], 1), reward, MASK, 1.0, lam)[:, 1:]
        beginnings = {y[:t + 1] for y in ANSWERS for t in range(T)}
        return max(abs(sum(p[i] * (target - q)[i, len(b) - 1] for i, y in enumerate(ANSWERS)
                           if y[:len(b)] == b)) for b in beginnings)
    assert error(q) < 1e-12 < 1e-3 < error(q + 0.1 * torch.randn_like(q))


@pytest.mark.parametrize("seed", range(3))
def test_for_a_fixed_policy_both_supervisors_give_the_true_gradient(seed):
    theta, reward = world(seed)
    wanted = true_gradient(theta, reward)
    assert gap(reward_gradient(theta, reward), wanted) < 1e-12
    assert gap(gradient(theta, values(theta, reward)), wanted) < 1e-12


def test_the_gradients_meet_as_the_errors_go_to_0():
    """Independent errors of size e in the reward model and in the values: the gap is proportional to e."""
    theta, reward = world()
    q, noise = values(theta, reward), torch.randn(len(ANSWERS), dtype=torch.float64)
    q_noise = torch.zeros_like(q)
    for (state, token) in itertools.product(range(len(STATES)), range(A)):  # one error per (s, a)
        q_noise[(VISITED == state) & (TOKENS == token)] = torch.randn((), dtype=torch.float64)
    gaps = [gap(gradient(theta, q + e * q_noise), reward_gradient(theta, reward + e * noise))
            for e in (1.0, 1e-2, 1e-4)]
    assert gaps[0] > 0.1                              # with errors as large as the reward they part
    assert gaps[1] < 0.03 and gaps[2] == pytest.approx(gaps[1] / 100, rel=0.1)


def test_a_frozen_q_parts_from_the_reward_model_once_the_policy_moves():
    """The further the policy has gone, the further the frozen values' gradient is off; the reward model's
    stays exact, and so does that of the values of the policy as it is now, which is what tau is for."""
    theta, reward = world()
    frozen, direction, gaps = values(theta, reward), true_gradient(theta, reward), []
    for step in (0.0, 0.1, 1.0, 10.0):
        moved = theta + step * direction
        wanted = true_gradient(moved, reward)
        assert gap(reward_gradient(moved, reward), wanted) < 1e-10
        assert gap(gradient(moved, values(moved, reward)), wanted) < 1e-10
        gaps.append(gap(gradient(moved, frozen), wanted))
    assert gaps[0] < 1e-12 and gaps == sorted(gaps) and gaps[1] > 1e-4 and gaps[-1] > 0.1


def test_what_following_a_frozen_q_costs():
    """Behind token 0 every answer is worth 0.5; behind token 1 one answer is worth 1 and the rest nothing.
    For the first policy token 0 is the better one, and a frozen Q keeps saying so; a reward model does not.
    """
    reward = torch.tensor([0.5 if y[0] == 0 else float(y == (1, 0, 0)) for y in ANSWERS], dtype=torch.float64)
    theta = torch.zeros(len(STATES), A, dtype=torch.float64)
    theta[STATES[()]] = torch.tensor([0.0, 2.0, -4.0])        # token 1 is tried often enough to be learned
    frozen, by_reward, by_q = values(theta, reward), theta.clone(), theta.clone()
    for _ in range(3000):
        by_reward += reward_gradient(by_reward, reward)
        by_q += gradient(by_q, frozen)
    end = [(probability(t) * reward).sum().item() for t in (theta, by_q, by_reward)]
    assert end[0] < 0.2 and end[1] == pytest.approx(0.5, abs=0.02) and end[2] > 0.95
