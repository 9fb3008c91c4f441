"""A run that was killed and goes on is the run that was not: the same metrics, bit for bit the same weights.
And what a fault leaves behind."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

import sft
import train_dpo
import train_dvpo
import train_grpo
import train_gvm
import train_ppo
import train_remax
import train_rm
from conftest import metrics, recorded, run_stage, start
from common import load_tokenizer
from plumbing import checkpoint, log, ranks
from plumbing.errors import BadInput

STAGES = {"sft": sft, "gvm": train_gvm, "dvpo": train_dvpo, "rm": train_rm, "ppo": train_ppo,
          "remax": train_remax, "grpo": train_grpo, "dpo": train_dpo}


class PowerCut(Exception):
    """What no code of ours expects."""


def numbers(folder):
    """Its metrics but for clocks and memory, as text: what must be byte for byte the same."""
    return [json.dumps({name: value for name, value in row.items()
                        if not name.startswith(("timing/", "memory/")) and name != "eps"})
            for row in metrics(folder)]


def weights(folder):
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.safetensors")}


def samples(folder):
    path = Path(folder) / "samples.jsonl"
    return path.read_bytes() if path.exists() else None


def cut_at(monkeypatch, step):
    """The run dies when it writes this step's row: half of the line is on the disk."""
    write = log.MetricLog.write

    def dying(self, at, row):
        if at == step:
            self.file.write('{"step": ')
            self.file.flush()
            raise PowerCut
        write(self, at, row)
    monkeypatch.setattr(log.MetricLog, "write", dying)


def flags_of(name, flags, chain, baseline, **changes):
    extra = {"sft": {"lora_r": 2, "lora_dropout": 0.2}, "gvm": {"lora_dropout": 0.2},
             "rm": {"lora_dropout": 0.2},
             "dvpo": {"value_model": chain.gvm, "sample_every": 2, "kl_horizon": 20},
             "ppo": {"reward_model": baseline.rm, "sample_every": 2, "critic_warmup": 1},
             "remax": {"reward_model": baseline.rm, "sample_every": 2, "kl_horizon": 20},
             "grpo": {"reward_model": baseline.rm, "sample_every": 2, "kl_horizon": 20},
             "dpo": {"eval_every": 2}}[name]
    sft_model = {} if name == "sft" else {"sft_model": chain.sft}
    return {**getattr(flags, name), "max_steps": 6, **sft_model, **extra, "save_every": 2, **changes}


def cut_and_resume(stage, run, folder, monkeypatch, step=3):
    """(folder of the straight run, folder of one that was cut at a step, twice)."""
    run_stage(stage, **run, output_dir=folder / "straight")
    for at in (step, step + 2):
        with monkeypatch.context() as patch, pytest.raises(PowerCut):
            cut_at(patch, at)
            run_stage(stage, **run, output_dir=folder / "cut", resume=True)
    assert len(list((folder / "cut/checkpoints").glob("step_*"))) > 0
    run_stage(stage, **run, output_dir=folder / "cut", resume=True)
    return folder / "straight", folder / "cut"


@pytest.mark.parametrize("name, changes", [
    *((name, {}) for name in STAGES), ("dvpo", {"lora_r": 2}), ("ppo", {"lora_r": 2, "share_base": True}),
    ("remax", {"lora_r": 2}), ("dpo", {"lora_r": 2})])
def test_a_resumed_run_is_the_straight_one(name, changes, flags, chain, baseline, tmp_path, monkeypatch):
    """Weights, optimizer, KL coefficient, tau, dropout: nothing of it starts anew."""
    run = flags_of(name, flags, chain, baseline, **changes)
    straight, cut = cut_and_resume(STAGES[name], run, tmp_path, monkeypatch)
    assert len(numbers(straight)) == 6 and numbers(cut) == numbers(straight)
    assert weights(straight) and weights(cut) == weights(straight) and samples(cut) == samples(straight)
    assert not (cut / "checkpoints").exists()  # a finished run needs none


@pytest.mark.slow
@pytest.mark.parametrize("zero, bf16", [(1, False), (1, True), (2, True), (3, False), (3, True)])
def test_resume_under_every_zero_stage(zero, bf16, flags, chain, baseline, tmp_path, monkeypatch):
    config = {"zero_optimization": {"stage": zero}, **({"bf16": {"enabled": True}} if bf16 else {})}
    (tmp_path / "config.json").write_text(json.dumps(config))
    run = flags_of("dvpo", flags, chain, baseline, ds_config=tmp_path / "config.json", max_steps=4)
    straight, cut = cut_and_resume(train_dvpo, run, tmp_path, monkeypatch, step=1)
    assert numbers(cut) == numbers(straight) and weights(cut) == weights(straight)


# ---- faults ----

@pytest.fixture(scope="module")
def straight(flags, chain, baseline, tmp_path_factory):
    """Folder of the DVPO run that was not cut."""
    folder = tmp_path_factory.mktemp("straight")
    run_stage(train_dvpo, **flags_of("dvpo", flags, chain, baseline), output_dir=folder)
    return folder


@pytest.fixture
def cut_run(flags, chain, baseline, tmp_path, monkeypatch):
    """Flags of a run with checkpoints of steps 2 and 4 that was cut in its sixth step."""
    run = {**flags_of("dvpo", flags, chain, baseline), "output_dir": tmp_path / "cut"}
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        cut_at(patch, 5)
        run_stage(train_dvpo, **run)
    assert [path.name for path in sorted((tmp_path / "cut/checkpoints").iterdir())] == ["step_00000002",
                                                                                        "step_00000004"]
    return run


def damage(path, how):
    if how == "cut short":
        os.truncate(path, path.stat().st_size // 2)
    elif how == "bit-flipped":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["cut short", "bit-flipped", "gone"])
@pytest.mark.parametrize("file", ["policy/*model_states.pt", "rank0.json", "done.json"])
def test_a_damaged_checkpoint_is_passed_over(how, file, cut_run, straight, tmp_path, capsys):
    """The one before it is taken, and the end is the same."""
    path, = (tmp_path / "cut/checkpoints/step_00000004").glob(file)
    damage(path, how)
    if file == "done.json" and how == "bit-flipped":
        path.write_text(path.read_text().replace('"files"', '"filet"'))
    run_stage(train_dvpo, **cut_run, resume=True)
    text = capsys.readouterr().out
    assert "step_00000004 is damaged" in text and "resumed from" in text and "step_00000002" in text
    assert numbers(tmp_path / "cut") == numbers(straight) and weights(tmp_path / "cut") == weights(straight)


def test_a_half_written_checkpoint_is_none(cut_run, tmp_path):
    """Its name tells, and the next save clears it away."""
    half = tmp_path / "cut/checkpoints/.saving_6"
    half.mkdir()
    (half / "rank0.json").write_text("{")
    run_stage(train_dvpo, **cut_run, resume=True)
    assert len(numbers(tmp_path / "cut")) == 6 and not half.exists()


def test_an_unfinished_run_is_not_overwritten(cut_run, tmp_path):
    before = (tmp_path / "cut/metrics.jsonl").read_bytes()
    with pytest.raises(BadInput, match="--resume True"):
        run_stage(train_dvpo, **cut_run)
    assert (tmp_path / "cut/metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("change, named", [({"lr": 5e-4}, "--lr: 0.001 then, 0.0005 now"),
                                           ({"seed": 7}, "--seed"), ({"split_seed": 3}, "--split_seed")])
def test_resume_with_other_flags_says_which(change, named, cut_run):
    with pytest.raises(BadInput, match=named):
        run_stage(train_dvpo, **{**cut_run, **change}, resume=True)


def test_resume_with_another_zero_stage_or_other_data_says_so(cut_run, tmp_path):
    (tmp_path / "zero2.json").write_text('{"zero_optimization": {"stage": 2}}')
    with pytest.raises(BadInput, match="--ds_config"):
        run_stage(train_dvpo, **{**cut_run, "ds_config": tmp_path / "zero2.json"}, resume=True)
    rows = Path(cut_run["data"]).read_text().splitlines(keepends=True)
    changed = Path(cut_run["data"]).with_name("changed.jsonl")
    changed.write_text("".join(rows[:-3]))
    changed.replace(tmp_path / "data.jsonl")
    with pytest.raises(BadInput, match="content of --data"):
        run_stage(train_dvpo, **{**cut_run, "data": tmp_path / "data.jsonl"}, resume=True)


def test_what_is_finished_is_not_done_again(chain, flags, baseline, tmp_path, capsys):
    run = {**flags_of("sft", flags, chain, baseline, max_steps=2), "output_dir": tmp_path / "run"}
    run_stage(sft, **run)
    before = weights(tmp_path / "run")
    with pytest.raises(SystemExit) as end:
        run_stage(sft, **run, resume=True)
    assert end.value.code == 0 and "is finished" in capsys.readouterr().out
    assert weights(tmp_path / "run") == before
    run_stage(sft, **run)  # without --resume it is a new run


def test_nothing_to_resume_from_starts_at_the_beginning_and_says_so(chain, flags, baseline, tmp_path, capsys):
    """So that one command line serves for the first and every later start."""
    run_stage(sft, **flags_of("sft", flags, chain, baseline, max_steps=2), output_dir=tmp_path, resume=True)
    assert "starting from the beginning" in capsys.readouterr().out and len(numbers(tmp_path)) == 2


def test_only_the_latest_are_kept(flags, chain, baseline, tmp_path, monkeypatch):
    run = flags_of("sft", flags, chain, baseline, save_every=1, keep=3)
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        cut_at(patch, 5)
        run_stage(sft, **run, output_dir=tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        f"step_0000000{i}" for i in (3, 4, 5)]


def test_the_last_good_checkpoint_outlives_damaged_ones_that_are_later(flags, chain, baseline, tmp_path,
                                                                       monkeypatch):
    """Rotation counts good ones: of 2, 4 and 6 the last two are damaged; the run goes on from 2 and keeps
    what it saves. A folder of another name is none of its business."""
    run = {**flags_of("sft", flags, chain, baseline, max_steps=7, keep=3), "output_dir": tmp_path}
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        cut_at(patch, 6)
        run_stage(sft, **run)
    folder = tmp_path / "checkpoints"
    for step in (4, 6):
        damage(folder / f"step_0000000{step}/rank0.json", "cut short")
    (folder / "step_backup").mkdir()
    (folder / ".DS_Store").write_text("")
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        cut_at(patch, 4)
        run_stage(sft, **{**run, "keep": 1, "save_every": 1}, resume=True)
    assert sorted(path.name for path in folder.glob("step_*")) == ["step_00000004", "step_backup"]
    run_stage(sft, **run, resume=True)
    assert len(numbers(tmp_path)) == 7


def test_resume_with_another_model_says_so(flags, chain, baseline, tmp_path, monkeypatch):
    """The reference's weights were replaced between two runs: the run is not the one that was begun."""
    shutil.copytree(chain.sft, tmp_path / "sft")
    run = {**flags_of("dvpo", flags, chain, baseline, sft_model=tmp_path / "sft"),
           "output_dir": tmp_path / "out"}
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        cut_at(patch, 4)
        run_stage(train_dvpo, **run)
    tensors = load_file(tmp_path / "sft/model.safetensors")
    save_file({name: 2 * x for name, x in tensors.items()}, tmp_path / "sft/model.safetensors",
              {"format": "pt"})
    with pytest.raises(BadInput, match="content of .*sft"):
        run_stage(train_dvpo, **run, resume=True)


def test_a_refused_run_changes_nothing_of_a_finished_one(flags, chain, baseline, tmp_path):
    """Not its args.json either; and what is finished is finished under its own flags only."""
    run = {**flags_of("sft", flags, chain, baseline, max_steps=2), "output_dir": tmp_path / "out"}
    run_stage(sft, **run)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    with pytest.raises(BadInput, match="--lr: 0.001 then"):
        run_stage(sft, **{**run, "lr": 5e-4}, resume=True)
    with pytest.raises(BadInput, match="script: 'sft.py' then"):
        run_stage(train_rm, **flags.rm, sft_model=chain.sft, output_dir=tmp_path / "out", resume=True)
    shutil.copytree(run["model"], tmp_path / "broken")
    (tmp_path / "broken/model.safetensors").write_bytes(b"")
    with pytest.raises(BadInput, match="cannot load"):
        run_stage(sft, **{**run, "model": tmp_path / "broken"})
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()} == before


def test_a_run_that_was_killed_when_it_had_finished(flags, chain, baseline, tmp_path):
    """Its checkpoints are left, its model is whole: it is finished, and a new run may take the folder."""
    run = {**flags_of("sft", flags, chain, baseline, max_steps=2), "output_dir": tmp_path}
    run_stage(sft, **run)
    (tmp_path / "checkpoints/step_00000001").mkdir(parents=True)
    with pytest.raises(SystemExit) as end:
        run_stage(sft, **run, resume=True)
    assert end.value.code == 0
    run_stage(sft, **run)
    assert not (tmp_path / "checkpoints").exists()


@pytest.fixture
def other_disk(tmp_path):
    """`checkpoints` of the run in tmp_path / "run" is a link to this folder, in which somebody has a file."""
    (tmp_path / "run").mkdir()
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/mine.txt").write_text("keep")
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "disk")
    return tmp_path / "disk"


def contents(folder):
    return sorted(path.name for path in folder.iterdir())


def test_checkpoints_on_another_disk_are_cleared(flags, chain, baseline, other_disk, tmp_path, monkeypatch):
    """The link stays one, and what is not ours stays; a later run that is cut before its first checkpoint
    takes none of an earlier one."""
    run = {**flags_of("sft", flags, chain, baseline), "output_dir": tmp_path / "run"}
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        cut_at(patch, 5)
        run_stage(sft, **run)
    assert contents(other_disk) == ["mine.txt", "step_00000002", "step_00000004"]
    run_stage(sft, **run, resume=True)
    whole = numbers(tmp_path / "run"), weights(tmp_path / "run")
    assert contents(other_disk) == ["mine.txt"] and (tmp_path / "run/checkpoints").is_symlink()
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        cut_at(patch, 1)
        run_stage(sft, **run)
    resumed = []
    recorded(monkeypatch, checkpoint.Checkpoints, "resume", resumed)
    run_stage(sft, **run, resume=True)
    assert resumed[0][1] == (0, {}) and (numbers(tmp_path / "run"), weights(tmp_path / "run")) == whole


def test_a_checkpoint_that_is_a_link_itself(flags, chain, baseline, tmp_path, monkeypatch):
    """Somebody has moved it to another disk: it is read, and at the end its link goes."""
    run = {**flags_of("sft", flags, chain, baseline), "output_dir": tmp_path / "run"}
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        cut_at(patch, 5)
        run_stage(sft, **run)
    for step in (2, 4):
        path = tmp_path / f"run/checkpoints/step_0000000{step}"
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    run_stage(sft, **{**run, "save_every": 1, "keep": 1}, resume=True)
    assert not (tmp_path / "run/checkpoints").exists() and len(numbers(tmp_path / "run")) == 6
    assert (tmp_path / "step_00000004/done.json").exists()


@pytest.mark.parametrize("silent", [False, True])
def test_a_clearing_that_did_not_work_is_an_error(silent, flags, chain, baseline, tmp_path, monkeypatch):
    """At the end, and at the start of the next run, whose --resume would take what was left. The model is
    saved and the run is finished; the clearing is done by the next start."""
    rmtree = shutil.rmtree

    def refusing(path, ignore_errors=False, **options):
        if not str(path).startswith(str(tmp_path / "checkpoints")):
            rmtree(path, ignore_errors, **options)
        elif not silent and not ignore_errors:
            raise OSError(errno.EACCES, "Permission denied")
    run = {**flags_of("sft", flags, chain, baseline, max_steps=3), "output_dir": tmp_path}
    for resume in (False, True, False):
        with monkeypatch.context() as patch, pytest.raises(
                BadInput, match="checkpoints of a run that is over cannot be removed .*: do it"):
            patch.setattr(shutil, "rmtree", refusing)
            run_stage(sft, **run, resume=resume)
        assert weights(tmp_path) and contents(tmp_path / "checkpoints") == ["step_00000002"]
    with pytest.raises(SystemExit) as end:
        run_stage(sft, **run, resume=True)
    assert end.value.code == 0 and not (tmp_path / "checkpoints").exists()


def test_what_a_kill_behind_the_end_has_left_is_cleared(flags, chain, baseline, other_disk, tmp_path,
                                                        monkeypatch):
    """Between finished.json and the clearing. The same command, which has --resume, clears."""
    run = {**flags_of("sft", flags, chain, baseline, max_steps=3), "output_dir": tmp_path / "run"}

    rmtree = shutil.rmtree

    def killed(path, *args, **options):
        if (tmp_path / "run/finished.json").exists():
            raise PowerCut
        rmtree(path, *args, **options)
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(shutil, "rmtree", killed)
        run_stage(sft, **run, resume=True)
    assert (tmp_path / "run/finished.json").exists() and "step_00000002" in contents(other_disk)
    with pytest.raises(SystemExit) as end:
        run_stage(sft, **run, resume=True)
    assert end.value.code == 0 and contents(other_disk) == ["mine.txt"]


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("how", ["a link to nothing", "a file"])
def test_a_disk_for_checkpoints_that_is_not_there(how, resume, flags, chain, baseline, tmp_path):
    """Said before the work, not at the first checkpoint; --resume does not start anew beside it."""
    if how == "a file":
        (tmp_path / "checkpoints").write_text("")
    else:
        (tmp_path / "checkpoints").symlink_to(tmp_path / "not mounted")
    with pytest.raises(BadInput, match="checkpoints: no folder that can be read and written"):
        run_stage(sft, **flags_of("sft", flags, chain, baseline, max_steps=1), output_dir=tmp_path,
                  resume=resume)
    assert contents(tmp_path) == [".lock", "checkpoints"]


@pytest.mark.parametrize("content", [b"[]", b"", b"3", b"[" * 100_000, b'{"a": ' * 100_000, b"\xff", None,
                                     "a folder", "a link to nothing"])
def test_a_damaged_mark_of_the_end(content, flags, chain, baseline, tmp_path):
    """finished.json is read, or refused in one sentence."""
    path = tmp_path / "finished.json"
    if content == "a folder":
        path.mkdir()
    elif content == "a link to nothing":
        path.symlink_to(tmp_path / "gone")
    else:
        path.write_bytes(content or b"{}")
    with pytest.raises(BadInput, match="finished.json: cannot be read .*delete it|by another run") as end:
        run_stage(sft, **flags_of("sft", flags, chain, baseline, max_steps=1), output_dir=tmp_path,
                  resume=True)
    assert "\n" not in str(end.value) and not (tmp_path / "args.json").exists()


def test_nothing_of_an_earlier_model_is_left_in_the_folder(flags, chain, baseline, tmp_path):
    """An adapter's or a shard's file would be read as part of the new model."""
    for name in ("gvm.json", "adapter_config.json", "model-00001-of-00002.safetensors",
                 "model.safetensors.index.json"):
        (tmp_path / name).write_text("{}")
    run_stage(sft, **flags_of("sft", flags, chain, baseline, max_steps=1), output_dir=tmp_path)
    assert {path.name for path in tmp_path.glob("*.safetensors*")} == {"model.safetensors"}
    assert not (tmp_path / "gvm.json").exists() and not (tmp_path / "adapter_config.json").exists()


def test_a_tokenizer_of_several_templates_is_saved_twice(flags, chain, baseline, tmp_path):
    model = shutil.copytree(flags.sft["model"], tmp_path / "model")
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "rag": "{{ messages }}"}
    tokenizer.save_pretrained(model)
    for _ in range(2):
        run_stage(sft, **flags_of("sft", flags, chain, baseline, max_steps=1, model=model),
                  output_dir=tmp_path / "o")
    assert isinstance(load_tokenizer(tmp_path / "o").chat_template, str)


def test_rows_of_the_log_are_lines_not_what_looks_like_one(tmp_path):
    """U+2028 is text. A foreign line in front of what is kept is named; behind a new run's start it goes."""
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps({"step": i, "text": "a\u2028b\u0085"}, ensure_ascii=False) + "\n"
                            for i in range(5)) + '{"step"', encoding="utf-8")
    log.keep_steps(path, 4)
    assert [json.loads(line)["step"] for line in path.read_bytes().split(b"\n")[:-1]] == [0, 1, 2, 3]
    path.write_bytes(b'{"step": 0}\n\xff\n{"step": 1}\n')
    with pytest.raises(BadInput, match="samples.jsonl:2"):
        log.keep_steps(path, 2)
    log.keep_steps(path, 0)
    assert path.read_bytes() == b""


def test_a_reward_model_that_is_not_evaluated_has_its_scale_all_the_same(flags, chain, baseline, tmp_path):
    run = flags_of("rm", flags, chain, baseline, max_steps=2)
    for name, every in (("a", 2), ("b", 0)):
        run_stage(train_rm, **run, eval_every=every, output_dir=tmp_path / name)
    with_, without = (json.loads((tmp_path / name / "rm.json").read_text()) for name in "ab")
    assert (with_["center"], with_["scale"]) == (without["center"], without["scale"])


def test_only_the_launcher_is_watched():
    """A run that was started by hand outlives the shell."""
    assert ranks.parents() == []


@pytest.mark.parametrize("change", [{"keep": 0}, {"save_every": -1}])
def test_impossible_checkpoint_settings(change, chain, flags, baseline, tmp_path):
    with pytest.raises(BadInput, match=f"--{next(iter(change))}"):
        run_stage(sft, **flags_of("sft", flags, chain, baseline, **change), output_dir=tmp_path)


def test_a_full_disk_while_saving_a_checkpoint(flags, chain, baseline, tmp_path, room, straight, monkeypatch):
    """The second checkpoint does not fit: one sentence, the first is good, and with room the run is as if
    nothing had been."""
    run = {**flags_of("dvpo", flags, chain, baseline), "output_dir": tmp_path}
    save = checkpoint.Checkpoints.save

    def full(self, steps_done, state):
        room(20_000 if steps_done == 4 else resource.RLIM_INFINITY)
        return save(self, steps_done, state)
    with monkeypatch.context() as patch, pytest.raises(BadInput, match="could not be written .*make room"):
        patch.setattr(checkpoint.Checkpoints, "save", full)
        run_stage(train_dvpo, **run)
    room()
    assert [path.name for path in (tmp_path / "checkpoints").glob("step_*")] == ["step_00000002"]
    run_stage(train_dvpo, **run, resume=True)
    assert numbers(tmp_path) == numbers(straight) and weights(tmp_path) == weights(straight)


@pytest.mark.parametrize("size, what", [(20_000, "out:"), (500, "metrics.jsonl:")])
def test_a_full_disk_elsewhere(size, what, flags, chain, baseline, tmp_path, room, monkeypatch, capsys):
    """At the final model, and at a row of metrics: the model of an earlier run stays whole, the run goes on
    when there is room. (capsys: what is printed must not go to a file here.)"""
    run = {**flags_of("sft", flags, chain, baseline, save_every=2), "output_dir": tmp_path / "out"}
    run_stage(sft, **run)
    before, write = weights(tmp_path / "out"), log.MetricLog.write

    def full(self, step, row):
        room(size if step == (5 if size == 20_000 else 3) else resource.RLIM_INFINITY)
        write(self, step, row)
    with monkeypatch.context() as patch, pytest.raises(BadInput, match=f"{what} could not be written"):
        patch.setattr(log.MetricLog, "write", full)
        run_stage(sft, **run)
    room()
    assert weights(tmp_path / "out") == before != {}
    run_stage(sft, **run, resume=True)
    assert weights(tmp_path / "out") == before and len(numbers(tmp_path / "out")) == 6


@pytest.mark.parametrize("name, method", [("args.json", "resume"), ("finished.json", "finish")])
def test_a_full_disk_leaves_no_half_of_a_small_file(name, method, flags, chain, baseline, tmp_path, room,
                                                    monkeypatch, capsys):
    """The old one, or none; with room the run goes on."""
    run = {**flags_of("sft", flags, chain, baseline, max_steps=3), "output_dir": tmp_path}
    if name == "args.json":
        run_stage(sft, **run)
    content = lambda: (tmp_path / name).exists() and (tmp_path / name).read_bytes()
    before, original = content(), getattr(checkpoint.Checkpoints, method)

    def full(self, *args):
        room(100)
        return original(self, *args)
    with monkeypatch.context() as patch, pytest.raises(BadInput, match="not be written .*--resume True"):
        patch.setattr(checkpoint.Checkpoints, method, full)
        run_stage(sft, **{**run, "keep": 7})  # another args.json
    room()
    assert content() == before
    run_stage(sft, **run, resume=True)
    assert len(numbers(tmp_path)) == 3 and json.loads((tmp_path / name).read_text())


@pytest.mark.parametrize("name", ["sft", "gvm"])
def test_the_model_is_on_the_disk_before_its_checkpoints_go(name, flags, chain, baseline, tmp_path,
                                                            monkeypatch):
    """And so is the word that it is finished: a power cut loses what is in the system's memory only."""
    fsync, rmtree, done = os.fsync, shutil.rmtree, []

    def noting(file):
        done.append(os.readlink(f"/proc/self/fd/{getattr(file, 'fileno', lambda: file)()}"))
        fsync(file)

    def removing(path, *args, **options):
        if Path(path).parent.name == "checkpoints" or Path(path).name == "checkpoints":
            done.append("cleared")
        rmtree(path, *args, **options)
    run_stage(STAGES[name], **flags_of(name, flags, chain, baseline, max_steps=3), output_dir=tmp_path / "a")
    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(shutil, "rmtree", removing)
    run_stage(STAGES[name], **flags_of(name, flags, chain, baseline, max_steps=3), output_dir=tmp_path / "b")
    assert "cleared" in done
    before = done[:done.index("cleared")]
    model = {path.name for path in (tmp_path / "b").glob("*.*") if path.name not in (
        ".lock", "metrics.jsonl", "args.json", "finished.json") and "tfevents" not in path.name}
    assert len(model) > 4 and model <= {Path(path).name for path in before}
    folder = [i for i, path in enumerate(before) if path == str(tmp_path / "b")]
    files = [i for i, path in enumerate(before) if "/b/.saving/" in path]
    assert max(files) < max(folder) and any("finished.json" in path for path in before)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"),
                                   OSError(errno.EROFS, "Read-only file system")])
def test_a_disk_that_fails_while_saving(error, flags, chain, baseline, tmp_path, monkeypatch):
    import deepspeed
    run = {**flags_of("dvpo", flags, chain, baseline), "output_dir": tmp_path}
    save = deepspeed.DeepSpeedEngine.save_checkpoint

    def full(self, folder, **kwargs):
        if folder.endswith("_4"):
            (Path(folder) / "half").write_text("x")
            raise error
        return save(self, folder, **kwargs)
    with monkeypatch.context() as patch, pytest.raises(
            BadInput, match=f"could not be written .*{error.strerror}"):
        patch.setattr(deepspeed.DeepSpeedEngine, "save_checkpoint", full)
        run_stage(train_dvpo, **run)
    run_stage(train_dvpo, **run, resume=True)
    assert len(numbers(tmp_path)) == 6


def test_a_folder_in_use(chain, flags, baseline, tmp_path):
    """By another process; its lock goes with it."""
    code = (f"import filelock, time; lock = filelock.FileLock({str(tmp_path / '.lock')!r}); "
            f"lock.acquire(); print('locked', flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    other.stdout.readline()
    run = flags_of("sft", flags, chain, baseline, max_steps=1)
    try:
        with pytest.raises(BadInput, match="another run is writing there"):
            run_stage(sft, **run, output_dir=tmp_path)
        assert not (tmp_path / "args.json").exists()
    finally:
        other.kill()
        other.wait()
    run_stage(sft, **run, output_dir=tmp_path)


NAN = {"sft": "batch_loss", "gvm": "td_loss", "rm": "pair_loss", "dvpo": "policy_loss", "ppo": "value_loss"}


@pytest.mark.parametrize("name", list(NAN))
def test_a_loss_that_is_not_finite_stops_before_the_weights(name, flags, chain, baseline, tmp_path,
                                                            monkeypatch):
    """In the first optimizer step behind the checkpoint of step 2: the run names step and rows, no step was
    taken, and goes on when the cause is gone as if nothing had been."""
    stage, function = STAGES[name], NAN[name]
    run = flags_of(name, flags, chain, baseline)
    run_stage(stage, **run, output_dir=tmp_path / "straight")
    loss_of, saved, steps = getattr(stage, function), [], []
    recorded(monkeypatch, checkpoint.Checkpoints, "save", saved)

    def poisoned(*args, **kwargs):
        loss, *rest = loss_of(*args, **kwargs) if name != "rm" else (loss_of(*args, **kwargs),)
        loss = loss * float("nan") if saved else loss
        return (loss, *rest) if name != "rm" else loss
    with monkeypatch.context() as patch, pytest.raises(
            BadInput, match="Step 2: the loss is not finite") as end:
        patch.setattr(stage, function, poisoned)
        counting = register_optimizer_step_pre_hook(lambda *args: steps.append(len(saved)))
        run_stage(stage, **run, output_dir=tmp_path / "bad")
    counting.remove()
    assert "rows" in str(end.value) and "()" not in str(end.value) and "Traceback" not in str(end.value)
    assert steps and not any(steps)  # none behind the checkpoint
    run_stage(stage, **run, output_dir=tmp_path / "bad", resume=True)
    assert numbers(tmp_path / "bad") == numbers(tmp_path / "straight")
    assert weights(tmp_path / "bad") == weights(tmp_path / "straight")


@pytest.mark.parametrize("name, function", [
    ("dvpo", "policy_loss"), pytest.param("ppo", "policy_loss", marks=pytest.mark.slow),
    pytest.param("remax", "reinforce_loss", marks=pytest.mark.slow)])
def test_a_later_optimizer_batch_that_is_not_finite(name, function, flags, chain, baseline, tmp_path,
                                                    monkeypatch):
    """The earlier ones of the step have moved the weights: the sentence does not say otherwise. Nothing of
    the step is saved, and the run goes on from the checkpoint as if nothing had been."""
    stage, run = STAGES[name], flags_of(name, flags, chain, baseline)
    run_stage(stage, **run, output_dir=tmp_path / "straight")
    loss_of, saved, steps = getattr(stage, function), [], []
    recorded(monkeypatch, checkpoint.Checkpoints, "save", saved)

    def poisoned(*args):
        found = loss_of(*args)
        bad = float("nan") if saved and any(steps) else 1.0
        return (found[0] * bad, *found[1:]) if isinstance(found, tuple) else found * bad
    with monkeypatch.context() as patch, pytest.raises(BadInput, match="Step 2: the loss is not fin") as end:
        patch.setattr(stage, function, poisoned)
        counting = register_optimizer_step_pre_hook(lambda *args: steps.append(len(saved)))
        run_stage(stage, **run, output_dir=tmp_path / "bad")
    counting.remove()
    assert any(steps)  # of this step, before the bad one
    assert "not touched" not in str(end.value) and "nothing of this step is saved" in str(end.value)
    run_stage(stage, **run, output_dir=tmp_path / "bad", resume=True)
    assert numbers(tmp_path / "bad") == numbers(tmp_path / "straight")
    assert weights(tmp_path / "bad") == weights(tmp_path / "straight")


@pytest.mark.parametrize("stage, name, function", [(train_dvpo, "dvpo", "gvm_values"),
                                                   (train_ppo, "ppo", "response_values")])
def test_a_value_that_is_not_finite_names_the_prompt(stage, name, function, flags, chain, baseline, tmp_path,
                                                     monkeypatch):
    values_of = getattr(stage, function)

    def poisoned(*args, **kwargs):
        values = values_of(*args, **kwargs)
        values[0, 1] = float("inf")
        return values
    monkeypatch.setattr(stage, function, poisoned)
    with pytest.raises(BadInput, match="Step 0: .* is not finite .*'is thing"):
        run_stage(stage, **flags_of(name, flags, chain, baseline), output_dir=tmp_path)


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_a_gradient_that_is_not_finite_ends_the_run(zero, flags, tmp_path, monkeypatch):
    """The loss is a number, its gradient is not (a square root at 0). The run ends, nothing is written."""
    (tmp_path / "config.json").write_text(json.dumps({"zero_optimization": {"stage": zero}}))
    loss_of = sft.batch_loss

    def poisoned(*args):
        loss, n = loss_of(*args)
        return loss + (0 * loss).sqrt(), n
    monkeypatch.setattr(sft, "batch_loss", poisoned)
    with pytest.raises(BadInput, match="gradient is not finite"):
        run_stage(sft, **{**flags.sft, "ds_config": tmp_path / "config.json"}, output_dir=tmp_path / "out")
    assert not metrics(tmp_path / "out") and not weights(tmp_path / "out")


# ---- signals, with real processes ----

def start_stage(stage, run, ranks=1):
    """A fresh process of a stage."""
    words = [word for name, value in run.items() for word in (f"--{name}", value)]
    return start([f"{stage.__name__}.py", *words], ranks)


def wait_for_steps(folder, steps, process, timeout=400):
    end = time.time() + timeout
    path = folder / "metrics.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < steps:
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.time() < end
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends(number, flags, chain, baseline, tmp_path):
    """With SIGINT and SIGTERM within 10 ms, as the launcher passes Ctrl-C on, too: that is one."""
    run = flags_of("dvpo", flags, chain, baseline, max_steps=12, save_every=0)
    run_stage(train_dvpo, **run, output_dir=tmp_path / "straight")
    process = start_stage(train_dvpo, {**run, "max_steps": 12, "output_dir": tmp_path / "told"})
    wait_for_steps(tmp_path / "told", 1, process)
    process.send_signal(number)
    if number == signal.SIGINT:
        time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in text
    assert f"stopped by {number.name}" in text and "--resume True" in text
    done = len(numbers(tmp_path / "told"))
    assert 1 <= done < 12 and (tmp_path / f"told/checkpoints/step_{done:08d}/done.json").exists()
    run_stage(train_dvpo, **run, output_dir=tmp_path / "told", resume=True)
    assert numbers(tmp_path / "told") == numbers(tmp_path / "straight")
    assert weights(tmp_path / "told") == weights(tmp_path / "straight")


def test_sigkill_in_the_middle_of_a_save(flags, chain, baseline, tmp_path):
    """Nothing of ours runs any more. tests/kill_runs.py is the long form."""
    run = flags_of("dvpo", flags, chain, baseline, max_steps=40, save_every=1)
    run_stage(train_dvpo, **{**run, "save_every": 0}, output_dir=tmp_path / "straight")
    process = start_stage(train_dvpo, {**run, "output_dir": tmp_path / "killed"})
    wait_for_steps(tmp_path / "killed", 3, process)
    while process.poll() is None and not any((tmp_path / "killed/checkpoints").glob(".saving*")):
        pass
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and len(numbers(tmp_path / "killed")) < 40
    run_stage(train_dvpo, **run, output_dir=tmp_path / "killed", resume=True)
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "straight")
    assert weights(tmp_path / "killed") == weights(tmp_path / "straight")


def test_a_second_signal_ends_at_once(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    signals = checkpoint.StopSignals()
    try:
        signals.note(signal.SIGINT, None)
        signals.note(signal.SIGTERM, None)
        assert signals.name == "SIGINT" and not ended
        signals.when -= 2.1
        signals.note(signal.SIGTERM, None)
        assert ended == [128 + signal.SIGTERM]
    finally:
        signals.restore()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_ranks_end_when_their_launcher_alone_is_killed(number, flags, chain, baseline, tmp_path):
    """Two ranks under ZeRO-3; they save what they have."""
    run = {**flags_of("dvpo", flags, chain, baseline, max_steps=500, save_every=0),
           "ds_config": "ds_configs/zero3.json", "output_dir": tmp_path}
    process = start_stage(train_dvpo, run, ranks=2)
    wait_for_steps(tmp_path, 2, process)
    process.send_signal(number)
    text, _ = process.communicate(timeout=90)  # the ranks hold its output open until they end
    assert "stopped by the death of its launcher" in text
    done = len(numbers(tmp_path))
    assert done < 500 and (tmp_path / f"checkpoints/step_{done:08d}/done.json").exists()
    with pytest.raises(BadInput, match="number of ranks: 2 then, 1 now"):
        run_stage(train_dvpo, **run, resume=True)


@pytest.mark.slow
def test_the_others_end_when_a_rank_dies(flags, chain, baseline, tmp_path):
    """Within seconds, with a sentence and no traceback, and leave a checkpoint to go on from."""
    import psutil  # DeepSpeed brings it
    run = {**flags_of("dvpo", flags, chain, baseline, max_steps=500, save_every=1), "output_dir": tmp_path}
    process = start_stage(train_dvpo, run, ranks=2)
    wait_for_steps(tmp_path, 3, process)
    rank, = {child for child in psutil.Process(process.pid).children(recursive=True)
             if "--local_rank=1" in child.cmdline()}
    rank.kill()
    text, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "another rank has ended" in text and "Traceback" not in text
    assert list((tmp_path / "checkpoints").glob("step_*/done.json"))
