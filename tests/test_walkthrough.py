"""The walkthrough prints what training computes: the advantage of every token follows from the printed values
and KL by the definitions, summed in numpy."""

import re

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import sft
import train_gvm
from conftest import run_stage
from plumbing.args import parse_args
from toy import make, walkthrough
from train_dvpo import Args


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A toy build, an SFT model and a GVM of short runs, in one folder.

    The GVM's head is made 20 times larger: after so few steps its values hardly differ, and the three digits
    that are printed would not tell one formula from another.
    """
    folder = tmp_path_factory.mktemp("walkthrough")
    make.main(folder / "build", seed=0)
    toy = {"model": "toy", "micro_batch": 64}
    run_stage(sft, **toy, base_model=folder / "build" / "model", data=folder / "build" / "sft.jsonl",
              max_steps=200, output_dir=folder / "sft")
    run_stage(train_gvm, **toy, sft_model=folder / "sft", data=folder / "build" / "preferences.jsonl",
              max_steps=20, eval_every=0, output_dir=folder / "gvm")
    adapter = folder / "gvm" / "adapter_model.safetensors"
    weights = {name: x * (20 if "score" in name else 1) for name, x in load_file(adapter).items()}
    save_file(weights, adapter, metadata={"format": "pt"})
    return folder


def numbers(printed, name):
    """The cells of the one line of that name: [n] or, from V(s_1) on, [1 + n]."""
    line, = [line for line in printed.splitlines() if line[:18].strip() == name]
    return np.array(line[18:].split(), dtype=float)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gae", "q"])
def test_advantages_follow_from_the_printed_values(kind, folder, capsys):
    flags = {"model": "toy", "sft_model": folder / "sft", "value_model": folder / "gvm", "advantage": kind,
             "data": folder / "build" / "preferences.jsonl", "gae_lam": 0.8, "output_dir": folder}
    walkthrough.main(parse_args(Args, [str(x) for name, x in flags.items() for x in (f"--{name}", x)]))
    printed = capsys.readouterr().out
    beta, lam = (float(re.search(rf"{name} = ([\d.]+)", printed)[1]) for name in ("beta", "lambda"))
    scales = re.search(r"mu = (\S+) and sigma = (\S+) of gae, (\S+) and (\S+) of q", printed).groups()
    mu, sigma, mu_q, sigma_q = map(float, scales)
    q, kl = numbers(printed, "Q_t, GVM"), numbers(printed, "KL_t")
    n = len(kl)
    assert len(q) == n + 1 and beta > 0

    delta = np.diff(q) - beta * kl
    expected = {"gae": np.array([sum(lam ** (s - t) * delta[s] for s in range(t, n)) for t in range(n)]),
                "q": q[1:] - beta * kl}
    digits = 0.003  # what three digits of each value and KL leave open
    for name, mean, deviation in ("gae", mu, sigma), ("q", mu_q, sigma_q):
        assert np.ptp(expected[name]) > 20 * digits  # else anything would agree
        np.testing.assert_allclose(numbers(printed, f"{name}, raw"), expected[name], atol=digits)
        np.testing.assert_allclose(numbers(printed, f"{name}, normalized"),
                                   (expected[name] - mean) / deviation, atol=digits / deviation)

    advantage, free = numbers(printed, f"{kind}, normalized"), 1 - numbers(printed, "pi(a_t|s_t)")
    np.testing.assert_allclose(numbers(printed, "A_t (1 - pi)"), advantage * free, atol=digits)
    moved = numbers(printed, "log pi after") - numbers(printed, "log pi before")
    np.testing.assert_allclose(numbers(printed, "ratio"), np.exp(moved), atol=digits)
    column = numbers(printed, "column")
    assert (numbers(printed, "log pi read at") == column[:n]).all()
    assert (numbers(printed, "Q_t read at") == column[:n + 1]).all()
    assert 0 < (folder / "walkthrough.png").stat().st_size < 80_000
