"""How a batch is split into micro batches and over ranks is bookkeeping: losses, advantages and
the updated weights do not depend on it, for any ZeRO stage. Rows have unequal lengths, as only
then a wrong denominator shows."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sft
import train_dpo
import train_dvpo
import train_gvm
import train_ppo
import train_rm
import worker_ranks
from common import answer_ids, chat_ids, load_policy, load_tokenizer
from conftest import ROOT, clean_env, feedback_rows, free_port, metrics, recorded, run_stage, write_jsonl

# Seconds; a launch takes 15, and a minute or more where DeepSpeed still has to compile its CPU library
LAUNCH_TIMEOUT = 400


def deepspeed_ranks(*command):
    """Run a script on two ranks with the real launcher."""
    launcher = Path(sys.executable).parent / "deepspeed"
    port = free_port()
    command = [sys.executable, launcher, "--num_gpus", "2", "--master_port", str(port), *map(str, command)]
    done = subprocess.run(command, cwd=ROOT, env=clean_env(), timeout=LAUNCH_TIMEOUT, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*"))  # memory until the machine is restarted
    return done.stdout


# ---- micro batches ----

def weights_after_one_step(stage, flags, monkeypatch, **changes):
    """Run one optimizer step of a stage's own main, as plain SGD: the step is then the gradient itself.
    Returns {parameter: (before, after)}, of the policy and of PPO's critic."""
    seen, updates, start = [], [], []
    recorded(monkeypatch, stage, "save_model", seen)
    if stage is train_ppo:
        recorded(monkeypatch, stage, "update", updates)

    def sgd(groups, **settings):
        start.extend((p, p.detach().clone()) for group in groups for p in group["params"])
        return torch.optim.SGD(groups)
    monkeypatch.setattr(torch.optim, "AdamW", sgd)
    run_stage(stage, **{**flags, "max_steps": 1, "max_grad_norm": 1e6, "lr": 0.1, **changes})
    monkeypatch.undo()
    names = {id(p): name for name, p in seen[0][0][0].module.named_parameters()}
    for (models, *_), _ in updates:
        names.update({id(p): f"critic {name}" for name, p in models.critic.module.named_parameters()})
    return {names[id(p)]: (before, p.detach().clone()) for p, before in start}


def assert_same_step(one, other, tolerance=1e-5):
    moved = max((after - before).abs().max().item() for before, after in one.values())
    assert moved > 100 * tolerance
    for name, (_, after) in one.items():
        assert torch.allclose(after, other[name][1], atol=tolerance), name


@pytest.mark.parametrize("stage, name", [(sft, "sft"), (train_gvm, "gvm"), (train_dvpo, "dvpo"),
                                         (train_rm, "rm"), (train_ppo, "ppo")])
def test_the_gradient_does_not_depend_on_the_micro_batch(stage, name, flags, chain, baseline, tmp_path,
                                                         monkeypatch):
    """One optimizer batch of 4 rows as 1 x 4, 2 x 2 or 4 x 1: the same step, through the stage's own loop."""
    steps = []
    for micro in (1, 2, 4):
        changes = {"micro_batch": micro, "output_dir": tmp_path / str(micro)}
        if stage in (train_dvpo, train_ppo):
            changes.update(sft_model=chain.sft, accum_steps=4 // micro, ppo_epochs=1, rollout_batch=4,
                           response_length=12)
            changes.update({"value_model": chain.gvm} if stage is train_dvpo else
                           {"reward_model": baseline.rm, "critic_lr": 0.1})
        else:
            changes.update(batch_size=4)
        if stage in (train_gvm, train_rm):
            changes.update(sft_model=chain.sft, lora_dropout=0.0)
        steps.append(weights_after_one_step(stage, getattr(flags, name), monkeypatch, **changes))
    assert_same_step(steps[0], steps[1])
    assert_same_step(steps[0], steps[2])


@pytest.mark.parametrize("stage, name", [(sft, "sft"), (train_gvm, "gvm"), (train_rm, "rm"),
                                         (train_dpo, "dpo")])
def test_rows_of_like_length_stand_together(stage, name, flags, chain, tmp_path, monkeypatch):
    """An optimizer batch of 8 rows is cut into micro batches of 2 in the order of length: the same step as in
    the order in which the rows are drawn, with less padding."""
    steps, padding = [], []
    for order in ("length", "drawn"):
        shapes = []
        recorded(monkeypatch, torch.nn.Embedding, "forward", shapes)
        if order == "drawn":  # looked up here before the built-in one
            monkeypatch.setattr(stage, "sorted", lambda rows, key=None: list(rows) if key else sorted(rows),
                                raising=False)
        changes = {"batch_size": 8, "micro_batch": 2, "output_dir": tmp_path / order}
        if stage is train_gvm:
            changes.update(k=0)
        if stage is not sft:
            changes.update(sft_model=chain.sft)
        if stage in (train_gvm, train_rm):
            changes.update(lora_dropout=0.0)
        steps.append(weights_after_one_step(stage, getattr(flags, name), monkeypatch, **changes))
        padding.append(sum(ids.numel() for (_, ids), _ in shapes))
    assert_same_step(*steps)
    assert padding[0] < padding[1]


@pytest.mark.parametrize("zero", [0, 1])
def test_gradients_are_clipped_and_their_norm_is_told(zero, flags, tmp_path, monkeypatch):
    """A step of SGD with lr 0.1 is as long as 0.1 x the clipped gradient; the log has the norm before
    clipping."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": zero}}))
    norms, lengths = [], []
    for limit in (1e6, 0.01):
        out = tmp_path / str(limit)
        moved = weights_after_one_step(sft, flags.sft, monkeypatch, max_grad_norm=limit, warmup_steps=1,
                                       ds_config=config, output_dir=out)
        lengths.append(sum((after - before).square().sum() for before, after in moved.values()).sqrt() / 0.1)
        norms.append(metrics(out)[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) and norms[0] > 0.1
    assert lengths[0] == pytest.approx(norms[0], rel=1e-3) and lengths[1] == pytest.approx(0.01, rel=1e-3)


def test_the_sft_step_is_the_gradient_of_the_mean_over_tokens(flags, models_folder, tmp_path, monkeypatch):
    """Against plain PyTorch: all rows of the data in one batch, every answer read alone,
    averaged over all tokens."""
    folder = models_folder / "llama"
    tokenizer = load_tokenizer(folder)
    rows = [{"instruction": f"is thing{i} red ?",
             "output": "yes it is red indeed ."[:4 + 6 * (i % 4)].strip()}
            for i in range(6)]
    got = weights_after_one_step(sft, flags.sft, monkeypatch, data=write_jsonl(tmp_path / "rows.jsonl", rows),
                                 batch_size=6, warmup_steps=1, output_dir=tmp_path / "out")
    model, loss, tokens = load_policy(folder, tokenizer, torch.float32), 0.0, 0
    for row in rows:
        prompt = chat_ids(tokenizer, [{"role": "user", "content": row["instruction"]}])
        answer = answer_ids(tokenizer, row["output"])
        logp = torch.log_softmax(model(input_ids=torch.tensor([prompt + answer])).logits[0], -1)
        loss = loss - sum(logp[len(prompt) + t - 1, y] for t, y in enumerate(answer))
        tokens += len(answer)
    (loss / tokens).backward()
    for name, p in model.named_parameters():
        assert torch.allclose(got[name][1], got[name][0] - 0.1 * p.grad, atol=1e-5), name
    assert metrics(tmp_path / "out")[0]["loss"] == pytest.approx(loss.item() / tokens, abs=1e-4)


# ---- ranks ----

@pytest.fixture(scope="module")
def ranks(chain, models_folder, tmp_path_factory):
    """The same rollouts on one rank without ZeRO (in this process), and on two ranks with ZeRO 1, 2 and 3."""
    out, rng = tmp_path_factory.mktemp("ranks"), random.Random(0)
    rows = []
    for i, length in enumerate((3, 8, 1, 5, 2, 7, 4, 6)):
        prompt = [0, *(rng.randrange(3, 32) for _ in range(3 + i % 4))]
        response = [rng.randrange(3, 32) for _ in range(length - 1)] + [1 if i % 2 else 9]
        rows.append({"prompt_ids": prompt, "response_ids": response, "seed": 100 + i, "truncated": i % 2 == 0,
                     "values": [rng.uniform(-1, 1) for _ in range(length + 1)]})
    job = {"policy": str(chain.dvpo), "reference": str(models_folder / "llama"), "rows": rows,
           "advantage": "gae", "out": str(out)}
    (out / "job.json").write_text(json.dumps({**job, "stages": [1, 2, 3]}))
    deepspeed_ranks("tests/worker_ranks.py", out / "job.json")
    one = worker_ranks.all_stages({**job, "stages": [0]})["0"]
    return out, one, json.loads((out / "result.json").read_text())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_do_what_one_does(ranks, stage):
    """Samples, advantages (normalized over all ranks), loss and KL are those of one
    rank, for ZeRO 1, 2 and 3."""
    _, one, several = ranks
    two = several[str(stage)]
    assert two["sampled"] == one["sampled"] and len({len(ids) for ids in one["sampled"]}) > 1
    assert two["updates"] == one["updates"] == 1
    for name in ("mean", "std", "loss", "approxkl", "first_ratio"):
        assert two[name] == pytest.approx(one[name], abs=1e-4), name
    for got, wanted in zip(two["advantages"], one["advantages"], strict=True):
        assert got == pytest.approx(wanted, abs=1e-4)


def test_generation_gives_the_weights_back(ranks):
    """Under ZeRO-3 it gathers them whole; afterwards, though it failed, they are in shards and the hooks
    in place."""
    two = ranks[2]["3"]
    assert two["whole"] == 0 < ranks[1]["whole"]
    assert two["hooks"][0] == two["hooks"][1] > 0


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_write_the_policy_that_one_writes(ranks, chain, stage):
    """The saved policy has whole tensors under ZeRO-3 too, moved as one rank moved them,
    though generation failed once."""
    out, _, _ = ranks
    start, one = (load_file(chain.dvpo / "model.safetensors"),
                  load_file(out / "policy0-1" / "model.safetensors"))
    two = load_file(out / f"policy{stage}-2" / "model.safetensors")
    assert two.keys() == one.keys() and max((one[k] - start[k]).abs().max().item() for k in one) > 1e-2
    for name in one:
        assert torch.allclose(two[name], one[name], atol=1e-4), name


def on_one_and_two_ranks(stage, flags, folder):
    """Metrics of the same run on one rank (in this process) and on two; and what the two printed."""
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    printed = deepspeed_ranks(f"{stage.__name__}.py", *words, "--output_dir", folder / "two")
    run_stage(stage, **flags, output_dir=folder / "one")
    return metrics(folder / "one"), metrics(folder / "two"), printed


def assert_same_metrics(one, two, *names):
    assert len(one) == len(two)
    for name in names:
        assert [row[name] for row in two] == pytest.approx([row[name] for row in one], abs=1e-4), name


@pytest.mark.slow
def test_rows_that_do_not_divide_by_the_ranks_still_finish(flags, tmp_path):
    """Five training rows and five held out, batches of 4 on two ranks: nobody waits for a row that never
    comes, and loss and gradient are those of a single rank."""
    data = write_jsonl(tmp_path / "data.jsonl", feedback_rows(30))
    given = {**flags.sft, "data": data, "micro_batch": 1, "epochs": 1}
    one, two, printed = on_one_and_two_ranks(sft, given, tmp_path)
    assert "5 rows, 5 held out" in printed and len(two) == 2
    assert_same_metrics(one, two, "loss", "grad_norm", "num_tokens")


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_gvm_learns_the_same_on_two_ranks(zero, flags, chain, tmp_path):
    """The same draws of tau, loss, gradient and held-out ranking as on one rank."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": zero}}))
    given = {**flags.gvm, "sft_model": chain.sft, "batch_size": 8, "micro_batch": 4, "lora_dropout": 0.0,
             "tau_warmup": 0.0, "ds_config": config}
    one, two, _ = on_one_and_two_ranks(train_gvm, given, tmp_path)
    assert_same_metrics(one, two, "loss", "grad_norm", "num_tokens", "value/mean")
    assert two[-1]["eval/accuracy"] == one[-1]["eval/accuracy"]
    assert two[-1]["eval/margin"] == pytest.approx(one[-1]["eval/margin"], abs=1e-4)


@pytest.mark.slow
def test_a_reward_model_gives_the_same_rewards_on_two_ranks(flags, chain, baseline, tmp_path):
    """Each rank scores its share of the trajectories: center and scale are bit for bit those of one rank."""
    given = {**flags.gvm, "sft_model": chain.sft, "batch_size": 4, "micro_batch": 2, "lora_dropout": 0.0,
             "reward": "model", "reward_model": baseline.rm, "max_steps": 2}
    one, two, _ = on_one_and_two_ranks(train_gvm, given, tmp_path)
    assert_same_metrics(one, two, "loss", "grad_norm", "num_tokens", "value/mean")
    first, second = (json.loads((tmp_path / name / "gvm.json").read_text())["reward"]
                     for name in ("one", "two"))
    assert first == second and first["kind"] == "model" and first["scale"] > 1e-3


@pytest.mark.slow
def test_gloo_may_let_go_before_python_ends():
    """A thread of gloo lets go of a collective's tensors a moment after it is over. Where Python ends first,
    a finished run aborts, about once in ten small ones. A daemon thread stands for it here: it too dies with
    Python."""
    code = ("import threading, time; from plumbing.ranks import dist, init_distributed; init_distributed();"
            "late = lambda: (time.sleep(0.1), print('let go', flush=True));"
            "threading.Thread(target=late, daemon=True).start(); dist.destroy_process_group()")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean_env(), timeout=LAUNCH_TIMEOUT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "let go" in done.stdout
