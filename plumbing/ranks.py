"""The ranks of a run: joining them, sums over them, and what DeepSpeed needs on a CPU."""

import atexit
import contextlib
import functools
import io
import logging
import os
import random
import re
import shutil
import socket
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from plumbing.errors import BadInput, LOST_RANK


def init_distributed():
    """Join the process group of the `deepspeed` launcher, or make one of a single rank (`python script.py`).

    Returns (rank, world, device). NCCL on GPUs, gloo on the CPU.
    """
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
    quiet()
    if torch.cuda.is_available():
        import deepspeed
        deepspeed.init_distributed(verbose=False)
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        init_on_cpu()
        device = torch.device("cpu")
    sys.excepthook = functools.partial(say_when_another_rank_has_died, sys.excepthook)
    return dist.get_rank(), dist.get_world_size(), device


def quiet():
    """No chatter of the libraries; their warnings stay, but for what is meant to be so."""
    from transformers.utils import logging as transformers_logging
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # A value head is missing from an SFT model by design: no report of it
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # a call inside peft, not ours


def init_on_cpu():
    """The process group on a CPU, and what DeepSpeed and gloo need there."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for others and says so
    if not shutil.which(os.environ.get("CXX", "c++")):
        raise BadInput("DeepSpeed compiles a small communication library at its first use on the CPU and "
                       "needs a C++ compiler: install one (for example `apt-get install g++`) or set CXX to "
                       "its path.")
    # DeepSpeed builds with the first `ninja` on the PATH. Always this environment's own: another version
    # would build the library again at every switch between `deepspeed script.py` and `python script.py`
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    built = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache/torch_extensions")
    locked = [*built.rglob("deepspeed_shm_comm/lock")]
    if os.environ["RANK"] == "0" and (locked or not [*built.rglob("deepspeed_shm_comm.so")]):
        print(f"starting: DeepSpeed compiles for a minute or more; if it hangs here, an earlier run was "
              f"killed meanwhile: delete the file `lock` in {built}", flush=True)
    if not dist.is_initialized():  # once a process
        # A thread of gloo lets go of a collective's tensors a moment after the collective is over, and needs
        # Python for it: where Python is ending by then, the finished run aborts. Destroying the group does
        # not wait for the thread, as DeepSpeed's parameters still hold the group. A sleep lets it through
        atexit.register(time.sleep, 0.5)
    import deepspeed
    with contextlib.redirect_stdout(io.StringIO()):  # it says "built successfully" every time
        deepspeed.init_distributed(verbose=False)
    # DeepSpeed leaves 69 MB of shared memory a rank behind, unless its names go once all ranks have it
    dist.barrier()
    place = f"{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}"
    for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{place}_*"):
        buffer.unlink(missing_ok=True)


def say_when_another_rank_has_died(otherwise, kind, error, trace):
    """One sentence in place of the traceback of a collective that lost its partner."""
    if issubclass(kind, RuntimeError) and LOST_RANK.search(str(error)):
        print(f"rank {dist.get_rank()}: another rank has ended, see above for why; what was saved is kept, "
              f"and the run goes on from there", file=sys.stderr, flush=True)
    else:
        otherwise(kind, error, trace)


def print0(*text):
    """Print on rank 0, above the progress bar where there is one."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        tqdm.write(" ".join(map(str, text)))
        sys.stdout.flush()


def seed_everything(seed):
    """Seed what the libraries draw from (initial weights, dropout).
    Data order and sampling have seeds of their own."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def all_sum(*numbers, device="cpu"):
    """Sum each number over all ranks, in float64; returns a list of floats."""
    total = torch.tensor([float(n) for n in numbers], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def gather_rows(rows):
    """Lists of python objects of all ranks, joined in rank order."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return list(rows)
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, list(rows))
    return [row for part in parts for row in part]


def parents():
    """Process ids whose change means that the launcher has died: of DeepSpeed's helper process, which is the
    parent, and of the `deepspeed` command, which dies alone when it gets a SIGTERM. None without a launcher:
    a run may outlive the shell that started it."""
    parent = os.getppid()
    try:
        if b"deepspeed.launcher.launch" not in Path(f"/proc/{parent}/cmdline").read_bytes():
            return []
        stat = Path(f"/proc/{parent}/stat").read_text()
        return [parent, int(stat.rpartition(")")[2].split()[1])]
    except OSError:  # not Linux, or it has just died
        return []


@contextlib.contextmanager
def whole_weights(engine):
    """The plain module behind an engine, ready to generate. Under ZeRO-3 the weights are
    gathered once: a gather per token and layer would be far slower. DeepSpeed's hooks are put
    back even when generation raises."""
    if (not hasattr(engine, "module") or not hasattr(engine, "optimizer")
            or engine.zero_optimization_stage() < 3):
        yield getattr(engine, "module", engine)
        return
    from deepspeed.runtime.zero import unwrap_model_for_generation
    error = None
    with unwrap_model_for_generation(engine) as unwrapped:
        try:
            yield unwrapped.module
        except BaseException as e:  # raised again below, after DeepSpeed has restored its hooks
            error = e
    if error is not None:
        raise error


def peak_memory_gb(device):
    """Peak memory of this rank in GB: the GPU's allocator, or the process's resident peak on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    try:  # what getrusage says begins at the peak of the process that started this one
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9
    except (OSError, TypeError):  # not Linux
        import resource
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
