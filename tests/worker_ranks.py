"""One step of DVPO on fixed rollouts, with train_dvpo's own functions, on any number of ranks and any ZeRO
stage.

    deepspeed --num_gpus 2 tests/worker_ranks.py JOB.json        writes the JSON test_invariance.py compares

The job names a folder with the policy, another with the reference, the rollouts (each row with
its values), the stages and an output folder. Every rank takes its half of the rows, as the
rollouts of a real run are its own.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import deepspeed
import torch

import train_dvpo
from common import freeze, load_policy, load_tokenizer, Run
from plumbing.lean import LogProbs
from plumbing.ranks import gather_rows, init_distributed, whole_weights
from plumbing.saving import save_model


def step(job, stage):
    """Roll out, score, take advantages, update once over all rows, save. Returns what
    must not depend on the ranks."""
    rank, world, device = init_distributed()
    n = len(job["rows"]) // world
    rows = job["rows"][rank * n:(rank + 1) * n]
    config = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
              "gradient_clipping": 0.0, "train_micro_batch_size_per_gpu": 1,
              "managed_gradient_accumulation": False,
              "zero_allow_untested_optimizer": True}
    args = SimpleNamespace(micro_batch=1, accum_steps=n, ppo_epochs=1, temperature=1.0, cliprange=0.2, seed=1,
                           early_stop_kl=0.0, lr=0.1, response_length=40, static_cache=False)
    tokenizer = load_tokenizer(job["policy"])
    run = Run(args, tokenizer, device, rank, world)
    policy = LogProbs(load_policy(job["policy"], tokenizer, torch.float32))
    # plain SGD: the step is the gradient itself, where Adam would hide a wrong scale
    optimizer = torch.optim.SGD(policy.parameters(), lr=args.lr)
    engine, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, config=config)
    reference = freeze(LogProbs(load_policy(job["reference"], tokenizer, torch.float32)), config, device)

    hooks = zero3_hooks(engine, stage)
    sampled = train_dvpo.rollout(engine, rows, [row["seed"] for row in rows], run)
    try:
        with whole_weights(engine):
            raise KeyError("generation fails")
    except KeyError:
        pass  # training goes on as if nothing had happened
    whole = sum(p.numel() > 0 for p in policy.parameters())

    value = lambda rows, tau: torch.nn.utils.rnn.pad_sequence([torch.tensor(row["values"]) for row in rows],
                                                              batch_first=True)
    models = train_dvpo.Models(engine, reference, value)
    scored = train_dvpo.score(models, rows, [], run)
    mask = scored.batch.mask
    kl = (scored.logp - scored.ref_logp) * mask
    advantage, mean, std = train_dvpo.advantages(job["advantage"], scored.values, 0.1 * kl, mask, 0.95)
    stats, first_ratio = train_dvpo.update(models, scored, advantage, 0, run)
    save_model(engine, tokenizer, Path(job["out"]) / f"policy{stage}-{world}")
    return {"sampled": gather_rows([row["response_ids"] for row in sampled]), "mean": mean, "std": std,
            "advantages": gather_rows([row[m].tolist() for row, m in zip(advantage, mask)]),
            "loss": stats["loss/policy_avg"], "approxkl": stats["policy/approxkl_avg"],
            "updates": stats["policy/updates"], "first_ratio": first_ratio,
            "whole": whole, "hooks": (hooks, zero3_hooks(engine, stage))}


def zero3_hooks(engine, stage):
    """How many hooks gather and release the weights around each layer."""
    return len(engine.optimizer.parameter_offload.forward_hooks) if stage == 3 else 0


def all_stages(job):
    """{ZeRO stage: what it gave} of all the job's stages."""
    for stage in job["stages"]:
        for folder in (f"policy{stage}-1", f"policy{stage}-2"):
            (Path(job["out"]) / folder).mkdir(exist_ok=True)
    return {str(stage): step(job, stage) for stage in job["stages"]}


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[-1]).read_text())  # the launcher puts --local_rank first
    result = all_stages(job)
    if torch.distributed.get_rank() == 0:
        (Path(job["out"]) / "result.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()
