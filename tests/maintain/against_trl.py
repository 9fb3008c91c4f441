"""Our GAE, returns, whitening and clipped losses against those of TRL 1.10.0, on random ragged batches.

    pip install --target /tmp/trl --no-deps trl==1.10.0 accelerate
    PYTHONPATH=/tmp/trl python tests/maintain/against_trl.py

TRL is not a dependency. Its whitening is a function; its GAE and its losses are lines of PPOTrainer.train,
cut out of the installed file and executed here as they stand. Two differences are known and bridged: TRL
whitens with the unbiased variance (ours is Eq. 2's), and in rows shorter than the batch it pays the score one
slot behind the last token, with one more value there; here its rewards and values end at the last token.
"""

import inspect
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from train_dvpo import policy_loss
from train_ppo import advantages, token_rewards, value_loss
from trl.experimental.ppo import ppo_trainer

SOURCE = inspect.getsource(ppo_trainer.PPOTrainer.train)


def lines(first, last):
    """The lines from the one that starts with `first` to the one before `last`, ready to be executed."""
    start = SOURCE.rindex("\n", 0, SOURCE.index(first)) + 1  # with the first line's own indent
    return textwrap.dedent(SOURCE[start:SOURCE.index(last)])


GAE = lines("lastgaelam = 0", "advantages = masked_whiten(")
LOSSES = lines("vpredclipped = torch.clamp(", "loss = pg_loss +")
MORE = lines("pg_clipfrac = masked_mean(", "prob_dist =")


def compare(seed):
    """Largest absolute difference of each quantity on one batch."""
    torch.manual_seed(seed)
    B, R = 6, 12
    lengths = torch.randint(1, R + 1, (B,))
    mask = torch.arange(R) < lengths[:, None]
    scores, kl, values = torch.randn(B), torch.randn(B, R) * mask, torch.randn(B, R) * mask
    old, new, v_new = torch.randn(B, R), torch.randn(B, R), torch.randn(B, R)
    args = SimpleNamespace(gamma=1.0, lam=0.95, cliprange=0.2, cliprange_value=0.2)

    rewards = token_rewards(scores, 0.2 * kl, mask)
    wanted = -0.2 * kl                                       # TRL: -kl_coef * kl, plus the score at one place
    wanted[torch.arange(B), lengths - 1] += scores
    ours, returns, _, _ = advantages(rewards, values, mask, args.lam)
    trl = {"rewards": wanted, "values": values, "args": args, "responses": values, "torch": torch}
    exec(GAE, trl)
    n = mask.sum()
    whitened = ppo_trainer.masked_whiten(trl["advantages"], mask) * (n / (n - 1)).sqrt() * mask

    old, new = old * 0.1, new * 0.1                          # ratios on both sides of the clip range
    loss, stats = policy_loss(new, old, ours, mask, args.cliprange)
    v_loss, v_clipped = value_loss(v_new, values, returns, mask, args.cliprange_value)
    trl.update(vpred=v_new, mb_values=values, mb_return=trl["returns"], padding_mask_p1=~mask[None],
               padding_mask=~mask[None], micro_batch_inds=0, new_logprobs=new, mb_logprobs=old,
               mb_advantage=ours, masked_mean=ppo_trainer.masked_mean)
    exec(LOSSES + MORE, trl)
    pairs = {"rewards": (rewards, wanted), "returns": (returns, trl["returns"] * mask),
             "advantages": (ours, whitened),
             "policy loss": (loss / n, trl["pg_loss"]), "value loss": (v_loss / n, trl["vf_loss"]),
             "clip fraction": (stats[1] / n, trl["pg_clipfrac"]),
             "value clip fraction": (v_clipped / n, trl["vf_clipfrac"])}
    return {name: (a - b).abs().max().item() for name, (a, b) in pairs.items()}


if __name__ == "__main__":
    found = [compare(seed) for seed in range(200)]
    for name in found[0]:
        print(f"{name:20} largest difference over {len(found)} batches: {max(f[name] for f in found):.1e}")
    assert max(x for f in found for x in f.values()) <= 1e-6
