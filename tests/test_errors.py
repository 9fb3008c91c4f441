"""Bad input ends in one sentence that says what to change, and in a non-zero exit
status; never in a traceback."""

import subprocess
import sys

import pytest

import sft
import train_dvpo
import train_gvm
import train_ppo
import train_rm
from common import parse_args
from conftest import ROOT, WORDS, clean_env, feedback_rows, run_stage, tiny_llama, word_tokenizer, write_jsonl
from data import split_of


def complaint(stage, **flags):
    """The sentence that a stage ends with."""
    with pytest.raises(SystemExit) as end:
        run_stage(stage, **flags)
    text = end.value.code
    assert isinstance(text, str) and "\n" not in text and " " in text, text
    return text


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Default output folders lie under the current one."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def gvm(flags, chain, tmp_path):
    return {**flags.gvm, "sft_model": chain.sft, "output_dir": tmp_path / "out"}


@pytest.fixture
def dvpo(flags, chain, tmp_path):
    return {**flags.dvpo, "sft_model": chain.sft, "value_model": chain.gvm, "output_dir": tmp_path / "out"}


@pytest.fixture
def rm(flags, chain, tmp_path):
    return {**flags.rm, "sft_model": chain.sft, "output_dir": tmp_path / "out"}


@pytest.fixture
def ppo(flags, chain, baseline, tmp_path):
    return {**flags.ppo, "sft_model": chain.sft, "reward_model": baseline.rm, "output_dir": tmp_path / "out"}


# ---- models and earlier stages ----

def test_a_model_that_is_not_there(flags):
    """Neither a folder nor, without a network, on the hub."""
    text = complaint(sft, **{**flags.sft, "model": "nobody/nothing"})
    assert "--model nobody/nothing" in text and "no such folder" in text


@pytest.mark.parametrize("stage, name, command", [(train_gvm, "gvm", "sft.py"), (train_rm, "rm", "sft.py"),
                                                  (train_dvpo, "dvpo", "sft.py"),
                                                  (train_ppo, "ppo", "sft.py")])
def test_an_earlier_stage_that_has_not_run(stage, name, command, flags):
    """The message is the command to run."""
    model = flags.sft["model"]
    text = complaint(stage, **getattr(flags, name))
    assert f"{command} --model {model}" in text and "--sft_model" in text


def test_a_gvm_that_has_not_been_trained(flags, chain):
    """DVPO with an SFT model but without a GVM names train_gvm.py."""
    text = complaint(train_dvpo, **flags.dvpo, sft_model=chain.sft)
    assert f"train_gvm.py --model {flags.sft['model']}" in text and "--value_model" in text


def test_a_folder_that_is_no_gvm(dvpo, chain):
    """A policy is not a value model."""
    assert "--value_model" in complaint(train_dvpo, **{**dvpo, "value_model": chain.sft})


def test_a_gvm_of_another_tokenizer(dvpo, tmp_path):
    """Token ids mean other words to it."""
    words = [*WORDS[:-2], WORDS[-1], WORDS[-2]]
    tiny_llama().save_pretrained(tmp_path / "sft")
    word_tokenizer(words).save_pretrained(tmp_path / "sft")
    text = complaint(train_dvpo, **{**dvpo, "sft_model": tmp_path / "sft"})
    assert "another tokenizer" in text and "--value_model" in text


def test_a_tokenizer_larger_than_its_model(flags, tmp_path):
    """Ids beyond the embedding would be an index error in the first forward pass."""
    tiny_llama().save_pretrained(tmp_path / "model")
    word_tokenizer([*WORDS, "more"]).save_pretrained(tmp_path / "model")
    assert "do not belong together" in complaint(sft, **{**flags.sft, "model": tmp_path / "model"})


# ---- data ----

def test_data_that_is_empty_or_missing(flags, tmp_path):
    """The file is named."""
    for path in (write_jsonl(tmp_path / "empty.jsonl", []), str(tmp_path / "missing.jsonl")):
        assert path in complaint(sft, **{**flags.sft, "data": path})


def test_data_without_scores_where_scores_are_the_reward(gvm, tmp_path):
    """--reward score on plain pairs names the row and the way out."""
    rows = [{"prompt": row["instruction"], "chosen": "yes .", "rejected": "no ."} for row in feedback_rows()]
    text = complaint(train_gvm, **{**gvm, "data": write_jsonl(tmp_path / "pairs.jsonl", rows),
                                   "reward": "score", "k": 0})
    assert "pairs.jsonl:" in text and "--reward preference" in text


def test_scores_outside_their_range(gvm):
    """--score_min and --score_max must span the data, or rewards would leave [-1, 1]."""
    text = complaint(train_gvm, **gvm, reward="score", score_max=5)
    assert "--score_min" in text and "--score_max" in text


def test_data_without_policy_names_where_tau_needs_them(gvm, tmp_path):
    """K > 0 on pairs, which do not say who wrote them; K = 0 goes through."""
    rows = [{"prompt": row["instruction"], "chosen": "yes .", "rejected": "no ."} for row in feedback_rows()]
    pairs = {**gvm, "data": write_jsonl(tmp_path / "pairs.jsonl", rows)}
    assert "--k 0" in complaint(train_gvm, **pairs)
    run_stage(train_gvm, **{**pairs, "k": 0, "max_steps": 1})


@pytest.mark.parametrize("stage, name, share", [(sft, "sft", "sft"), (train_gvm, "gvm", "value"),
                                                (train_dvpo, "dvpo", "rl"), (train_rm, "rm", "value"),
                                                (train_ppo, "ppo", "rl")])
@pytest.mark.parametrize("held_out", [False, True])
def test_too_few_prompts_for_a_stage(stage, name, share, held_out, request, flags, tmp_path):
    """No prompt falls into the stage's share of the split: the data is fine, there is too little of it."""
    given = flags.sft if stage is sft else request.getfixturevalue(name)
    shares = {split_of(row["instruction"], 0): row for row in feedback_rows()}
    rows = [row for other, row in shares.items() if other != share and (held_out or other != "test")]
    text = complaint(stage, **{**given, "data": write_jsonl(tmp_path / "few.jsonl", rows)})
    assert "few.jsonl" in text and "too few" in text


def test_rows_longer_than_the_limit(flags):
    """Dropping more than a tenth of the data stops the run and names the limit."""
    assert "--max_length 9" in complaint(sft, **{**flags.sft, "max_length": 9})


# ---- flags ----

@pytest.mark.parametrize("stage", [sft, train_rm, train_gvm, train_dvpo, train_ppo])
def test_an_unknown_flag_is_refused(stage, capsys):
    """A typo does not pass, nor does the beginning of a flag's name."""
    for flag in ("--learning_rate", "--micro"):
        with pytest.raises(SystemExit) as end:
            parse_args(stage.Args, [flag, "1"])
        assert end.value.code == 2 and flag in capsys.readouterr().err


@pytest.mark.parametrize("changes", [{"batch_size": 5, "micro_batch": 2}, {"batch_size": 0},
                                     {"micro_batch": 0}])
def test_a_batch_that_does_not_divide(changes, flags, gvm):
    """Both numbers are in the message."""
    for stage, given in ((sft, flags.sft), (train_gvm, gvm)):
        text = complaint(stage, **{**given, **changes})
        assert (f"--batch_size {changes.get('batch_size', given['batch_size'])}" in text
                and "--micro_batch" in text)


@pytest.mark.parametrize("changes", [{"rollout_batch": 3}, {"rollout_batch": 0}, {"accum_steps": 0},
                                     {"ppo_epochs": 0}])
def test_a_rollout_batch_that_does_not_divide(changes, dvpo):
    """rollout batch = a multiple of micro batch x accumulation."""
    text = complaint(train_dvpo, **{**dvpo, **changes})
    assert "--rollout_batch" in text and "--micro_batch" in text and "--accum_steps" in text


def test_a_ds_config_that_is_not_there_or_no_json(flags, tmp_path):
    """The path is named."""
    (tmp_path / "bad.json").write_text("{")
    for path in ("ds_configs/zero4.json", str(tmp_path / "bad.json")):
        assert f"--ds_config {path}" in complaint(sft, **{**flags.sft, "ds_config": path})


def test_an_output_folder_that_cannot_be_made(flags, gvm, dvpo, tmp_path):
    """A file lies where the folder should be."""
    (tmp_path / "file").write_text("")
    for stage, given in ((sft, flags.sft), (train_gvm, gvm), (train_dvpo, dvpo)):
        for path in (tmp_path / "file", tmp_path / "file" / "below"):
            assert f"--output_dir {path}" in complaint(stage, **{**given, "output_dir": path})


@pytest.mark.parametrize("spec", ["nomodule:values", "json:nofunction", "json"])
def test_a_plug_that_is_not_there(spec, dvpo):
    """--value_fn and --truth_fn are module:function."""
    for flag in ("value_fn", "truth_fn"):
        text = complaint(train_dvpo, **dvpo, **{flag: spec})
        assert f"--{flag} {spec}" in text and "module:function" in text


def test_lengths_beyond_the_models_context(gvm, dvpo):
    """The tiny models read 128 tokens."""
    assert "--max_length 129" in complaint(train_gvm, **{**gvm, "max_length": 129})
    text = complaint(train_dvpo, **{**dvpo, "max_prompt_length": 100, "response_length": 29})
    assert "--max_prompt_length 100" in text and "--response_length 29" in text and "128" in text


@pytest.mark.parametrize("changes", [{"lam": 1.5}, {"gamma": 0.0}, {"k": -1}, {"tau_warmup": 2.0},
                                     {"reward": "model"}])
def test_gvm_settings_out_of_range(changes, gvm):
    """Named in one sentence with what is allowed."""
    assert f"--{next(iter(changes))}" in complaint(train_gvm, **{**gvm, **changes})


@pytest.mark.parametrize("changes", [{"temperature": 0.0}, {"temperature": -1.0}, {"response_length": 0}])
def test_sampling_settings_out_of_range(changes, dvpo):
    """Log-probs are at the sampler's temperature, so RL cannot be greedy; an
    answer has at least one token."""
    assert f"--{next(iter(changes))}" in complaint(train_dvpo, **{**dvpo, **changes})


def test_no_compiler_for_deepspeeds_cpu_library(flags, monkeypatch):
    """Said at once, not by a failing build."""
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert "C++" in complaint(sft, **flags.sft)


# ---- the command line itself ----

def command_line(*words):
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=clean_env(), timeout=120,
                          text=True, capture_output=True)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    return done


def test_the_command_line_ends_without_a_traceback(flags, tmp_path):
    """train_dvpo.py before sft.py: one line on stderr, status 1."""
    done = command_line("train_dvpo.py", "--model", flags.sft["model"], "--ds_config", flags.sft["ds_config"])
    assert done.returncode == 1 and "run `sft.py" in done.stderr.strip().splitlines()[-1]


def test_a_mistyped_flag_ends_in_a_usage_line():
    """Status 2 and the flag's name."""
    done = command_line("train_gvm.py", "--lambda", "0.5")
    assert done.returncode == 2 and "--lambda" in done.stderr.strip().splitlines()[-1]
