"""Where a run writes and where it finds what an earlier stage wrote."""

import inspect
import os
from pathlib import Path

import torch.distributed as dist
from filelock import FileLock, Timeout

from plumbing.errors import BadInput
from plumbing.files import read_object
from plumbing.texts import start_date

LOCKS = {}  # place of a lock file -> the lock; it goes with the process, however that ends


def output_folder(args):
    """runs/<model name>/<stage> unless --output_dir says otherwise; the stage is the script's name without
    train_. Made at once, so that an unwritable place shows before the expensive work. One
    process at a time writes there."""
    stage = Path(inspect.getfile(type(args))).stem.removeprefix("train_")
    out = Path(args.output_dir or Path("runs") / Path(args.model).name / stage)
    take_lock(out / ".lock", f"--output_dir {out}")
    start_date(out, args.resume)
    return out


def take_lock(path, flag):
    """Make the folder of a lock file, and let rank 0 take the lock; BadInput where another process has it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not dist.is_initialized() or dist.get_rank() == 0:
            if path.resolve() not in LOCKS:
                lock = FileLock(path, timeout=0)
                lock.acquire()
                LOCKS[path.resolve()] = lock
    except Timeout:
        raise BadInput(f"{flag}: another run is writing there; wait for its end or choose another "
                       f"place.") from None
    except OSError as e:
        raise BadInput(f"{flag}: cannot write there ({e.strerror}); choose another place.") from None


def stage_folder(model, stage, override, flag, command):
    """The folder an earlier stage wrote: `override` if given, else runs/<model name>/<stage>.
    Hub ids pass as they are."""
    if override and not override.startswith((".", "/", "runs/")) and not Path(override).exists():
        return override  # a hub id: from_pretrained finds it or says what is wrong
    folder = Path(override or Path("runs") / Path(model).name / stage)
    if not any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
        raise BadInput(f"No {stage} model in {folder}: run `{command}` first, or name a folder with {flag}.")
    return str(folder)


def model_place(path):
    """How a folder records another model: the absolute path of a folder, a hub id as it is."""
    return str(Path(path).resolve()) if Path(path).exists() else path


def base_of(path):
    """Where the weights are that an adapter's folder builds on; `path` itself when it holds no adapter."""
    config = Path(path) / "adapter_config.json"
    if not os.path.lexists(config):  # a link to nothing is read, and so refused
        return path
    return read_object(config, f"{path}: its adapter_config.json cannot be read", "train it again",
                       lambda settings: os.fspath(settings["base_model_name_or_path"]))
