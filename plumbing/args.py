"""Command line -> dataclass, the ranges of its values, and functions of your own by name."""

import dataclasses
import inspect
import math
import os
import pkgutil
import re
import sys
from pathlib import Path

from transformers import HfArgumentParser

from plumbing.errors import MADE_BY, BadInput, one_line
from plumbing.files import check_place
from plumbing.kept import check_ours


ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass
class RunArgs:
    """The flags of every trainer that have nothing to do with its method."""
    ds_config: str = "ds_configs/zero3.json"  # DeepSpeed JSON: precision, ZeRO stage, offload
    output_dir: str = ""  # where to write, default runs/<model name>/<name of the script without train_>
    resume: bool = False  # continue from the last complete checkpoint of the output folder, if there is one
    save_every: int = 100  # write a checkpoint this often [steps]; 0: only when the run is told to end
    keep: int = 2  # how many checkpoints to keep
    track: bool = False  # log to Weights & Biases, too
    local_rank: int = -1  # set by the deepspeed launcher


def parse_args(cls, argv=None):
    """Command line -> dataclass. The trailing `  # comment` of a field is its --help text.

    Where --model is a folder of this repository that has a defaults.py, its values replace the defaults of
    the fields they name. Flags typed on the command line win over both.
    """
    sources = "".join(inspect.getsource(one) for one in cls.__mro__[:-1])
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", sources, re.M))
    for field in dataclasses.fields(cls):
        field.metadata = {"help": comments.get(field.name, "").replace("%", "%%") or None}
    parser = HfArgumentParser(cls, description=inspect.getmodule(cls).__doc__.split("\n\n")[0],
                              allow_abbrev=False)
    values = parser.parse_args(argv)
    check_names(values)
    world = getattr(values, "model", "")
    if re.fullmatch(r"\w+", world) and (ROOT / world / "defaults.py").exists():
        names = {field.name for field in dataclasses.fields(cls)}
        defaults = pkgutil.resolve_name(f"{world}.defaults:DEFAULTS").get(Path(inspect.getfile(cls)).stem, {})
        parser.set_defaults(**{name: value for name, value in defaults.items() if name in names})
        values = parser.parse_args(argv)
        MADE_BY.update([pkgutil.resolve_name(f"{world}.defaults:MADE")])
    for flag, (low, high) in LIMITS.items():
        value = getattr(values, flag, low)
        if isinstance(value, (int, float)) and not low <= value <= high:  # true of nan, too
            raise BadInput(f"--{flag} {value:g} makes no sense: give a number from {low:g} to {high:g}.")
    return cls(**vars(values))


TEXTS = {"question", "responses", "title", "judge_url"}  # flags that may be long; the others name something


def check_names(values):
    """Refuse what no file can be called: it would end the run when it is written, or before that."""
    for flag, value in vars(values).items():
        for word in filter(None, value if isinstance(value, list) else [value]):
            if isinstance(word, str) and re.search("[\\0\ud800-\udfff]", word):
                raise BadInput(f"--{flag} {ascii(word[:60])}: not UTF-8; give it another name.")
            if isinstance(word, str) and flag not in TEXTS and (
                    len(word) > 4000 or max(len(part.encode()) for part in re.split("[/=]", word)) > 255):
                raise BadInput(f"--{flag} {word[:60]!r}...: {len(word)} letters are too long for a name.")


def command_args(cls, commands, argv, outputs):
    """(command, its arguments) of a script that has several commands; whose help begins "command: " or
    "one, other: " belongs to these. outputs: {flag that names a file to write: how an earlier one begins}"""
    argv = sys.argv[1:] if argv is None else argv
    argv = [word for word in argv if not re.match("--local[-_]rank=", word)]  # the launcher puts it in front
    script = Path(inspect.getfile(cls)).name
    if not argv or argv[0] not in commands:
        raise BadInput(f"usage: {script} {'|'.join(commands)} [flags]; "
                       f"`{script} {next(iter(commands))} --help` has all.")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise BadInput(f"{script} works on one rank: start it with python, or with deepspeed --num_gpus 1.")
    args = parse_args(cls, argv[1:])
    typed = {word.partition("=")[0].replace("-", "_") for word in argv}
    for flag in dataclasses.fields(cls):  # one of another command would silently do nothing
        owners = set(flag.metadata["help"].partition(":")[0].split(", "))
        if owners & set(commands) and argv[0] not in owners and f"__{flag.name}" in typed:
            raise BadInput(f"--{flag.name} is a flag of `{script} {' and '.join(sorted(owners))}`, not of "
                           f"{argv[0]}.")
    for flag, begins in dict(outputs).items():
        if getattr(args, flag):
            check_ours(f"--{flag}", getattr(args, flag), begins)
            check_place(getattr(args, flag), f"--{flag}")
    return argv[0], args


MOST = 1e12
LIMITS = {  # flag: smallest and largest value, in every script that has it
    **dict.fromkeys(("lr", "critic_lr", "warmup_steps", "critic_warmup", "critic_every", "max_grad_norm",
                     "eval_every", "sample_every", "save_every", "eval_pairs", "eval_prompts", "seed",
                     "split_seed", "kl_coef", "kl_target", "early_stop_kl", "temperature"), (0, MOST)),
    "label_smoothing": (0, 0.5),
    **dict.fromkeys(("epochs", "lora_alpha", "max_length", "max_prompt_length", "response_length", "keep",
                     "kl_horizon", "tau_question_tokens", "tau_answer_tokens", "pairs", "prompts", "examples",
                     "reference_rows", "micro_batch"), (1, MOST)),
    **dict.fromkeys(("gamma", "lam", "gae_lam", "tau_warmup", "lora_dropout"), (0, 1)),
    **dict.fromkeys(("cliprange", "cliprange_value", "beta"), (1e-6, MOST)),
    **dict.fromkeys(("missing_eos_penalty", "score_min", "score_max"), (-MOST, MOST)),
    **dict.fromkeys(("batch_size", "rollout_batch", "accum_steps", "ppo_epochs"), (0, 1e6)),
    "max_steps": (-1, MOST), "continuations": (2, MOST), "k": (0, 1000), "lora_r": (0, 10_000),
    "parallel": (1, 1000), "retries": (0, 100), "timeout": (0.01, 1e6), "judge_tokens": (1, 1e6)}


def split_words(flag, specs):
    """[[name, path]] of name=path words."""
    for spec in specs:
        if not re.fullmatch("[^=]+=.+", spec):
            raise BadInput(f"{flag} {spec}: expected name=path, as in dvpo=runs/toy/dvpo.")
    return [spec.split("=", 1) for spec in specs]


def load_numbers(spec, flag):
    """load_plug of a function that gives a number for each row; BadInput where it gives anything else."""
    plug = load_plug(spec, flag)

    def numbers(rows, *more):
        found = numbers_of(plug(rows, *more))
        if len(found) != len(rows):
            raise BadInput(f"{flag} {spec}: returned {len(found)} rewards for {len(rows)} rows: it must "
                           f"return one finite number for each.")
        return found
    return numbers


def numbers_of(found):
    """The finite numbers among what a function of your own returned."""
    try:
        return [x for x in (float(x) for x in found if not isinstance(x, (str, bytes))) if math.isfinite(x)]
    except (TypeError, ValueError, OverflowError):
        return []


def load_plug(spec, flag):
    """`module:function` -> the function: how values, rewards or a truth of your own come in."""
    sys.path.insert(0, os.getcwd())  # the module may lie where the command is typed
    try:
        found = pkgutil.resolve_name(spec)
        if not callable(found):
            raise TypeError("it is no function")
        return found
    except Exception as e:  # whatever a foreign module does while it is imported
        raise BadInput(f"{flag} {spec}: {one_line(e)}; expected module:function.") from None
    finally:
        sys.path.pop(0)
