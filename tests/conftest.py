"""What the tests share: a tokenizer without a pad token, two tiny random models, a small data file, one run
of the whole chain sft -> gvm -> dvpo, and one of the baseline rm -> ppo. Everything is made here, in
temporary folders, on the CPU, without a network."""

import hashlib
import json
import os
import random
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1",
                  TOKENIZERS_PARALLELISM="false")

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import sft
import train_dvpo
import train_gvm
import train_ppo
import train_rm
from common import Run
from plumbing import rl
from plumbing.args import parse_args

torch.set_num_threads(1)

FP32 = str(ROOT / "ds_configs" / "fp32.json")
CONTEXT = 128
THINGS = [f"thing{i}" for i in range(12)]
COLOURS = ["red", "blue", "green", "black", "white"]
WORDS = ["<s>", "</s>", "<unk>", "user", "assistant", "system", ":", "?", ".", "is", "it", "not", "yes", "no",
         "indeed", *THINGS, *COLOURS]
TEMPLATE = ("{{ bos_token }}{% for m in messages %}{{ ' ' + m['role'] + ' : ' + m['content'] }}"
            "{% if m['role'] == 'assistant' %}{{ ' ' + eos_token }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ ' assistant :' }}{% endif %}")


def word_tokenizer(words=WORDS, template=TEMPLATE, **special):
    """A token per word, no pad token: load_tokenizer then pads with EOS, as it does for Llama-3."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **special)


def tiny_llama():
    """Random weights, wide enough that every token changes what comes after it."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT, initializer_range=0.3,
        bos_token_id=0, eos_token_id=1))


def tiny_gpt2():
    """Absolute positions and dropout 0.1 by default: what a shifted position or a
    live dropout shows up in."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS), n_embd=32, n_layer=2, n_head=4,
                                      n_positions=CONTEXT, initializer_range=0.3,
                                      bos_token_id=0, eos_token_id=1))


def feedback_rows(prompts=60, seed=0):
    """UltraFeedback's schema: four policies of rising skill answer each prompt, the score
    depends on the text alone."""
    rng, rows = random.Random(seed), []
    questions = [f"is {thing} {colour} ?" for thing in THINGS for colour in COLOURS]
    for question in questions[:prompts]:
        colour = question.split()[2]
        answers = [("no .", 2), ("it is not .", 4), (f"it is {colour} .", 6),
                   (f"yes it is {colour} indeed .", 9)]
        completions = []
        for skill in range(4):
            text, score = answers[min(3, max(0, skill + rng.choice((-1, 0, 0, 1))))]
            completions.append({"model": f"policy{skill}", "response": text, "overall_score": score})
        if len({c["overall_score"] for c in completions}) == 1:
            completions[0].update(response="no .", overall_score=2)
        rows.append({"instruction": question, "completions": completions})
    return rows


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(path, change):
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def copy_of(folder, place):
    return Path(shutil.copytree(folder, place, ignore=lambda _, names: {".lock", "checkpoints"} & set(names)))


def argv_of(words):
    return [str(word) for name, value in words.items()
            for word in (f"--{name}", *(value if isinstance(value, list) else [value]))]


def run_stage(stage, **flags):
    """Run a stage script's main in this process with flags as typed on the command line."""
    stage.main(parse_args(stage.Args, [str(word) for name, value in flags.items()
                                       for word in (f"--{name}", value)]))


def run_of(tokenizer=None, **flags):
    """What the functions of a run share, on one rank without a process group."""
    return Run(SimpleNamespace(**flags), tokenizer, torch.device("cpu"), 0, 1)


def clean_env():
    """The environment for a fresh process: without the process group that this one has joined."""
    return {k: v for k, v in os.environ.items()
            if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_SIZE")}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(words, ranks=1, log=subprocess.PIPE):
    """A run as a process group of its own, under the launcher on several ranks; its output goes into a pipe,
    or into the file `log`."""
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(ranks), "--master_port",
                str(free_port())]
    return subprocess.Popen((launcher if ranks > 1 else [sys.executable]) + list(map(str, words)), cwd=ROOT,
                            env=clean_env(), text=True, start_new_session=True, stderr=subprocess.STDOUT,
                            stdout=log if log is subprocess.PIPE else open(log, "w"))


def fingerprint(model):
    """sha256 over every parameter and buffer of a model."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(name.encode() + tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def room():
    """room(bytes): no file of this process may become larger, as on a disk that is full; room() lifts it. The
    operating system then refuses what torch, safetensors and Python write. (With capsys: what is printed must
    not go to a file.)"""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size=soft: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory):
    """Folder with `llama` and `gpt2`, each a saved float32 model with its tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    for name, model in (("llama", tiny_llama()), ("gpt2", tiny_gpt2())):
        model.save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "feedback.jsonl", feedback_rows())


@pytest.fixture(scope="session")
def flags(models_folder, data):
    """The flags of each stage for a run of seconds; tests change a few of them."""
    common = {"model": models_folder / "llama", "data": data, "ds_config": FP32}
    return SimpleNamespace(
        sft={**common, "max_length": 64, "batch_size": 4, "micro_batch": 2, "epochs": 2, "lr": 1e-3},
        gvm={**common, "max_length": 64, "batch_size": 8, "micro_batch": 4, "max_steps": 4, "lr": 1e-2,
             "k": 2, "tau_question_tokens": 8, "tau_answer_tokens": 8},
        dvpo={**common, "max_prompt_length": 32, "response_length": 6, "rollout_batch": 4, "micro_batch": 2,
              "accum_steps": 1, "ppo_epochs": 2, "max_steps": 3, "lr": 1e-3},
        rm={**common, "max_length": 64, "batch_size": 4, "micro_batch": 2, "max_steps": 6, "lr": 1e-2},
        ppo={**common, "max_prompt_length": 32, "response_length": 6, "rollout_batch": 4, "micro_batch": 2,
             "accum_steps": 1, "ppo_epochs": 2, "max_steps": 3, "lr": 1e-3, "critic_lr": 1e-3},
        remax={**common, "max_prompt_length": 32, "response_length": 6, "rollout_batch": 4, "micro_batch": 2,
               "accum_steps": 1, "max_steps": 3, "lr": 1e-3},
        grpo={**common, "max_prompt_length": 32, "response_length": 6, "rollout_batch": 4, "group_size": 2,
              "micro_batch": 2, "accum_steps": 1, "ppo_epochs": 2, "max_steps": 3, "lr": 1e-3},
        dpo={**common, "max_length": 64, "batch_size": 4, "micro_batch": 2, "max_steps": 6, "lr": 1e-3,
             "beta": 0.5})


def recorded(patch, stage, name, notes):
    """Let stage.name run as it is, and append (arguments, result) of each call to `notes`."""
    original = getattr(stage, name)

    def wrapper(*args, **kwargs):
        result = original(*args, **kwargs)
        notes.append((args, result))
        return result
    patch.setattr(stage, name, wrapper)


def note_frozen(patch, module, notes):
    """Append (model, its fingerprint) to `notes` for each model that `module` freezes."""
    freeze = module.freeze

    def wrapper(*args):
        model = freeze(*args)
        notes.append((model, fingerprint(model)))
        return model
    patch.setattr(module, "freeze", wrapper)


@pytest.fixture(scope="session")
def chain(flags, tmp_path_factory):
    """sft -> gvm (K = 2) -> dvpo (3 steps), run once in this process.

    Has the folders sft, gvm, dvpo; the engines sft_engine, gvm_engine, policy; frozen = [(model, its
    fingerprint when it was frozen)], one model that is GVM and reference; checked = the arguments of DVPO's
    self-check at step 0; scored = what DVPO's score returned there.
    """
    folder, saved, frozen, checks, scores = tmp_path_factory.mktemp("chain"), [], [], [], []
    with pytest.MonkeyPatch.context() as patch:
        for stage in (sft, train_gvm, train_dvpo):
            recorded(patch, stage, "save_model", saved)
        recorded(patch, train_dvpo, "self_check", checks)
        recorded(patch, train_dvpo, "score", scores)
        note_frozen(patch, train_dvpo, frozen)
        run_stage(sft, **flags.sft, output_dir=folder / "sft")
        run_stage(train_gvm, **flags.gvm, sft_model=folder / "sft", output_dir=folder / "gvm")
        run_stage(train_dvpo, **flags.dvpo, sft_model=folder / "sft", value_model=folder / "gvm",
                  output_dir=folder / "dvpo")
    sft_engine, gvm_engine, policy = [args[0] for args, _ in saved]
    return SimpleNamespace(sft=folder / "sft", gvm=folder / "gvm", dvpo=folder / "dvpo",
                           sft_engine=sft_engine, gvm_engine=gvm_engine, policy=policy,
                           frozen=frozen, checked=checks[0][0], scored=scores[0][1])


@pytest.fixture(scope="session")
def baseline(chain, flags, tmp_path_factory):
    """rm -> ppo (3 steps) from the chain's SFT model, run once in this process.

    Has the folders rm and ppo; the engines rm_engine, policy, critic; frozen = [(model, its fingerprint when
    it was frozen)], the reward model first and the reference second; start = the critic's fingerprint before
    training.
    """
    folder, saved, frozen, critics, updates = tmp_path_factory.mktemp("baseline"), [], [], [], []
    with pytest.MonkeyPatch.context() as patch:
        recorded(patch, train_rm, "save_model", saved)
        recorded(patch, train_ppo, "save_model", saved)
        recorded(patch, train_ppo, "update", updates)
        note_frozen(patch, rl, frozen)
        note_frozen(patch, train_ppo, frozen)
        load_critic = train_ppo.load_critic

        def load_and_note(*args):
            critics.append(fingerprint(model := load_critic(*args)))
            return model
        patch.setattr(train_ppo, "load_critic", load_and_note)
        run_stage(train_rm, **flags.rm, sft_model=chain.sft, output_dir=folder / "rm")
        run_stage(train_ppo, **flags.ppo, sft_model=chain.sft, reward_model=folder / "rm",
                  output_dir=folder / "ppo")
    return SimpleNamespace(rm=folder / "rm", ppo=folder / "ppo", rm_engine=saved[0][0][0],
                           policy=saved[1][0][0], critic=updates[0][0][0].critic, frozen=frozen,
                           start=critics[0])
