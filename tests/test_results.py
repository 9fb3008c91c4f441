"""The results can be made again: every ablation patch applies to the script as it is and does what its name
says, and the numbers of a table are what their docstrings promise."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from common import batch_normalize
from conftest import ROOT, run_stage
from test_math import LENGTHS, assert_rows, ragged, whitened

sys.path.insert(0, str(ROOT / "results"))
import run

PATCHES = sorted((ROOT / "results/ablations").glob("*.patch"))


def patched(name, tmp_path, script="train_dvpo"):
    """A script with a patch applied, as a module of its own."""
    path = tmp_path / f"{script}.py"
    path.write_text((ROOT / path.name).read_text())
    subprocess.run(["git", "apply", str(ROOT / "results/ablations" / f"{name}.patch")], cwd=tmp_path,
                   check=True)
    spec = importlib.util.spec_from_file_location(f"{script}_{name}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_patches():
    assert len(PATCHES) >= 6


@pytest.mark.parametrize("path", PATCHES, ids=lambda path: path.stem)
def test_a_patch_applies_and_the_script_still_trains(path, tmp_path, chain, baseline, flags, monkeypatch):
    """One step on the test models; the drift patches ask the toy for exact values, which are stubbed here."""
    import toy.exact
    monkeypatch.setattr(toy.exact, "values", lambda rows, policy, tokenizer:
                        [[0.0] * (1 + len(row["response_ids"])) for row in rows])
    script = "train_ppo" if "critic" in path.stem else "train_dvpo"
    run = {"train_ppo": {**flags.ppo, "reward_model": baseline.rm},
           "train_dvpo": {**flags.dvpo, "value_model": chain.gvm}}[script]
    run_stage(patched(path.stem, tmp_path, script), **{**run, "max_steps": 2}, sft_model=chain.sft,
              truth_fn="toy_truth:constant" if "drift" in path.stem else "", output_dir=tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and rows[-1]["objective/kl"] != 0
    if "drift" in path.stem:  # against zeros the error is the value itself
        assert rows[0]["drift/rmse_before"] > 0 and rows[0]["drift/rmse_after"] >= 0


def test_per_sequence_normalization_makes_every_row_zero_mean_and_unit_variance(tmp_path):
    values, _, mask = ragged([5, 2, 3, 6])
    penalty = torch.randn(mask.shape)
    advantage, _, _ = patched("norm_sequence", tmp_path).advantages("q", values, penalty, mask, 0.95)
    for row, m in zip(advantage, mask):
        assert row[m].mean().item() == pytest.approx(0, abs=1e-5)
        assert row[m].std(unbiased=False).item() == pytest.approx(1, abs=1e-5)


def test_kl_outside_leaves_the_normalization_to_the_values(tmp_path):
    values, _, mask = ragged()
    penalty = torch.randn(mask.shape)
    advantage, _, _ = patched("kl_outside", tmp_path).advantages("q", values, penalty, mask, 0.95)
    assert torch.allclose(advantage, batch_normalize(values[:, 1:], mask)[0] - penalty * mask, atol=1e-6)


def test_released_is_the_authors_recipe_token_by_token(tmp_path):
    """Whitened V before the action; reward -penalty; no value behind the last token; GAE; whitened again."""
    values, _, mask = ragged()
    penalty = torch.rand(mask.shape)
    states = whitened([values[i, :T].tolist() for i, T in enumerate(LENGTHS)])
    rows = []
    for i, v in enumerate(states):
        after = [*v[1:], 0.0]
        delta = [after[t] - v[t] - penalty[i, t].item() for t in range(len(v))]
        rows.append([sum(0.95 ** (s - t) * delta[s] for s in range(t, len(v))) for t in range(len(v))])
    advantages = patched("released", tmp_path).advantages
    assert_rows(advantages("released", values, penalty, mask, 0.95)[0], whitened(rows))


def test_released_pushes_answers_better_than_the_mean_to_go_on(tmp_path):
    """Where V is a constant v along an answer, A_t = -lambda^(T-t) v up to a scale: the EOS of a good answer
    is pushed down the most, that of a bad one up. A length bias that the values themselves do not contain."""
    # A good and a bad answer of T = 4 tokens, whitened to v = +1 and -1
    values = torch.tensor([[0.8] * 5, [0.2] * 5])
    mask = torch.ones(2, 4, dtype=torch.bool)
    advantages = patched("released", tmp_path).advantages
    advantage, _, _ = advantages("released", values, torch.zeros(2, 4), mask, 0.9)
    wanted = torch.tensor([-0.9 ** (4 - t) for t in range(1, 5)])
    assert torch.allclose(advantage[0] / advantage[0, 3].abs(), wanted, atol=1e-5)
    assert torch.allclose(advantage[1], -advantage[0], atol=1e-5)


def test_the_step_of_convergence_by_hand():
    """Start 0, the last 5 steps 1: the mean of 5 steps reaches 0.95 once all of the 5 are 1."""
    reward = np.array([0.0] * 10 + [1.0] * 20)
    assert run.converged(reward) == 15
    assert run.converged(np.array([0.0, 1.0, 1.0, 1.0, 1.0, 1.0])) == 6
    assert run.converged(np.linspace(0, 1, 101)) > 90
    assert np.isnan(run.converged(np.linspace(1, 0, 20)))


def test_spread_is_mean_and_sample_deviation():
    assert run.spread({"x": [1.0, 2.0, 3.0]})["x"] == {"mean": 2.0, "std": 1.0, "each": [1.0, 2.0, 3.0]}
    assert run.spread({"x": [1.0]})["x"]["std"] is None


def test_a_grid_runs_what_is_needed_first_and_keeps_what_is_done(tmp_path):
    """Two runs, one needing the other; a second execution does nothing, a changed command runs again."""
    def grid(text):
        g = run.Grid(tmp_path, 2)
        g.runs = []  # without the toy world
        first = g.add(tmp_path / "one", ["-c", f"open({str(tmp_path / 'one/x')!r}, 'w').write('{text}')"])
        g.add(tmp_path / "two", ["-c", f"t = open({str(tmp_path / 'one/x')!r}).read();"
                                       f"open({str(tmp_path / 'log')!r}, 'a').write(t)"], [first])
        return g
    grid("a").execute()
    assert (tmp_path / "log").read_text() == "a"
    grid("a").execute()
    assert (tmp_path / "log").read_text() == "a"
    grid("b").execute()
    assert (tmp_path / "log").read_text() == "ab"  # what needs it runs again, too


@pytest.mark.slow
def test_a_grid_makes_the_toy_world_in_a_new_folder(tmp_path):
    g = run.Grid(tmp_path / "new", 1)
    g.execute()
    assert (g.toy / "preferences.jsonl").exists() and (g.toy / "model/config.json").exists()


def test_a_failed_run_ends_the_grid_with_its_log(tmp_path):
    g = run.Grid(tmp_path, 1)
    g.runs = []
    g.add(tmp_path / "bad", ["-c", "raise SystemExit('no such thing')"])
    with pytest.raises(SystemExit, match="no such thing"):
        g.execute()
    assert not (tmp_path / "bad/done").exists()
