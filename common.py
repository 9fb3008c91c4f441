"""What the method shares: models and tokenizers, chat text as token ids, generation, the TD loss (Eq. 1) and
the batch-normalized advantage (Eq. 2).

What differs between stages (where values and log-probs are read, losses, the loop) is written out in each
script, on purpose. What a reader of the method never needs is in plumbing/.

Legend for shapes: B rows, P prompt columns (left padded), R response columns (right padded), T = P + R,
V vocabulary. Tokens of a response are counted from t = 1, as in the paper:
    a_t = y_t, in column P + t - 1 of a batch       s_t = prompt and y_1 .. y_(t-1), up to column P + t - 2
    Q_t = Q(tau, s_t, a_t), read in a_t's column    Q_0 = V(s_1), read in column P - 1, the prompt's last
"""

import hashlib
import re
from collections import namedtuple

import numpy as np
import torch
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification,
                          AutoModelForTokenClassification, AutoTokenizer, GenerationConfig, LogitsProcessor,
                          LogitsProcessorList, PretrainedConfig)

from plumbing.checks import (check_model, gvm_settings, load_adapter, load_weights, pretrained, rendered_end,
                             reward_scale, rm_settings)
from plumbing.deepspeed_config import zero_stage
from plumbing.errors import BadInput
from plumbing.folders import base_of
from plumbing.ranks import all_sum, print0, whole_weights
from plumbing.texts import as_sampled, end_answers, end_ids, rendered_ids, text_ids, whole_chat_ids

# Stored in the tokenizer when a base model has none, so that later stages and servers render the same text
DEFAULT_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ 'Assistant:\n' + m['content'] + eos_token + '\n' }}{% else %}"
    "{{ m['role'] | capitalize + ':\n' + m['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)

# What the functions of a run share: its flags, the policy's tokenizer, and this rank's number among `world`
Run = namedtuple("Run", "args tokenizer device rank world")


# ---- models and tokenizers ---------------------------------------------------------------------------------

def load_tokenizer(path, flag="--model", asks=True):
    """Tokenizer with a chat template, an end-of-turn token as EOS and some pad token.

    Pad is EOS where the tokenizer has none (Llama-3): harmless, because every mask here comes from lengths
    and never from comparing ids. EOS becomes the special token that the chat template puts after an assistant
    turn, which is not always the tokenizer's own (Gemma's <end_of_turn>): one rule for training and stopping.
    What else the model stops at ends a sampled answer, too (texts.end_ids).
    asks: False for one that is never asked for an answer, and only reads whole chats
    """
    tokenizer = pretrained(AutoTokenizer, path, flag)
    if tokenizer.eos_token_id is None:
        raise BadInput(f"{flag} {path}: its tokenizer has no EOS token; set one with tokenizer.eos_token and "
                       f"save it.")
    if isinstance(tokenizer.chat_template, dict):  # several, for tools and the like
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if not tokenizer.chat_template:
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    end_answers(tokenizer, rendered_end(tokenizer, path, flag, asks), path, flag)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return as_sampled(tokenizer)


def load_policy(path, tokenizer, dtype, flag="--model"):
    """Causal LM whose samples and log-probs agree: no dropout, none of the checkpoint's sampling settings."""
    model = load_weights(AutoModelForCausalLM, path, flag, dtype=dtype)
    ends = end_ids(tokenizer)
    model.generation_config = GenerationConfig(eos_token_id=ends if len(ends) > 1 else ends[0],
                                               bos_token_id=tokenizer.bos_token_id,
                                               pad_token_id=tokenizer.pad_token_id)
    return disable_dropout(model)


def load_value_base(path, dtype, flag="--sft_model", lm=None):
    """The backbone of `path` with a new one-label head on every token.

    The head's own dropout defaults to 0.1 in transformers and can only be turned off through the config. The
    head starts small and random: from a zero head LoRA gets no gradient at first, and it never recovered.

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
    """The Linear(h, 1) of a token-classification model: `score` of a Llama, `classifier` of a GPT-2."""
    return model.score if hasattr(model, "score") else model.classifier


def load_gvm(folder, dtype, flag="--value_model", lm=None):
    """Global value model written by train_gvm.py: base + adapter + head, and its settings; or a critic of
    train_ppo.py.  lm: as in load_value_base."""
    settings = gvm_settings(folder, flag, critic=True)
    if settings["critic"]:  # all of its weights are its own
        critic = load_weights(AutoModelForTokenClassification, folder, flag, dtype=dtype)
        return disable_dropout(critic), settings
    base = load_value_base(settings["base_model"], dtype, f"base model of {flag} {folder}:", lm)
    return disable_dropout(load_adapter(base, folder, flag)), settings


def load_reward_tokenizer(folder, flag="--reward_model", tokens=0, asked=""):
    """The tokenizer of a reward model, and how that reads (reward_ids): its context [tokens], the date that
    its template was trained with, and if it reads whole chats: no rm.json, and a template of its own."""
    settings = rm_settings(folder, flag)
    tokenizer = load_tokenizer(folder, flag, asks=bool(settings))
    tokenizer.context = check_model(folder, tokenizer, flag, tokens, asked, head=True)
    tokenizer.date = settings.get("date")
    tokenizer.whole_chat = not settings and tokenizer.chat_template != DEFAULT_CHAT_TEMPLATE
    return tokenizer


def load_reward_model(folder, dtype, flag="--reward_model"):
    """Any one-label sequence classifier on a causal model (a folder, a peft adapter folder or a hub id).

    returns (model, its own tokenizer, center, scale): reward = (score - center) / scale, as train_rm.py
    recorded in rm.json; any other model keeps its own scale (0, 1). Scores are read by last_token_scores.
    A model without a trained head is refused: transformers would put a random one on it.
    """
    tokenizer = load_reward_tokenizer(folder, flag)
    base = base_of(folder)
    model = load_weights(AutoModelForSequenceClassification, base,
                         flag if base == folder else f"base model of {flag} {folder}:",
                         new_head=base != folder, num_labels=1, dtype=dtype)
    if base != folder:
        model = load_adapter(model, folder, flag)
    # No id equals -1, so that transformers takes the last position for the last token (see last_token_scores)
    model.config.pad_token_id = -1
    return disable_dropout(model).eval(), tokenizer, *reward_scale(folder, flag)


def disable_dropout(model):
    """All that is random in train mode off: with it, ratio 1 and KL 0 at the first step would be false. What
    the config said is kept for the model's export (plumbing/saving.py)."""
    kept = model.dropout_of_config = getattr(model, "dropout_of_config", [])
    for module in model.modules():
        of_config = getattr(module, "config", None)
        for place in (module, of_config) if isinstance(of_config, PretrainedConfig) else (module,):
            kind = "p$" if isinstance(place, torch.nn.modules.dropout._DropoutNd) else ".*(drop|jitter)"
            for name, value in list(vars(place).items()):
                if isinstance(value, float) and value and re.match(kind, name):
                    kept += [(place, name, value)] if place is of_config else []
                    setattr(place, name, 0.0)
    return model


def freeze(model, config, device):
    """A model that is only read: gradients off, dropout off; sharded over the ranks under ZeRO-3."""
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


def train_only(model, *parts):
    """This alone decides what learns: gradients on for the parameters with one of `parts` in their name (""
    is in every name), off for all others. Says how many, and returns a list of parameters for each part."""
    named = list(model.named_parameters())
    trained = [[p for name, p in named if part in name] for part in parts]
    model.requires_grad_(False)
    for p in sum(trained, []):
        p.requires_grad_(True)
    count = [sum(getattr(p, "ds_numel", p.numel()) for p in group) for group in trained]
    total = sum(getattr(p, "ds_numel", p.numel()) for _, p in named)
    for part, n in zip(parts, count):
        print0(f"trained: {n:,} of {total:,} parameters, " + (f"those named *{part}*" if part else "all"))
    assert all(count) and sum(p.requires_grad for _, p in named) == sum(map(len, trained))
    return trained


def lora_config(model, task, args, **more):
    """LoRA on all linear layers but the heads (peft's "all-linear" would take a value head as one)."""
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D
    names = {name.rpartition(".")[2] for name, m in model.named_modules()
             if isinstance(m, (torch.nn.Linear, Conv1D))}
    return LoraConfig(task_type=task, r=args.lora_r, lora_alpha=args.lora_alpha,
                      target_modules=sorted(names - {"lm_head", "score", "classifier"}), **more)


# ---- chat text as token ids --------------------------------------------------------------------------------

def chat_ids(tokenizer, messages, tau=()):
    """Token ids of a prompt, up to where the answer starts; tau = (question, answer) pairs, put in front as
    earlier turns of the same chat. The template writes BOS itself: no special tokens are added again."""
    system = [m for m in messages if m["role"] == "system"]
    turns = [{"role": role, "content": text}
             for pair in tau for role, text in zip(("user", "assistant"), pair)]
    chat = system + turns + [m for m in messages if m["role"] != "system"]
    return rendered_ids(tokenizer, chat, prompt=True)


def answer_ids(tokenizer, text):
    """Token ids of a complete answer, EOS included. Tokenized apart from the prompt, as it is generated."""
    return text_ids(tokenizer, text) + [tokenizer.eos_token_id]


def cut_text(tokenizer, text, tokens):
    """The first `tokens` tokens of a text."""
    ids = text_ids(tokenizer, text)
    return text if len(ids) <= tokens else tokenizer.decode(ids[:tokens], skip_special_tokens=True)


def cut_pair(tokenizer, messages, answer, settings):
    """One (question, answer) pair of tau, each text cut to its own token limit."""
    return (cut_text(tokenizer, messages[-1]["content"], settings["tau_question_tokens"]),
            cut_text(tokenizer, answer, settings["tau_answer_tokens"]))


Batch = namedtuple("Batch", "ids attention positions mask P")


def collate(prompts, responses, pad_id, device="cpu", multiple=1):
    """Lists of token ids -> one padded batch: prompts padded on the left to P columns, a multiple of
    `multiple`, responses on the right to R.

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
    """Splits rows of a batch into micro batches of `size`, rows of similar length together, and cuts off the
    columns in which all of them are padding: the P of a micro batch may be smaller.

    yields (row numbers, Batch); their number depends on len(rows) alone, as ZeRO-3 needs it
    """
    length = batch.attention.sum(1).tolist()
    rows = sorted(rows, key=lambda i: length[i])
    for i in range(0, len(rows), size):
        part = rows[i:i + size]
        P, R = (int(x[part].any(0).sum()) for x in (batch.attention[:, :batch.P], batch.mask))
        columns = slice(batch.P - P, batch.P + R)
        yield part, Batch(*(x[part, columns] for x in batch[:3]), batch.mask[part, :R], P)


# ---- scores of a reward model ------------------------------------------------------------------------------

def last_token_scores(model, prompts, responses, pad_id, device):
    """Score of each answer, read at its last token; [B] float32.

    Everything is padded on the left, so that this is the last position of every row. What transformers does
    by itself, "the last id that is not pad", is wrong where pad is the EOS.
    """
    batch = collate([p + r for p, r in zip(prompts, responses)], [[]] * len(prompts), pad_id, device)
    return model(input_ids=batch.ids, attention_mask=batch.attention, position_ids=batch.positions,
                 use_cache=False).logits[:, 0].float()


def reward_ids(tokenizer, prompt, answer, text=None):
    """Token ids of a chat as a reward model reads it, up to the one at which its score is read.

    Ours read prompt, answer and EOS, a foreign one its own rendering of the whole chat (whole_chat_ids).
    answer: a text, which is complete; or ids of the reward model's vocabulary, with its EOS where the answer
            ended, and `text`, what they say
    """
    ids = answer_ids(tokenizer, answer) if isinstance(answer, str) else answer
    if not getattr(tokenizer, "whole_chat", False):
        return chat_ids(tokenizer, prompt) + ids
    return whole_chat_ids(tokenizer, prompt, ids, answer if isinstance(answer, str) else text)


@torch.no_grad()
def reward_scores(model, tokenizer, chats, device, micro_batch):
    """Scores of chats, what reward_ids takes of each, one float each, in micro batches."""
    chats, scores = [reward_ids(tokenizer, *chat) for chat in chats], []
    longest, context = max(map(len, chats), default=0), getattr(tokenizer, "context", 10**9)
    if longest > context:
        raise BadInput(f"--reward_model: a prompt and its answer are {longest} of its tokens, more than the "
                       f"{context} of its context: lower the lengths, or name another.")
    for i in range(0, len(chats), micro_batch):
        part = chats[i:i + micro_batch]
        scores += last_token_scores(model, part, [[]] * len(part), tokenizer.pad_token_id, device).tolist()
    return scores


# ---- generation --------------------------------------------------------------------------------------------

def keyed_rng(stream, *key):
    """A numpy generator for one purpose, keyed by its name and by integers or texts, as in ("tau", seed, 3):
    the same on every rank and after a restart. Hashed: numpy itself takes [1] and [1, 0] for one key."""
    key = repr([stream, *(k if isinstance(k, str) else int(k) for k in key)])
    return np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "big"))


def row_seed(seed, *place):
    """A seed for one row's sampling: a function of the run's seed and the row's place in the stream of
    prompts, or whatever else it is named by."""
    return int(keyed_rng("sampling", seed, *place).integers(2**62))


def epoch_rows(n, start, count, seed, shuffle=np.random.Generator.permutation):
    """Rows start..start+count of an endless stream of shuffled epochs over n rows: data order is a function
    of the step alone, so it does not depend on the number of ranks and needs no state to resume.
    shuffle: function (rng, n) -> an order of range(n)"""
    rows = []
    for i in range(start, start + count):
        epoch, place = divmod(i, n)
        if not rows or place == 0:
            order = shuffle(keyed_rng("epoch", seed, epoch), n)
        rows.append(int(order[place]))
    return rows


class GumbelNoise(LogitsProcessor):
    """Exact samples of softmax(logits / temperature), as argmax(logits / temperature + Gumbel noise). A
    row's noise comes from its own seed: what it says does not depend on the rows beside it, on the layout of
    the batch or on the number of ranks."""

    def __init__(self, seeds, temperature, device):
        self.temperature = temperature
        self.streams = [torch.Generator(device).manual_seed(int(s)) for s in seeds]

    def __call__(self, input_ids, scores):
        noise = torch.stack([torch.empty(scores.shape[1], device=scores.device).exponential_(generator=g)
                             for g in self.streams])
        return scores.float() / self.temperature - noise.log()


class FiniteScores(LogitsProcessor):
    """Notes whether a logit was NaN or infinite: argmax takes a token all the same. -inf forbids one."""

    wrong = False

    def __call__(self, input_ids, scores):
        self.wrong = self.wrong | ~(scores < float("inf")).all()
        return scores


@torch.no_grad()
def generate(engine, prompts, seeds, max_new_tokens, temperature, tokenizer, device, static_cache=False,
             batch=64, begin=None):
    """Sample one answer per prompt from softmax(logits / temperature); temperature 0 is greedy.

    prompts: B lists of token ids;  seeds: B integers, one per row
    static_cache: keys and values in tensors of a fixed size, with which transformers compiles the decoding
             step on a GPU; prompts are padded to a multiple of 64, so that few sizes are compiled
    begin:   function (model, Batch) -> what the model goes on from, see plumbing.lean.read_once
    returns  B lists of sampled ids, cut behind the first of end_ids; an answer without one was truncated at
             max_new_tokens
    """
    answers, ends, finite = [], end_ids(tokenizer), FiniteScores()
    config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, use_cache=True,
                              cache_implementation="static" if static_cache else None,
                              eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    with whole_weights(engine) as model:
        was_training = model.training
        model.eval()
        for i in range(0, len(prompts), batch):
            rows = collate(prompts[i:i + batch], [[]] * len(prompts[i:i + batch]), tokenizer.pad_token_id,
                           device, 64 if static_cache else 1)
            noise = [GumbelNoise(seeds[i:i + batch], temperature, device)] if temperature > 0 else []
            out = model.generate(rows.ids, attention_mask=rows.attention, generation_config=config,
                                 logits_processor=LogitsProcessorList([finite, *noise]),
                                 **(begin(model, rows) if begin else {}))
            for row in out[:, rows.P:].tolist():
                end = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
                answers.append(row[:end])
        model.train(was_training)
    if finite.wrong:
        raise BadInput(f"{model.config.name_or_path}: the model does not say finite numbers: its weights, or "
                       f"some of them, are NaN or far too large; name another one, or lower --lr.")
    return answers


# ---- the two equations -------------------------------------------------------------------------------------

def td_targets(q, reward, mask, gamma, lam):
    """TD(lambda) targets of one sentence-level reward (Eq. 1 is lambda = 0).

    G_t = gamma ((1 - lambda) sg[Q_(t+1)] + lambda G_(t+1)) before the last token, whose G is r(x, y)
    G_0 = (1 - lambda) sg[Q_1] + lambda G_1:  no token, and so no discount, lies between V(s_1) and Q_1
    q:      [B, 1 + R], column t is Q_t, column 0 Q_0 = V(s_1);  reward: [B];  mask: [B, R] bool
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
    """Sum over the answers' Q_0 .. Q_n of (G_t - Q_t)^2, and their number (Eq. 1 with TD(lambda) targets).

    The caller divides by the number in the whole optimizer batch, so that the gradient does not depend on how
    rows are distributed over micro batches and ranks. Shapes as in td_targets.
    """
    valued = torch.cat([mask.any(1, keepdim=True), mask], dim=1)  # [B, 1 + R], Q_0 too
    error = (td_targets(q, reward, mask, gamma, lam) - q) * valued
    return error.square().sum(), valued.sum()


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
