"""Exact resume: checkpoints that are whole or not there, and a run that saves when it is told to end.

runs/<model name>/<stage>/checkpoints/step_<n> is what the run needs to go on after n steps as if nothing had
happened: DeepSpeed's own files (weights that are trained, optimizer), and of every rank the random states and
what else its loop carries from step to step. Data order, sampling noise and tau's draws are functions of the
step and need nothing.

A checkpoint is written under another name and renamed when all of it is on the disk, so that a name step_<n>
is a whole one; done.json has the size and checksum of every file, so that one cut short or with a flipped bit
is found when it is read. DeepSpeed's files are pickles: resume only from folders you trust.
"""

import dataclasses
import functools
import hashlib
import inspect
import json
import os
import random
import re
import shutil
import signal
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from plumbing.checks import fingerprint
from plumbing.errors import KEPT, BadInput, one_line, writing
from plumbing.files import read_object, sync, write_whole
from plumbing.log import due
from plumbing.ranks import gather_rows, parents, print0
from plumbing.texts import run_date


# They change no number
MAY_DIFFER = {"resume", "save_every", "keep", "critic_every", "output_dir", "local_rank", "track"}


class Checkpoints:
    """The checkpoints of one run, and its end.

    run = Checkpoints(out, args, data=train, models=[sft])      refuses, before a model is loaded, what it
                                                 cannot go on with
    start, state = run.resume({"policy": engine})         0 and {} where nothing is resumed
    for step in range(start, steps):
        ...
        run.after(step, steps, beta=beta)        saves when due; ends the process when it was told to end
    run.finish()                                 after the model is saved

    data: the rows of training;  models: folders or hub ids of the models that are read. Neither may change
    resume takes {name: DeepSpeed engine}, and writes args.json, what runs here
    """

    def __init__(self, out, args, data, models):
        models = list(filter(None, models))
        for model in models:
            place = Path(model).resolve()
            if Path(out).resolve() in [place, *[place.parent] * place.name.startswith("critic_")]:
                raise BadInput(f"--output_dir {out}: a model that this run reads lies here; choose another "
                               f"folder.")
        if (Path(out) / "config.json").exists() and not (Path(out) / "args.json").exists():
            raise BadInput(f"--output_dir {out}: a model lies here that is of no run of ours (no args.json) "
                           f"and would be replaced; choose another folder.")
        self.folder, self.args = Path(out) / "checkpoints", args
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        flags = {k: v for k, v in dataclasses.asdict(args).items() if k not in MAY_DIFFER}
        self.same = {"script": Path(inspect.getfile(type(args))).name,
                     **{f"--{name}": value for name, value in flags.items()},
                     "number of ranks": self.world,
                     "content of --ds_config": Path(args.ds_config).read_text(),
                     "content of --data": hashlib.sha256(repr(data).encode()).hexdigest()[:16],
                     **{f"content of {model}": fingerprint(model) for model in models}}
        self.same = json.loads(json.dumps(self.same, default=str))
        self.finished = self.folder.parent / "finished.json"
        if os.path.lexists(self.folder) and not (
                self.folder.is_dir() and os.access(self.folder, os.R_OK | os.W_OK | os.X_OK)):
            raise BadInput(f"{self.folder}: no folder that can be read and written, or a link to none: mount "
                           f"its disk, or take it away.")
        self.found = self.find()

    # ---- reading ----

    def find(self):
        """(folder of the checkpoint to go on from, its rank file of this rank), or None to start anew."""
        if self.args.resume and os.path.lexists(self.finished):
            then = read_object(self.finished, f"{self.finished}: cannot be read", "delete it and run without "
                               "--resume, or choose another --output_dir")
            self.check_same(then, self.finished)
            dist.barrier()  # what one rank has refused must not be changed by another
            self.clear()  # left by a run that was killed when it had finished
            print0(f"{self.folder.parent}: this run is finished, nothing is left to do")
            raise SystemExit(0)
        found = self.whole()[::-1]
        if not self.args.resume:
            if found and not self.finished.exists():
                raise BadInput(f"--output_dir {self.folder.parent}: a run that is not finished lies here "
                               f"({found[0].name}): continue it with --resume True, delete {self.folder}, or "
                               f"choose another folder.")
            return None
        for path in found:
            wrong = self.damage(path)
            if not wrong:
                break
            print0(f"warning: {path} is damaged ({wrong}): taking the one before it")
        else:
            print0(f"warning: --resume: no complete checkpoint in {self.folder}: starting from the beginning")
            return None
        read = functools.partial(read_object, wrong=f"{path}: cannot be read", otherwise="delete it")
        written_by = read(path / "done.json")["ranks"]
        mine = read(path / f"rank{self.rank % written_by}.json")
        self.check_same(mine["same"], path)
        return path, mine

    def check_same(self, then, path):
        differ = [f"{name}: {then.get(name)!r} then, {value!r} now"
                  for name, value in self.same.items() if then.get(name) != value]
        if differ:
            raise BadInput(f"--resume: {path} was written by another run ({'; '.join(differ)[:600]}): give "
                           f"the same again, or choose another --output_dir.")

    def whole(self):
        """The complete checkpoints, by step."""
        return sorted(path for path in self.ours() if path.name.startswith("step"))

    def ours(self):
        """What runs have written into the folder of checkpoints."""
        return [path for path in (self.folder.iterdir() if self.folder.is_dir() else ())
                if re.fullmatch(r"step_\d{8}|\.saving_\d+|\.old_step_\d{8}", path.name)]

    def resume(self, engines):
        """(first step to do, what the loop had handed to `after`), weights and random states restored."""
        self.engines = engines
        self.signals, self.launcher = StopSignals(), parents()
        dist.barrier()  # what one rank has refused must not be changed by another
        if self.rank == 0:
            with writing(self.folder.parent):
                if not self.args.resume:  # left by a run that was killed when it had finished
                    self.clear()
                for old in self.folder.parent.glob("critic_*/gvm.json") if self.found is None else ():
                    remove(old.parent)  # of the run whose place this one takes
                self.finished.unlink(missing_ok=True)
                flags = json.dumps({**dataclasses.asdict(self.args), "date": run_date()}, indent=1)
                write_whole(self.folder.parent / "args.json", flags, KEPT)
        if self.found is None:
            return 0, {}
        path, mine = self.found
        for name, engine in self.engines.items():
            engine.load_checkpoint(str(path), tag=name, load_module_strict=False)
        set_random_states(mine["random"])
        print0(f"resumed from {path}")
        return mine["steps_done"], mine["state"]

    def damage(self, path):
        """What is wrong with a checkpoint, "" for nothing; the files are read by all ranks together."""
        def files_of(done):
            if done["checksum"] != checksum_of(done["ranks"], done["files"]):
                raise ValueError("its own checksum is wrong")
            return sorted(done["files"].items())
        try:
            files = read_object(path / "done.json", "done.json cannot be read", "delete it", files_of)
        except BadInput as e:
            return str(e)
        wrong = []
        for name, expected in files[self.rank::self.world]:
            try:
                found = size_and_checksum(path / name)
            except OSError as e:
                found = e.strerror
            if found != expected:
                wrong.append(f"{name}: {found} in place of {expected}")
        return "; ".join(gather_rows(wrong))

    # ---- writing ----

    def after(self, step, steps, **state):
        """To be called by every rank behind every step, with what the loop carries over (JSON-able, of this
        rank). A run that was told to end, or whose launcher has died, saves and ends here."""
        if step + 1 == steps:  # nothing is left but to save the model
            return
        reason = self.signals.name or ("" if parents() == self.launcher else "the death of its launcher")
        reasons = [r for r in gather_rows([reason]) if r]
        if reasons or due(step, steps, self.args.save_every):
            path = self.save(step + 1, state)
        if reasons:
            print0(f"stopped by {reasons[0]} after step {step + 1} of {steps}: saved to {path}; "
                   f"--resume True goes on")
            dist.barrier()
            os._exit(128 + signal.SIGTERM)  # the launcher may be gone, and nothing is left to be done

    def save(self, steps_done, state):
        path, saving = self.folder / f"step_{steps_done:08d}", self.folder / f".saving_{steps_done}"
        with writing(saving):
            if self.rank == 0:
                self.folder.mkdir(exist_ok=True)
                for left in set(self.ours()) - set(self.whole()):  # of a run that was killed while it wrote
                    remove(left)
                saving.mkdir()
            dist.barrier()
            for name, engine in self.engines.items():
                engine.save_checkpoint(str(saving), tag=name, save_latest=False,
                                       exclude_frozen_parameters=True)
            mine = {"steps_done": steps_done, "same": self.same, "state": state, "random": random_states()}
            (saving / f"rank{self.rank}.json").write_text(json.dumps(mine))
            dist.barrier()
            names = sorted(str(file.relative_to(saving)) for file in saving.rglob("*") if file.is_file())
            files = dict(gather_rows([(name, size_and_checksum(saving / name))
                                      for name in names[self.rank::self.world]]))
            if self.rank == 0:
                done = saving / "done.json"
                done.write_text(json.dumps({"ranks": self.world, "files": files,
                                            "checksum": checksum_of(self.world, files)}))
                sync(done, *(folder for folder in saving.rglob("*") if folder.is_dir()), saving)
                for damaged in self.whole():  # resume() went past them
                    if damaged >= path:
                        remove(damaged)
                os.rename(saving, path)
                sync(self.folder)
                for old in self.whole()[:-self.args.keep]:
                    gone = old.rename(self.folder / f".old_{old.name}")  # a name step_<n> is a whole one
                    remove(gone)
        dist.barrier()
        return path

    def finish(self):
        """The run is done and its model saved: its checkpoints are of no more use."""
        dist.barrier()
        if self.rank == 0:
            write_whole(self.finished, json.dumps(self.same, indent=1), KEPT)
        self.clear()
        dist.barrier()  # a rank that ends while another is at work can take it down
        self.signals.restore()

    def clear(self):
        """Remove the checkpoints, and their folder where it is no link to another disk and holds nothing
        else. One that stays is an error: a later run would take it for its own."""
        if self.rank or not self.folder.is_dir():
            return
        try:
            for path in self.ours():
                remove(path)
            if self.ours():
                raise OSError(f"{self.ours()[0].name} is still there")
            if not self.folder.is_symlink() and not any(self.folder.iterdir()):
                self.folder.rmdir()
        except OSError as e:
            raise BadInput(f"{self.folder}: checkpoints of a run that is over cannot be removed "
                           f"({one_line(e)}): do it, as a later run would take them for its own.") from None


def remove(path):
    """A folder with all that is in it; of a link the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def checksum_of(ranks, files):
    """Of what done.json says, so that it vouches for itself, too."""
    return zlib.crc32(json.dumps([ranks, files]).encode())


def size_and_checksum(path):
    """[bytes, crc32] of a file, which is on the disk afterwards, not only in the system's memory."""
    crc = size = 0
    with open(path, "rb") as f:
        while block := f.read(1 << 24):
            crc, size = zlib.crc32(block, crc), size + len(block)
        os.fsync(f.fileno())
    return [size, crc]


def random_states():
    """Of every library that draws on this rank, JSON-able."""
    version, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    states = {"python": [version, list(numbers), gauss], "numpy": [name, keys.tolist(), *rest],
              "torch": torch.get_rng_state().tolist()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state().tolist()
    return states


def set_random_states(states):
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(states["cuda"], dtype=torch.uint8))


class StopSignals:
    """SIGTERM and SIGINT ask for an end at the next safe point; a second one ends the process at once. The
    launcher passes Ctrl-C on as both within 10 ms, so that only one more than 2 seconds later is a second."""

    def __init__(self):
        self.name, self.when = "", 0.0
        self.old = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(self, number, frame):
        if self.name and time.time() - self.when > 2:
            os._exit(128 + number)
        if not self.name:
            self.name, self.when = signal.Signals(number).name, time.time()
            os.write(2, f"{self.name}: will save and end behind this step; once more ends at once\n".encode())

    def restore(self):
        for number, handler in self.old.items():
            signal.signal(number, handler)
