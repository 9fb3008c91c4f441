"""The few things that every stage shares: arguments, ranks, models and tokenizers, chat text as token ids,
generation, the TD target (Eq. 1), the batch-normalized advantage (Eq. 2), saving and the log.

What differs between stages (alignment slices, losses, the loop) is written out in each script, on purpose.

Legend for shapes: B rows, P prompt slots (left padded), R response slots (right padded), T = P + R,
V vocabulary.
"""

import atexit
import contextlib
import dataclasses
import fcntl
import functools
import importlib
import inspect
import json
import math
import os
import random
import re
import shutil
import socket
import sys
import time
import warnings
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch.utils.checkpoint import checkpoint
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification,
                          AutoModelForTokenClassification, AutoTokenizer, GenerationConfig, HfArgumentParser,
                          LogitsProcessor, LogitsProcessorList)
from transformers.modeling_outputs import TokenClassifierOutput

from data import BadInput, one_line

# Stored in the tokenizer when a base model brings none, so that every later stage
# and any server render alike.
DEFAULT_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ 'Assistant:\n' + m['content'] + eos_token + '\n' }}{% else %}"
    "{{ m['role'] | capitalize + ':\n' + m['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)


# ---- arguments, ranks, folders -----------------------------------------------------------------------------

def parse_args(cls, argv=None):
    """Command line -> dataclass. The trailing `  # comment` of a field is its --help text.

    With `--model toy` the values of toy/defaults.py replace the defaults of the fields they name; nothing
    else in the project looks at a model's name. Flags typed on the command line win over both.
    """
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(cls), re.M))
    for field in dataclasses.fields(cls):
        field.metadata = {"help": comments.get(field.name, "").replace("%", "%%") or None}
    parser = HfArgumentParser(cls, description=inspect.getmodule(cls).__doc__.split("\n\n")[0],
                              allow_abbrev=False)
    values = parser.parse_args(argv)
    if getattr(values, "model", "") == "toy":
        from toy.defaults import DEFAULTS
        names = {field.name for field in dataclasses.fields(cls)}
        toy = DEFAULTS.get(Path(inspect.getfile(cls)).stem, {})
        parser.set_defaults(**{name: value for name, value in toy.items() if name in names})
        values = parser.parse_args(argv)
    for flag, (low, high) in LIMITS.items():
        value = getattr(values, flag, low)
        if isinstance(value, (int, float)) and not low <= value <= high:  # true of nan, too
            raise BadInput(f"--{flag} {value:g} makes no sense: give a number from {low:g} to {high:g}.")
    return cls(**vars(values))


def command_args(cls, commands, argv, outputs):
    """(command, its arguments) of a script that has several commands; whose help begins "command: " or
    "one, other: " belongs to these. outputs: flags that name a file to write."""
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
    for flag in outputs:  # an unwritable place shows before the expensive work
        try:
            if getattr(args, flag):
                made = not os.path.exists(getattr(args, flag))
                open(getattr(args, flag), "a").close()
                if made:  # a run that ends early leaves no empty file
                    os.remove(getattr(args, flag))
        except OSError as e:
            raise BadInput(f"--{flag}: cannot write {e.filename} ({e.strerror}); name another.") from None
    return argv[0], args


MOST = 1e12
LIMITS = {  # flag: smallest and largest value, in every script that has it
    **dict.fromkeys(("lr", "critic_lr", "warmup_steps", "critic_warmup", "max_grad_norm", "eval_every",
                     "sample_every", "save_every", "eval_pairs", "eval_prompts", "seed", "split_seed", "k",
                     "lora_r", "kl_coef", "kl_target", "early_stop_kl", "temperature"), (0, MOST)),
    "label_smoothing": (0, 0.5),
    **dict.fromkeys(("epochs", "lora_alpha", "max_length", "max_prompt_length", "response_length", "keep",
                     "kl_horizon", "tau_question_tokens", "tau_answer_tokens", "pairs", "prompts", "examples",
                     "reference_rows", "micro_batch"), (1, MOST)),
    **dict.fromkeys(("gamma", "lam", "gae_lam", "tau_warmup", "lora_dropout"), (0, 1)),
    **dict.fromkeys(("cliprange", "cliprange_value", "beta"), (1e-6, MOST)),
    **dict.fromkeys(("missing_eos_penalty", "score_min", "score_max"), (-MOST, MOST)),
    "max_steps": (-1, MOST)}


def init_distributed():
    """Join the process group of the `deepspeed` launcher, or make one of a single
    rank for `python script.py`.

    Returns (rank, world, device). NCCL on GPUs, gloo on the CPU.
    """
    if not torch.cuda.is_available() and not shutil.which(os.environ.get("CXX", "c++")):
        raise BadInput("DeepSpeed compiles a small communication library at its first use on the CPU and "
                       "needs a C++ compiler: install one (for example `apt-get install g++`) or set CXX to "
                       "its path.")
    # DeepSpeed builds with the first `ninja` on the PATH. Always this environment's own: another version
    # would build the library again at every switch between `deepspeed script.py` and `python script.py`
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    import deepspeed
    import logging
    from transformers.utils import logging as transformers_logging
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # A value head is missing from an SFT model by design: no report of it
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # a call inside peft, not ours
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
    if not torch.cuda.is_available() and os.environ["RANK"] == "0":
        print("starting (the first run on a CPU compiles for a minute or more; if it hangs here, an earlier "
              "one was killed meanwhile: delete the file `lock` in the torch_extensions folder)", flush=True)
    if not torch.cuda.is_available() and not dist.is_initialized():  # once a process
        # A thread of gloo lets go of a collective's tensors a moment after the collective is over, and needs
        # Python for it: where Python is ending by then, the finished run aborts. Destroying the group does
        # not wait for the thread, as DeepSpeed's parameters still hold the group. A sleep lets it through
        atexit.register(time.sleep, 0.5)
    deepspeed.init_distributed(verbose=False)
    sys.excepthook = functools.partial(say_when_another_rank_has_died, sys.excepthook)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:  # here DeepSpeed leaves 69 MB of shared memory a rank behind, unless its names go once all have it
        dist.barrier()
        place = f"{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}"
        for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{place}_*"):
            buffer.unlink(missing_ok=True)
    return dist.get_rank(), dist.get_world_size(), device


LOST_RANK = re.compile(r"Connection (closed|reset) by peer")  # what a collective says that lost its partner


def say_when_another_rank_has_died(otherwise, kind, error, trace):
    """One sentence in place of the traceback of a collective that lost its partner."""
    if issubclass(kind, RuntimeError) and LOST_RANK.search(str(error)):
        print(f"rank {dist.get_rank()}: another rank has ended, see above for why; what was saved is kept, "
              f"and the run goes on from there", file=sys.stderr, flush=True)
    else:
        otherwise(kind, error, trace)


def print0(*text):
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(*text, flush=True)


def seed_everything(seed):
    """Seed what the libraries draw from (initial weights, dropout).
    Data order and sampling have seeds of their own."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def keyed_rng(*key):
    """A numpy generator keyed by integers, e.g. (seed, step): the same draw on every
    rank and after a restart."""
    return np.random.default_rng([int(k) for k in key])


def split_batch(batch_size, micro_batch, world):
    """Accumulation steps a, with batch_size = ranks x micro batch x a; BadInput where no integer fits."""
    if min(batch_size, micro_batch) < 1 or batch_size % (micro_batch * world):
        raise BadInput(f"--batch_size {batch_size} must be a positive multiple of ranks x --micro_batch = "
                       f"{world} x {micro_batch}: change one of the two.")
    return batch_size // (micro_batch * world)


def epoch_rows(n, start, count, seed):
    """Rows start..start+count of an endless stream of shuffled epochs over n rows: data order is a function
    of the step alone, so it does not depend on the number of ranks and needs no state to resume."""
    rows = []
    for i in range(start, start + count):
        epoch, place = divmod(i, n)
        if not rows or place == 0:
            order = keyed_rng(seed, epoch).permutation(n)
        rows.append(int(order[place]))
    return rows


LOCKS = {}  # place of a lock file -> the open file; a lock goes with the process, however that ends


def output_folder(args, stage):
    """runs/<model name>/<stage> unless --output_dir says otherwise; made at once, so that an unwritable place
    shows before the expensive work. One process at a time writes there.
    """
    out = Path(args.output_dir or Path("runs") / Path(args.model).name / stage)
    take_lock(out / ".lock", f"--output_dir {out}")
    return out


def take_lock(path, flag):
    """Make the folder of a lock file, and let rank 0 take the lock; BadInput where another process has it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not dist.is_initialized() or dist.get_rank() == 0:
            if path.resolve() not in LOCKS:
                lock = open(path, "w")
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                LOCKS[path.resolve()] = lock
    except BlockingIOError:
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
    try:
        return json.loads((Path(path) / "adapter_config.json").read_text())["base_model_name_or_path"]
    except FileNotFoundError:
        return path
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise BadInput(f"{path}: its adapter_config.json cannot be read ({one_line(repr(e))}); train it "
                       f"again.") from None


def load_plug(spec, flag):
    """`module:function` -> the function. How values (--value_fn) and truth
    (--truth_fn) of your own come in."""
    module, _, function = spec.partition(":")
    sys.path.insert(0, os.getcwd())  # the module may lie where the command is typed
    try:
        found = getattr(importlib.import_module(module), function)
        if not callable(found):
            raise TypeError("it is no function")
        return found
    except Exception as e:  # whatever a foreign module does while it is imported
        raise BadInput(f"{flag} {spec}: {one_line(e)}; expected module:function, for example "
                       f"toy.exact:values.") from None
    finally:
        sys.path.pop(0)


# ---- DeepSpeed ---------------------------------------------------------------------------------------------

def ds_config(path, micro_batch=1, max_grad_norm=1.0):
    """Read a DeepSpeed JSON (precision, ZeRO and offload only) and add what the script knows.

    With `managed_gradient_accumulation` off, engine.backward only adds to the gradients and
    engine.step applies them, as in plain PyTorch. The managed form silently keeps only the last
    backward (ZeRO-1/2) when the counts disagree.
    """
    from deepspeed.runtime.config import DeepSpeedConfig
    try:
        config = json.loads(Path(path).read_text())
        unknown = set(config) - DS_KEYS
        if unknown:  # DeepSpeed passes over a misspelt key without a word
            raise ValueError(f"{', '.join(map(repr, sorted(unknown)))} is not for this file, which has "
                             f"precision, ZeRO and offload")
        config = {**config, "train_micro_batch_size_per_gpu": micro_batch, "gradient_accumulation_steps": 1,
                  "gradient_clipping": 0.0 if is_plain(config) else max_grad_norm,  # plain: see clip_in_step
                  "managed_gradient_accumulation": False, "zero_allow_untested_optimizer": True}
        DeepSpeedConfig(config)
        bf16 = config.get("bf16", {}).get("enabled", False)
        if type(zero_stage(config)) is not int or type(bf16) is not bool:  # DeepSpeed takes "3" and "false"
            raise ValueError("`stage` must be a whole number and bf16's `enabled` true or false, unquoted")
        if "offload_optimizer" in config.get("zero_optimization", {}) and config.get(
                "zero_force_ds_cpu_optimizer", True):
            raise ValueError("offload_optimizer needs zero_force_ds_cpu_optimizer: false, as in "
                             "zero3_offload.json, because the optimizer here is PyTorch's")
    except Exception as e:  # DeepSpeed's check fails in a dozen ways, which all mean: the file is wrong
        raise BadInput(f"--ds_config {path}: {one_line(e)}; choose a JSON file from ds_configs/.") from None
    return config


DS_KEYS = {"bf16", "zero_optimization", "zero_force_ds_cpu_optimizer", "communication_data_type",
           "prescale_gradients", "aio", "comms_logger", "wall_clock_breakdown", "flops_profiler"}


def is_plain(config):
    """Neither ZeRO nor bf16: the optimizer steps on the model's own weights and gradients."""
    return zero_stage(config) == 0 and dtype_of(config) == torch.float32


def clip_in_step(optimizer, config, max_grad_norm):
    """Without ZeRO and bf16 DeepSpeed clips gradients but keeps no norm of them. Here the optimizer itself
    does it at the start of its step, where the gradients of all ranks are averaged already, and leaves the
    norm where engine.get_global_grad_norm() looks for it. Nothing to do in any other case."""
    def clip(optimizer, args, kwargs):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer._global_grad_norm = torch.nn.utils.clip_grad_norm_(parameters,
                                                                     max_grad_norm or float("inf"))

    if is_plain(config):
        optimizer.register_step_pre_hook(clip)


def dtype_of(config):
    return torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32


def zero_stage(config):
    return config.get("zero_optimization", {}).get("stage", 0)


def step_norm(engine):
    """Norm of the gradient of the step just taken, before clipping, 0 before the first step. Ends the run
    where it is not finite: DeepSpeed takes such a step in float32 and leaves it out unsaid in bf16."""
    norm = engine.get_global_grad_norm()
    if norm is None:
        return 0.0
    if not math.isfinite(norm) or not engine.was_step_applied():
        raise BadInput("The gradient is not finite: this step is not saved and the last checkpoint is good; "
                       "lower --lr.")
    return float(norm)


def freeze(model, config, device):
    """A model that is only read: gradients off, dropout off; sharded over the ranks
    when the config says ZeRO-3."""
    model.requires_grad_(False).eval()
    if zero_stage(config) < 3:
        return model.to(device)
    import deepspeed
    keys = ("bf16", "zero_optimization", "train_micro_batch_size_per_gpu")
    frozen = {k: config[k] for k in keys if k in config}
    frozen["zero_optimization"] = {k: v for k, v in frozen["zero_optimization"].items()
                                   if k != "offload_optimizer"}
    engine, *_ = deepspeed.initialize(model=model, config=frozen)
    engine.eval()
    return engine


def set_lr(engine, *lrs):
    """One learning rate for each group of parameters."""
    for group, lr in zip(engine.optimizer.param_groups, lrs, strict=True):
        group["lr"] = lr


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


# ---- models and tokenizers ---------------------------------------------------------------------------------

@contextlib.contextmanager
def loading(path, flag):
    """What fails while a foreign folder or hub id is loaded ends in one sentence."""
    try:
        yield
    except Exception as e:  # any of a dozen classes of four libraries
        text = str(e).lower()
        if Path(path).exists():
            why = one_line(e)
        elif "gated" in text or "401" in text or "403" in text:
            why = "the repository is gated: accept its licence on huggingface.co and run `hf auth login`"
        else:
            why = "no such folder here, and the hub could not be reached or has no such model"
        raise BadInput(f"{flag} {path}: cannot load it ({why}).") from None


def pretrained(cls, path, flag="--model", **kwargs):
    """cls.from_pretrained of a config, a tokenizer or a model. Nothing of a model's own code is run, and no
    pickle is read: weights are safetensors."""
    if cls not in (AutoConfig, AutoTokenizer):
        kwargs["use_safetensors"] = True
    with loading(path, flag):
        return cls.from_pretrained(path, trust_remote_code=False, **kwargs)


def load_weights(cls, path, flag, new_head=False, **kwargs):
    """A model all of whose weights are in its files; with new_head its head may be missing: a random one."""
    model, info = pretrained(cls, path, flag, output_loading_info=True, **kwargs)
    missing = [name for name in info["missing_keys"]
               if not (new_head and re.match(r"(score|classifier)\.", name))]
    if missing:  # transformers would draw them at random
        raise BadInput(f"{flag} {path}: weights are missing from its files ({one_line(missing)}); copy it "
                       f"again or choose another model.")
    return model


def load_tokenizer(path, flag="--model"):
    """Tokenizer with a chat template, an end-of-turn token as EOS and some pad token.

    Pad is EOS where the tokenizer has none (Llama-3): harmless, because every mask here comes from lengths
    and never from comparing ids. EOS becomes the special token that the chat template puts behind an
    assistant turn, which for chat models is not always the tokenizer's own EOS (Gemma's <end_of_turn>): one
    rule for training and stopping.
    """
    tokenizer = pretrained(AutoTokenizer, path, flag)
    if tokenizer.eos_token_id is None:
        raise BadInput(f"{flag} {path}: its tokenizer has no EOS token; set one with tokenizer.eos_token and "
                       f"save it.")
    if isinstance(tokenizer.chat_template, dict):  # several, for tools and the like
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if not tokenizer.chat_template:
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    tail = rendered_end(tokenizer, path, flag)
    with loading(path, flag):
        ids = tokenizer(tail.strip(), add_special_tokens=False).input_ids
    added = tokenizer.added_tokens_decoder
    if ids and ids[0] in added and added[ids[0]].special:
        tokenizer.eos_token = added[ids[0]].content
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def rendered_end(tokenizer, path, flag):
    """What the chat template puts behind an assistant's text; BadInput where it fails or leaves that out."""
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "ANSWER"}]
    try:
        before, answer, tail = tokenizer.apply_chat_template(chat, tokenize=False).rpartition("ANSWER")
        if not answer:
            raise ValueError("the assistant's text is not in what it renders")
    except Exception as e:  # a template is a program of its author's, and can fail in any way
        raise BadInput(f"{flag} {path}: its chat template fails on a user and an assistant turn "
                       f"({one_line(e)}).") from None
    return tail


def check_model(path, tokenizer, flag, tokens=0, asked="", head=False):
    """Refuse, from its config alone, a model that lacks some of the tokenizer's tokens, or whose context is
    shorter than `tokens`, the sum of the flags `asked`. Returns the context, 10**9 where it has no limit.

    head: the model is to have a head for scores or values, and may be an adapter's folder
    """
    if base_of(path) != path and not head:
        raise BadInput(f"{flag} {path}: an adapter, and a policy is a whole model here: merge it into its "
                       f"base (peft's merge_and_unload) and name the result.")
    if base_of(path) != path:
        check_head(path, flag)
    config = pretrained(AutoConfig, base_of(path), flag).get_text_config()
    if (getattr(config, "vocab_size", None) or len(tokenizer)) < len(tokenizer):
        raise BadInput(f"{flag} {path}: the tokenizer has {len(tokenizer)} tokens, the model only "
                       f"{config.vocab_size}: they do not belong together.")
    context = getattr(config, "max_position_embeddings", None) or 10**9
    if tokens > context:
        raise BadInput(f"{asked}: {tokens} tokens are more than the {context} of {flag} {path}'s context: "
                       f"lower it.")
    return context


def load_policy(path, tokenizer, dtype, flag="--model"):
    """Causal LM whose samples and log-probs agree: no dropout, and none of the
    checkpoint's sampling settings."""
    model = load_weights(AutoModelForCausalLM, path, flag, dtype=dtype)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id,
                                               bos_token_id=tokenizer.bos_token_id,
                                               pad_token_id=tokenizer.pad_token_id)
    return with_logprobs(disable_dropout(model))


def with_logprobs(lm):
    """Teach a causal LM's forward a second form, so that no [B, T, V] logits are ever held: at a vocabulary
    of 128 thousand they would be the largest tensor of a step.

    lm(input_ids=, attention_mask=, position_ids=, answers=[B, R] bool, temperature=, chunks=)
    returns (log pi of the last R tokens, entropy), [B, R] float32, 0 where `answers` is False; in place of
            the entropy None while gradients are recorded, because nothing asks for it there

    Logits are made for answer tokens only, in `chunks` parts, float32 inside a part, and made again in the
    backward pass. `chunks` is the caller's: under ZeRO-3 every rank must ask for the head equally often.
    """
    plain, config = lm.forward, lm.config.get_text_config()
    # What Cohere, Granite and Gemma 2 do to their logits
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    cap = getattr(config, "final_logit_softcapping", None)

    def logprobs(hidden, targets, temperature):
        """[N, H], [N] -> [N], [N] or None"""
        logits = lm.get_output_embeddings()(hidden).float() * scale
        logits = cap * torch.tanh(logits / cap) if cap else logits
        logp = torch.log_softmax(logits / temperature, dim=-1)                           # [N, V]
        entropy = None if torch.is_grad_enabled() else -(logp.exp() * logp).sum(-1)
        return logp.gather(-1, targets[:, None])[:, 0], entropy

    @functools.wraps(plain)  # generate() reads the signature
    def forward(*args, answers=None, temperature=1.0, chunks=1, **inputs):
        if answers is None:
            return plain(*args, **inputs)
        R = answers.shape[1]
        hidden = lm.base_model(**inputs).last_hidden_state
        hidden, targets = hidden[:, -R - 1:-1][answers], inputs["input_ids"][:, -R:][answers]   # [N, H], [N]
        parts = zip(hidden.tensor_split(chunks), targets.tensor_split(chunks))
        back_in_rows = lambda x: torch.zeros(answers.shape, device=hidden.device).masked_scatter(
            answers, torch.cat(x))  # N in parts -> [B, R]
        if torch.is_grad_enabled():
            parts = [checkpoint(logprobs, *part, temperature, use_reentrant=False) for part in parts]
            return back_in_rows([logp for logp, _ in parts]), None
        logp, entropy = zip(*[logprobs(*part, temperature) for part in parts])
        return back_in_rows(logp), back_in_rows(entropy)

    lm.forward = forward
    return lm


def load_value_base(path, dtype, flag="--sft_model", lm=None):
    """The backbone of `path` with a new one-label head on every token.

    The head's own dropout defaults to 0.1 in transformers and can only be turned off through the
    config. The head starts small and random: from a zero head LoRA gets no gradient at first, and in
    our trials it never recovered.

    lm: a causal LM of the same weights, whose backbone is taken in place of a second copy
    """
    config = pretrained(AutoConfig, path, flag, num_labels=1)
    config.classifier_dropout = 0.0
    if lm is None:
        return disable_dropout(load_weights(AutoModelForTokenClassification, path, flag, new_head=True,
                                            config=config, dtype=dtype))
    with torch.device("meta"):  # takes no memory
        model = AutoModelForTokenClassification.from_config(config, dtype=dtype)
    value_head(model).to_empty(device=lm.device).reset_parameters()
    setattr(model, model.base_model_prefix, lm.base_model)
    return disable_dropout(model)


def value_head(model):
    """The Linear(h, 1) of a token-classification model: `score` on Llama-like
    models, `classifier` on GPT-2."""
    return model.score if hasattr(model, "score") else model.classifier


def check_head(folder, flag):
    """Refuse an adapter folder whose one-label head was not saved: it would silently be a random one."""
    with loading(folder, flag), safe_open(Path(folder) / "adapter_model.safetensors", "pt") as f:
        if not any(re.search(r"\.(score|classifier)\.weight$", key) for key in f.keys()):
            raise BadInput(f"{flag} {folder}: the head is missing from adapter_model.safetensors; train it "
                           f"again.")


def gvm_settings(folder, flag="--value_model"):
    """gvm.json of a folder that train_gvm.py wrote: base model, K, tau's budget, tokenizer, template."""
    folder = Path(folder)
    try:
        settings = json.loads((folder / "gvm.json").read_text())
        wrong = [name for name, kind in GVM_SETTINGS.items() if not isinstance(settings[name], kind)
                 or (kind is int and settings[name] < (name == "context"))]
        if wrong:
            raise ValueError(f"gvm.json: wrong {', '.join(wrong)}")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise BadInput(f"{flag} {folder}: not a folder that train_gvm.py wrote ({one_line(e)}).") from None
    check_head(folder, flag)
    return settings


GVM_SETTINGS = {  # name in gvm.json: type
    **dict.fromkeys(("k", "tau_question_tokens", "tau_answer_tokens", "max_length", "context", "split_seed"),
                    int),
    **dict.fromkeys(("base_model", "chat_template", "tokenizer_fingerprint"), str), "reward": dict}


def load_gvm(folder, dtype, flag="--value_model", lm=None):
    """Global value model written by train_gvm.py: base + adapter + head, and its settings.
    lm: as in load_value_base."""
    from peft import PeftModel
    settings = gvm_settings(folder, flag)
    base = load_value_base(settings["base_model"], dtype, f"base model of {flag} {folder}:", lm)
    with loading(folder, flag):
        return disable_dropout(PeftModel.from_pretrained(base, folder)), settings


class OneBase(torch.nn.Module):
    """Several models that are LoRA adapters and heads on the same frozen weights, in one copy of these.

    model(role="reference", ...)  no adapter, LM head
    model(role="policy", ...)     its own trained adapter, LM head; only with `lora`
    model(role="gvm", ...)        the GVM's adapter and head; only with `gvm`
    model(role="reward", ...)     a reward model's adapter and head, read at the last position, [B, 1]; only
                                  with `reward`, which takes `lora`. Standardized: (score - center) / scale
    model(role="critic", ...)     the same at every position, [B, T, 1], and trained

    A role stays on until the next one: with gradient checkpointing backward runs its forward pass again.

    lm: causal LM;  gvm: what load_gvm(..., lm=lm) returned;  lora: peft config of a policy that is trained
    reward: (folder of a LoRA reward model on the same weights, center, scale)
    """

    def __init__(self, lm, gvm=None, lora=None, reward=None):
        super().__init__()
        from peft import PeftModel, get_peft_model
        from peft.tuners.lora import LoraLayer
        lm.requires_grad_(False)
        self.adapters, self.heads = lm, torch.nn.ModuleDict()
        if gvm is not None:
            self.adapters, self.lm_head = gvm.requires_grad_(False), lm.get_output_embeddings()
            if lora is not None:  # the base class's way: a token classifier would add a second value head
                PeftModel.add_adapter(gvm, "policy", lora, autocast_adapter_dtype=False)
        elif lora is not None:
            self.adapters = get_peft_model(lm, lora, "policy", autocast_adapter_dtype=False)
        for role in ("reward", "critic") if reward else ():
            folder, center, scale = reward
            self.adapters.load_adapter(folder, role, autocast_adapter_dtype=False)
            self.heads[role] = standardized_head(folder, center, scale, lm)
        # Not registered: its parts are, each on one path, because DeepSpeed hooks a module once a path
        object.__setattr__(self, "lm", lm)
        disable_dropout(lm)  # a reward model's adapter brings the one of its training
        self.config, self.lora = lm.config, [m for m in self.adapters.modules() if isinstance(m, LoraLayer)]
        self.trained = {role: [p for name, p in self.named_parameters() if f".{role}." in name]
                        for role in ("policy", "critic")}
        self.heads.requires_grad_(False)
        self.use("policy" if lora else "reference")

    def use(self, role):
        for layer in self.lora:
            layer.enable_adapters(role != "reference")
            if role != "reference":  # "default" is how peft calls the adapter of a folder
                layer.set_adapter("default" if role == "gvm" else role, inference_mode=True)
        for p in self.trained["policy"] + self.trained["critic"]:
            p.requires_grad_(True)  # peft's switches turn it off

    def forward(self, role="policy", **inputs):
        self.use(role)
        if role not in self.heads:
            return (self.adapters if role == "gvm" else self.lm)(**inputs)
        hidden = self.lm.base_model(**inputs).last_hidden_state
        return TokenClassifierOutput(logits=self.heads[role](hidden[:, -1] if role == "reward" else hidden))

    def generate(self, *args, **kwargs):
        self.use("policy")
        return self.lm.generate(*args, **kwargs)


def standardized_head(folder, center, scale, lm):
    """Linear(h, 1) that gives (score - center) / scale, from the head in a reward model's adapter folder."""
    from safetensors.torch import load_file
    weight, = (w for name, w in load_file(Path(folder) / "adapter_model.safetensors").items()
               if name.endswith("score.weight"))
    head = torch.nn.Linear(weight.shape[1], 1, device=lm.device, dtype=lm.dtype)
    with torch.no_grad():
        head.weight.copy_(weight / scale)
        head.bias.fill_(-center / scale)
    return head


def load_reward_model(folder, dtype, flag="--reward_model"):
    """Any one-label sequence classifier on a causal model (a folder, a peft adapter folder or a hub id).

    returns (model, its own tokenizer, center, scale): reward = (score - center) / scale, as train_rm.py
    recorded in rm.json; any other model keeps its own scale (0, 1). Scores are read by last_token_scores.
    A model without a trained head is refused: transformers would put a random one on it.
    """
    tokenizer = load_tokenizer(folder, flag)
    if (Path(folder) / "adapter_config.json").exists():
        from peft import AutoPeftModelForSequenceClassification
        check_head(folder, flag)
        model = pretrained(AutoPeftModelForSequenceClassification, folder, flag, num_labels=1, dtype=dtype)
    else:
        model, info = pretrained(AutoModelForSequenceClassification, folder, flag, num_labels=1, dtype=dtype,
                                 output_loading_info=True)
        if info["missing_keys"]:
            raise BadInput(f"{flag} {folder}: not a reward model, it has no trained one-label head; train "
                           f"one with train_rm.py or name another.")
    # No id equals -1, so that transformers takes the last position for the last token (see last_token_scores)
    model.config.pad_token_id = -1
    return disable_dropout(model).eval(), tokenizer, *reward_scale(folder, flag)


def reward_scale(folder, flag="--reward_model"):
    """(center, scale) of the scores, as train_rm.py recorded them; (0, 1) for any other model."""
    if not (Path(folder) / "rm.json").exists():
        return 0.0, 1.0
    try:
        settings = json.loads((Path(folder) / "rm.json").read_text())
        center, scale = float(settings["center"]), float(settings["scale"])
        if not (math.isfinite(center) and 0 < scale < math.inf):
            raise ValueError(f"center {center}, scale {scale}")
        return center, scale
    except (ValueError, KeyError, TypeError, OverflowError) as e:
        raise BadInput(f"{flag} {folder}: its rm.json cannot be read ({one_line(repr(e))}); train it "
                       f"again.") from None


def last_token_scores(model, prompts, responses, pad_id, device):
    """Score of each answer, read at its last token; [B] float32.

    Everything is padded on the left, so that this is the last position of every row. What transformers does
    by itself, "the last id that is not pad", is wrong where pad is the EOS.
    """
    batch = collate([p + r for p, r in zip(prompts, responses)], [[]] * len(prompts), pad_id, device)
    return model(input_ids=batch.ids, attention_mask=batch.attention, position_ids=batch.positions,
                 use_cache=False).logits[:, 0].float()


@torch.no_grad()
def reward_scores(model, tokenizer, chats, device, micro_batch):
    """Scores of (prompt messages, answer token ids or text) pairs, one float each, in micro batches.

    They are rendered with the reward model's own tokenizer and template, because its vocabulary need not be
    the policy's. A text is a complete answer: EOS is put behind it.
    """
    scores = []
    for i in range(0, len(chats), micro_batch):
        prompts, answers = zip(*chats[i:i + micro_batch])
        scores += last_token_scores(
            model, [chat_ids(tokenizer, prompt) for prompt in prompts],
            [answer_ids(tokenizer, answer) if isinstance(answer, str) else answer for answer in answers],
            tokenizer.pad_token_id, device).tolist()
    return scores


def disable_dropout(model):
    """Dropout off for good, in train mode too: with it on, ratio 1 and KL 0 at the
    first step would be false."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for name in ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout"):
        if hasattr(model.config, name):
            setattr(model.config, name, 0.0)
    for module in model.modules():
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return model


def lora_targets(model):
    """Names of the linear layers that LoRA adapts: all of them but the heads ("all-linear" would take a
    value head for one of them)."""
    from transformers.pytorch_utils import Conv1D
    heads = {"lm_head", "score", "classifier"}
    names = {name.rpartition(".")[2] for name, m in model.named_modules()
             if isinstance(m, (torch.nn.Linear, Conv1D))}
    return sorted(names - heads)


def tokenizer_fingerprint(tokenizer):
    """Changes when ids change meaning; two models with unequal ones cannot read each other's token ids."""
    import hashlib
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]


# ---- chat text as token ids --------------------------------------------------------------------------------

def chat_ids(tokenizer, messages, tau=()):
    """Token ids of a prompt, up to where the answer starts; tau = (question, answer) pairs put
    in front as earlier turns of the same chat. The template writes BOS itself, so no special
    tokens are added a second time."""
    system = [m for m in messages if m["role"] == "system"]
    turns = [{"role": role, "content": text}
             for pair in tau for role, text in zip(("user", "assistant"), pair)]
    chat = system + turns + [m for m in messages if m["role"] != "system"]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids


def answer_ids(tokenizer, text):
    """Token ids of a complete answer, EOS included. Tokenized apart from the
    prompt, as it will be generated."""
    return tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]


def responses_that_fit(record, tokenizer, max_length):
    """(prompt ids, those of the record's responses that fit into max_length tokens behind it).

    Each response gets its token ids as `response_ids`, so that nothing is tokenized a second time.
    """
    prompt_ids = chat_ids(tokenizer, record["prompt"])
    for response in record["responses"]:
        response["response_ids"] = answer_ids(tokenizer, response["text"])
    return prompt_ids, [response for response in record["responses"]
                        if len(prompt_ids) + len(response["response_ids"]) <= max_length]


def cut_text(tokenizer, text, tokens):
    """The first `tokens` tokens of a text."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return text if len(ids) <= tokens else tokenizer.decode(ids[:tokens], skip_special_tokens=True)


def cut_pair(tokenizer, messages, answer, settings):
    """One (question, answer) pair of tau, each text cut to its own token limit."""
    return (cut_text(tokenizer, messages[-1]["content"], settings["tau_question_tokens"]),
            cut_text(tokenizer, answer, settings["tau_answer_tokens"]))


Batch = namedtuple("Batch", "ids attention positions mask P")


def collate(prompts, responses, pad_id, device="cpu", multiple=1):
    """Lists of token ids -> one padded batch: prompts padded on the left to P slots,
    responses on the right to R; P is a multiple of `multiple`.

    ids, attention, positions: [B, T] long;  mask: [B, R] bool, True on every response token, EOS included.
    """
    P, R = -(-max(map(len, prompts)) // multiple) * multiple, max(map(len, responses))
    ids = torch.full((len(prompts), P + R), pad_id)
    attention = torch.zeros_like(ids)
    for i, (p, r) in enumerate(zip(prompts, responses)):
        ids[i, P - len(p):P + len(r)] = torch.tensor(p + r)
        attention[i, P - len(p):P + len(r)] = 1
    positions = (attention.cumsum(-1) - 1).clamp(min=0)  # left padding must not shift positions
    mask = attention[:, P:].bool()
    return Batch(ids.to(device), attention.to(device), positions.to(device), mask.to(device), P)


def micro_batches(batch, rows, size):
    """Deals rows of a batch into micro batches of `size`, rows of like length together, and cuts off the
    columns in which all of them are padding.

    yields (row numbers, Batch); their number depends on len(rows) alone, as ZeRO-3 needs it
    """
    length = batch.attention.sum(1).tolist()
    rows = sorted(rows, key=lambda i: length[i])
    for i in range(0, len(rows), size):
        part = rows[i:i + size]
        P, R = (int(x[part].any(0).sum()) for x in (batch.attention[:, :batch.P], batch.mask))
        columns = slice(batch.P - P, batch.P + R)
        yield part, Batch(*(x[part, columns] for x in batch[:3]), batch.mask[part, :R], P)


# ---- generation --------------------------------------------------------------------------------------------

class GumbelNoise(LogitsProcessor):
    """Sampling as argmax(logits / temperature + Gumbel noise), the noise of a row
    drawn from the row's own seed.

    The argmax is an exact sample of softmax(logits / temperature), and what a row says does not depend on the
    rows beside it, on the batch's layout or on the number of ranks.
    """

    def __init__(self, seeds, temperature, device):
        self.temperature = temperature
        self.streams = [torch.Generator(device).manual_seed(int(s)) for s in seeds]

    def __call__(self, input_ids, scores):
        noise = torch.stack([torch.empty(scores.shape[1], device=scores.device).exponential_(generator=g)
                             for g in self.streams])
        return scores.float() / self.temperature - noise.log()


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


@torch.no_grad()
def generate(engine, prompts, seeds, max_new_tokens, temperature, tokenizer, device, static_cache=False,
             batch=64):
    """Sample one answer per prompt from softmax(logits / temperature); temperature 0 is greedy.

    prompts: B lists of token ids;  seeds: B integers, one per row
    static_cache: keys and values in tensors of a fixed size, with which transformers compiles the decoding
             step on a GPU; prompts are padded to a multiple of 64, so that few sizes are compiled
    returns  B lists of sampled ids, cut behind the first EOS; an answer without EOS was truncated at
             max_new_tokens
    """
    answers = []
    config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, use_cache=True,
                              cache_implementation="static" if static_cache else None,
                              eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    with whole_weights(engine) as model:
        was_training = model.training
        model.eval()
        for i in range(0, len(prompts), batch):
            rows = collate(prompts[i:i + batch], [[]] * len(prompts[i:i + batch]), tokenizer.pad_token_id,
                           device, 64 if static_cache else 1)
            noise = [GumbelNoise(seeds[i:i + batch], temperature, device)] if temperature > 0 else []
            out = model.generate(rows.ids, attention_mask=rows.attention, generation_config=config,
                                 logits_processor=LogitsProcessorList(noise))
            for row in out[:, rows.P:].tolist():
                end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
                answers.append(row[:end])
        model.train(was_training)
    return answers


# ---- the two equations -------------------------------------------------------------------------------------

def td_targets(q, reward, mask, gamma, lam):
    """TD(lambda) targets of one sentence-level reward (Eq. 1 is lambda = 0).

    G_t = r_t + gamma ((1 - lambda) sg[Q_{t+1}] + lambda G_{t+1}),  r_t = 0 before the last token T
    G_T = r(x, y)
    G_0 = (1 - lambda) sg[Q_1] + lambda G_1:  slot 0 is V(s_1), no token and so no discount lies between
                                              it and Q_1
    q:      [B, 1 + R] slot 0 = V(s_1) at the last prompt token, slot t = Q(tau, s_t, a_t);  reward: [B]
    mask:   [B, R] bool
    returns [B, 1 + R], no gradient, zero where there is no token
    """
    q = q.detach()
    last = mask.long().sum(1)                                    # [B] number of response tokens
    target = torch.zeros_like(q)
    for t in range(q.shape[1] - 1, -1, -1):
        if t + 1 < q.shape[1]:
            ahead = (1 - lam) * q[:, t + 1] + lam * target[:, t + 1]
            target[:, t] = torch.where(t < last, (gamma if t > 0 else 1.0) * ahead, 0.0)
        target[:, t] = torch.where(t == last, reward, target[:, t])
    return target


def td_loss(q, reward, mask, gamma, lam):
    """Sum over the valued slots of (G_t - Q_t)^2, and their number (Eq. 1 with TD(lambda) targets).

    The caller divides by the number of slots of the whole optimizer batch, so that the gradient does not
    depend on how rows are dealt into micro batches and ranks. Shapes as in td_targets.
    """
    slots = torch.cat([mask.any(1, keepdim=True), mask], dim=1)  # [B, 1 + R], the last prompt token's too
    error = (td_targets(q, reward, mask, gamma, lam) - q) * slots
    return error.square().sum(), slots.sum()


def batch_normalize(q, mask, eps=1e-8):
    """Advantage of DVPO: the frozen read-out normalized over the whole batch, all ranks (Eq. 2).

    mu = mean(q[mask]),  sigma^2 = mean((q[mask] - mu)^2), biased as in the paper
    A = (q - mu) / (sigma + eps)
    q: [B, R] float32, units of reward;  mask: [B, R] bool
    returns (A [B, R] unitless and zero where mask is 0,  mu,  sigma)
    """
    q = q.float()
    n, total = all_sum(mask.sum(), (q.double() * mask).sum(), device=q.device)
    mu = total / max(n, 1)
    square, = all_sum((((q.double() - mu) ** 2) * mask).sum(), device=q.device)
    sigma = (square / max(n, 1)) ** 0.5
    return (q - mu) / (sigma + eps) * mask, mu, sigma


# ---- saving ------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def writing(path):
    """What cannot be written (a full disk, a lost mount) ends in one sentence."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as e:  # torch and safetensors have classes of their own
        if LOST_RANK.search(str(e)):
            raise
        raise BadInput(f"{path}: could not be written ({one_line(e)}): make room there; the last complete "
                       f"checkpoint and model are kept, --resume True goes on.") from None


def replace_files(saving, out):
    """Move a finished folder's files over the old ones; a crash while writing leaves the old ones alone. What
    else an earlier model left there goes: an old shard or adapter would be read as part of the new one."""
    new = sorted(Path(saving).iterdir())
    for path in new:
        old = Path(out) / path.name
        if old.is_dir():
            shutil.rmtree(old)
        os.replace(path, old)
    Path(saving).rmdir()
    for pattern in ("*.safetensors", "*.index.json", "adapter_config.json", "gvm.json", "rm.json"):
        for old in Path(out).glob(pattern):
            if old.name not in {path.name for path in new}:
                old.unlink()


def save_model(engine, tokenizer, out, base=None, extra=None):
    """Write what stock transformers (and peft) load, safetensors, from any ZeRO stage. Called by every rank.

    base:  folder or id of the LoRA base: the adapter is merged into a fresh copy of it. None: save as it is.
    extra: {file name: JSON-able}, written beside the weights
    """
    state = engine._zero3_consolidated_16bit_state_dict() if engine.zero_optimization_stage() == 3 else None
    if dist.get_rank() == 0:
        with writing(out):
            module, saving = engine.module, Path(out) / ".saving"
            shutil.rmtree(saving, ignore_errors=True)
            state = {k: v.cpu() for k, v in (state or module.state_dict()).items()}
            if base is not None:  # merged in a fresh copy, because the weights of the run may be sharded
                from peft import PeftModel
                getattr(module, "adapters", module).save_pretrained(
                    saving / "adapter", selected_adapters=["policy"],
                    state_dict={name.removeprefix("adapters."): x for name, x in state.items()})
                model = pretrained(AutoModelForCausalLM, base, dtype=next(iter(state.values())).dtype)
                module = PeftModel.from_pretrained(model, saving / "adapter/policy").merge_and_unload()
                trained = getattr(engine.module, "lm", engine.module)
                module.generation_config, state = trained.generation_config, module.state_dict()
                shutil.rmtree(saving / "adapter")
            if hasattr(module, "peft_config"):
                for adapter in module.peft_config.values():  # a relative path would fail from another folder
                    if Path(adapter.base_model_name_or_path or "").exists():
                        adapter.base_model_name_or_path = str(Path(adapter.base_model_name_or_path).resolve())
            module.save_pretrained(saving, state_dict=state)
            tokenizer.save_pretrained(saving)
            for name, content in (extra or {}).items():
                (saving / name).write_text(json.dumps(content, indent=1))
            replace_files(saving, out)
    dist.barrier()


# ---- the log -----------------------------------------------------------------------------------------------

class MetricLog:
    """metrics.jsonl, one stdout line a step with the fields named in `show`, TensorBoard when it is
    installed."""

    def __init__(self, out, show, steps, start=0):
        """start: the first step of a run that is resumed; rows of later steps are taken out of the file."""
        self.show, self.steps, self.first, self.started = show, steps, start, time.time()
        self.rank0 = not dist.is_initialized() or dist.get_rank() == 0
        if not self.rank0:
            return
        self.path = Path(out) / "metrics.jsonl"
        with writing(self.path):
            for path in (self.path, self.path.with_name("samples.jsonl")):
                keep_steps(path, start)
            self.file = open(self.path, "a")
        try:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(out, purge_step=start)
        except ImportError:
            self.board = None

    def write(self, step, row):
        """row: {metric name: number}. Printed values are rounded, the file keeps them as they are."""
        if not self.rank0:
            return
        with writing(self.path):
            self.file.write(json.dumps({"step": step, **row}) + "\n")
            self.file.flush()
        for name, value in row.items():
            if self.board is not None and value is not None:
                self.board.add_scalar(name, value, step)
        left = (time.time() - self.started) / (step + 1 - self.first) * (self.steps - step - 1)
        bar = "#" * round(10 * (step + 1) / self.steps)
        shown = "  ".join(f"{name.rpartition('/')[2]} {row[name]:.4g}" for name in self.show
                          if row.get(name) is not None)
        print(f"[{bar:<10}] {step + 1}/{self.steps}  {shown}  {left:.0f} s left", flush=True)


def keep_steps(path, start):
    """Take the rows of step `start` and later, and a last line that was cut short, out of a jsonl file."""
    if not path.exists():
        return
    kept = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):  # without what is cut short
        try:
            if json.loads(line)["step"] >= start:
                break
        except (ValueError, KeyError, TypeError):
            if start > 0:
                raise BadInput(f"{path}:{number}: not a row of this run; take the line out, or choose "
                               f"another --output_dir.") from None
            break  # the whole file is replaced
        kept.append(line + b"\n")
    short = path.with_name(f".{path.name}")
    short.write_bytes(b"".join(kept))
    os.replace(short, path)


def due(step, steps, every):
    """Whether what is done every so many steps is due behind this one, also the last; 0 means never."""
    return every > 0 and ((step + 1) % every == 0 or step + 1 == steps)


def check_finite(number, step, what, rows):
    """End the run when a number that all ranks share is not finite, before it reaches the weights.

    rows: what this rank knows about the rows that are to blame, a list of texts
    """
    if not math.isfinite(number):
        raise BadInput(f"Step {step}: {what} is not finite (rows {'; '.join(gather_rows(rows)[:8])}): the "
                       f"weights were not touched and the last checkpoint is good; look at these rows, or "
                       f"lower --lr.")


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
