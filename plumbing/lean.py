"""The same numbers with less memory: log-probs without [B, T, V] logits, several models on one copy of the
weights, and a prefix of all rows that is read once. tests/test_lean.py holds each to its plain form.
"""

import copy
import functools
import inspect
import os
import weakref
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, LlamaModel
from transformers.modeling_outputs import TokenClassifierOutput

from common import collate, disable_dropout, load_policy, lora_config, train_only
from plumbing.checks import reward_scale
from plumbing.deepspeed_config import adamw, dtype_of
from plumbing.errors import BadInput, one_line
from plumbing.ranks import all_sum, gather_rows, print0
from plumbing.rl import load_reward

# What models call the keys and values that they are given; transformers 5.24 renamed it
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"


def response_logprobs(lm, states, actions, mask, temperature, chunks, **inputs):
    """log pi(a_t | s_t) of response tokens, and the entropy of pi(. | s_t). By definition:

        logits  = lm(**inputs).logits[:, states].float() / temperature                  [B, R, V]
        logp    = log_softmax(logits, -1)                                               [B, R, V]
        returns   gather(logp, actions) * mask,  -sum(exp(logp) * logp) * mask          [B, R] float32 each

    states: slice of the R columns whose hidden states predict the actions;  actions, mask: [B, R]
    The entropy is None while gradients are recorded: nothing asks for it there.

    Here logits are computed for response tokens only, in `chunks` parts, and recomputed in the backward pass:
    with a vocabulary of 128 thousand, all logits together would be the largest tensor of a step. The caller
    chooses `chunks`, because under ZeRO-3 every rank must gather the LM head equally often.
    """
    config = lm.config.get_text_config()
    # What Cohere, Granite and Gemma 2 do to their logits
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    cap = getattr(config, "final_logit_softcapping", None)

    def logprobs(hidden, actions):
        """[N, H], [N] -> [N], [N] or None"""
        logits = lm.get_output_embeddings()(hidden).float() * scale
        logits = cap * torch.tanh(logits / cap) if cap else logits
        logp = torch.log_softmax(logits / temperature, dim=-1)                           # [N, V]
        entropy = None if torch.is_grad_enabled() else -(logp.exp() * logp).sum(-1)
        return logp.gather(-1, actions[:, None])[:, 0], entropy

    def in_rows(parts):
        """N numbers in parts -> [B, R]"""
        return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, torch.cat(parts))

    hidden = lm.base_model(**inputs).last_hidden_state[:, states][mask]                  # [N, H]
    parts = zip(hidden.tensor_split(chunks), actions[mask].tensor_split(chunks))
    if torch.is_grad_enabled():
        return in_rows([checkpoint(logprobs, *part, use_reentrant=False)[0] for part in parts]), None
    logp, entropy = zip(*[logprobs(*part) for part in parts])
    return in_rows(logp), in_rows(entropy)


@torch.no_grad()
def check_logprobs(lm):
    """Refuse a causal LM that does to its logits what response_logprobs does not know of."""
    ids = torch.arange(3, 11, device=lm.device)[None] % lm.config.get_text_config().vocab_size
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    wanted = torch.log_softmax(lm(**inputs).logits[:, :-1].float(), -1).gather(-1, ids[:, 1:, None])[..., 0]
    got, _ = response_logprobs(lm, slice(0, -1), ids[:, 1:], torch.ones_like(wanted).bool(), 1.0, 1, **inputs)
    if (got - wanted).abs().max() > (1e-3 if lm.dtype == torch.float32 else 0.5):
        raise BadInput(f"{lm.config.name_or_path}: its log-probs are not those of its output layer on its "
                       f"last hidden states ({lm.config.model_type}): name a model of another family.")


class LogProbs(torch.nn.Module):
    """A causal LM that answers with the log-probs of response tokens, see response_logprobs; asked without
    `states` it answers with logits, as it always did: functions of your own (--truth_fn) may want them."""

    def __init__(self, lm):
        super().__init__()
        check_logprobs(lm)
        self.lm, self.config = lm, lm.config

    def forward(self, **inputs):
        return response_logprobs(self.lm, **inputs) if "states" in inputs else self.lm(**inputs)

    def generate(self, *args, **kwargs):
        return self.lm.generate(*args, **kwargs)


class OneBase(torch.nn.Module):
    """Several models that are LoRA adapters and heads on the same frozen weights, in one copy of these.

    model(role="reference", ...)  no adapter, LM head: log-probs, see response_logprobs
    model(role="policy", ...)     its own adapter, LM head: log-probs; only with `lora`
    model(role="gvm", ...)        the GVM's adapter and head, [B, T, 1]; only with `gvm`
    model(role="reward", ...)     a reward model's adapter and head, read at the last position, [B, 1]; only
                                  with `reward`, which takes `lora`. Standardized: (score - center) / scale
    model(role="critic", ...)     the same at every position, [B, T, 1]

    The roles that can be trained have their name in that of their parameters: ".policy.", ".critic.".
    A role stays on until the next one: with gradient checkpointing backward runs its forward pass again.

    lm: causal LM;  gvm: what load_gvm(..., lm=lm) returned;  lora: peft config of the policy's adapter
    reward: (folder of a LoRA reward model on the same weights, center, scale)
    """

    def __init__(self, lm, gvm=None, lora=None, reward=None):
        super().__init__()
        from peft import PeftModel, get_peft_model
        from peft.tuners.lora import LoraLayer
        if gvm is None:
            check_logprobs(lm)
        self.adapters, self.heads = lm, torch.nn.ModuleDict()
        if gvm is not None:
            self.adapters, self.lm_head = gvm, lm.get_output_embeddings()
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

    def use(self, role):
        for layer in self.lora:  # peft's own switches would also change what is trained
            layer._disable_adapters = role == "reference"
            layer._active_adapter = ["default" if role == "gvm" else role]  # so peft calls a folder's

    def forward(self, role="policy", **inputs):
        self.use(role)
        if role in ("policy", "reference"):
            return response_logprobs(self.lm, **inputs) if "states" in inputs else self.lm(**inputs)
        if role == "gvm":
            return self.adapters(**inputs)
        hidden = self.lm.base_model(**inputs).last_hidden_state
        return TokenClassifierOutput(logits=self.heads[role](hidden[:, -1] if role == "reward" else hidden))

    def generate(self, *args, **kwargs):
        self.use("policy")
        return self.lm.generate(*args, **kwargs)


def share_models(sft, reference, rm, critic_folder, config, run):
    """PPO's (policy, reference, critic, reward) as adapters and heads on one copy of the SFT weights, under
    one engine and one optimizer for policy and critic, see train_ppo.load_models. reference is sft here."""
    import deepspeed
    args = run.args
    policy = load_policy(sft, run.tokenizer, dtype_of(config), "--sft_model")
    if args.gradient_checkpointing:
        policy.activation_checkpointing_enable({"use_reentrant": False})
    policy = OneBase(policy, lora=lora_config(policy, "CAUSAL_LM", args), reward=(rm, *reward_scale(rm)))
    groups = zip(train_only(policy, ".policy.", ".critic."), (args.lr, args.critic_lr))
    optimizer = adamw(groups, config, args.max_grad_norm)
    policy, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, config=config)
    reference, critic, reward = (functools.partial(policy, role=role)
                                 for role in ("reference", "critic", "reward"))
    return policy, reference, critic, load_reward(rm, config, run, reward)


def standardized_head(folder, center, scale, lm):
    """Linear(h, 1) that gives (score - center) / scale, from the head in a reward model's adapter folder."""
    weight, = (w for name, w in load_file(Path(folder) / "adapter_model.safetensors").items()
               if name.endswith("score.weight"))
    head = torch.nn.Linear(weight.shape[1], 1, device=lm.device, dtype=lm.dtype)
    with torch.no_grad():
        head.weight.copy_(weight / scale)
        head.bias.fill_(-center / scale)
    return head


class SharedPrefix:
    """A model on prompts that begin alike, as with tau in front of each: the tokens in front are read once.

    rest: what is left of each prompt, at least its last token
    prefix(batch) -> logits at the columns of a batch of `rest` and responses, as if it began with the prefix
    """

    def __init__(self, model, prompts, share, device, responses=()):
        """share: False where no prefix is worth it;  responses: token ids that will follow the prompts"""
        if share:  # asked by all ranks together, of the longest row of all
            longest = max(map(len, prompts)) + max(map(len, responses), default=0)
            share = can_share_prefix(model, max(gather_rows([longest])), device)
        n = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1) if share else 0
        if share and not min(gather_rows([n])):  # all ranks read a prefix, or none: ZeRO-3 would hang
            n = 0
        self.model, self.rest = model, [ids[n:] for ids in prompts]
        self.cache = read_prefix(model, prompts[0][:n], device) if n else None

    def __call__(self, batch):
        return read_behind(self.model, self.cache, batch)


def read_prefix(model, ids, device):
    """The keys and values of tokens, to be read once."""
    cache = DynamicCache()
    model(input_ids=torch.tensor([ids], device=device), use_cache=True, **{CACHE: cache})
    return cache


def read_behind(model, cache, batch):
    """Logits of a batch, each row of which begins with the tokens in the cache (None: with nothing)."""
    attention, positions = batch.attention, batch.positions
    if cache is not None:
        n, cache = cache.get_seq_length(), copy.deepcopy(cache)  # a forward pass appends to it
        cache.batch_repeat_interleave(len(batch.ids))
        attention = torch.cat([attention.new_ones(len(attention), n), attention], dim=1)
        positions = positions + n
    return model(input_ids=batch.ids, attention_mask=attention, position_ids=positions,
                 use_cache=cache is not None, **{CACHE: cache}).logits


def read_once(model, rows, each):
    """What generate() goes on from: keys and values of all tokens of the prompts but the last, of a Batch in
    which every prompt stands `each` times in a row, computed once. For models that can_share_prefix."""
    ids, attention, positions = (x[::each, :-1] for x in rows[:3])
    model.base_model(input_ids=ids, attention_mask=attention, position_ids=positions, use_cache=True,
                     **{CACHE: (cache := DynamicCache())})
    cache.batch_repeat_interleave(each)
    return {CACHE: cache}


def pack(rows, pad_id, device, dtype=torch.float32):
    """Rows that begin alike, as with one tau in front of each, in one sequence: the tokens in front are
    computed once, forward and backward. A token sees those in front of its row and its row's own, at the
    positions that they have without the others, so that every number is that of the row alone.

    # sequence    tau tau tau | p1 p2 y1 y2 EOS | p1 y1 y2 y3 EOS | pad      two rows of one policy
    # position     0   1   2     3  4  5  6  7     3  4  5  6  7     0
    # row          0   0   0     1  1  1  1  1     2  2  2  2  2    -1       sees its own number and 0

    rows: (prompt ids, response ids, key) of B rows; those of one key stand in one sequence
    dtype: of the model, for a mask that is added to the attention scores
    returns (a model's inputs,  (sequence, column) of V(s_1), Q_1 .. Q_R, [B, 1 + R] each,  mask [B, R] bool)
    """
    packs, sequences, place = defaultdict(list), [], {}
    for i, (_, _, key) in enumerate(rows):
        packs[key].append(i)
    for members in packs.values():
        prompts = [rows[i][0] for i in members]
        n = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1) if len(members) > 1 else 0
        ids, positions, row_of = prompts[0][:n], list(range(n)), [0] * n
        for number, i in enumerate(members, 1):
            own = rows[i][0][n:] + rows[i][1]
            place[i] = len(sequences), len(ids) + len(rows[i][0]) - n - 1
            ids, positions = ids + own, positions + list(range(n, n + len(own)))
            row_of = row_of + [number] * len(own)
        sequences.append([torch.tensor(x) for x in (ids, positions, row_of)])
    ids, positions, row_of = (pad_sequence(list(x), True, pad).to(device)
                              for x, pad in zip(zip(*sequences), (pad_id, 0, -1)))
    attention = (row_of >= 0).long()
    if len(packs) < len(rows):
        seen = (row_of[:, None] == 0) | (row_of[:, None] == row_of[:, :, None])
        attention = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(
            ~seen.tril(), torch.finfo(dtype).min)[:, None]
    lengths = torch.tensor([len(response) for _, response, _ in rows], device=device)
    sequence, first = torch.tensor([place[i] for i in range(len(rows))], device=device).T
    t = torch.arange(1 + int(lengths.max()), device=device)
    columns = first[:, None] + torch.minimum(t, lengths[:, None])  # behind an answer's end its last column
    return ({"input_ids": ids, "attention_mask": attention, "position_ids": positions},
            (sequence[:, None], columns), t[1:] <= lengths[:, None])


PART = 256  # queries


def attend_in_parts(module, query, key, value, attention_mask, **kwargs):
    """Attention to [B, H, T, D] under a causal mask that has all T x T entries, as that of `pack`: of the
    columns behind a part of the queries nothing is computed. Nearly half of all, T being several parts."""
    sdpa, columns = AttentionInterface()["sdpa"], query.shape[2]
    if attention_mask is None or columns <= PART or attention_mask.shape[2:] != (columns, columns):
        return sdpa(module, query, key, value, attention_mask, **kwargs)
    parts = [(i, min(i + PART, columns)) for i in range(0, columns, PART)]
    return torch.cat([sdpa(module, query[:, :, i:end], key[:, :, :end], value[:, :, :end],
                           attention_mask[:, :, i:end, :end], **kwargs)[0] for i, end in parts], 1), None


AttentionInterface.register("sdpa_in_parts", attend_in_parts)
AttentionMaskInterface.register("sdpa_in_parts", AttentionMaskInterface()["sdpa"])


def behind_cache(model, prefix, rests, device):
    """Logits at the tokens of each of `rests` behind a prefix, by its keys and values: a list of [n, ...]."""
    batch = collate(rests, [[]] * len(rests), prefix[0], device)
    logits = read_behind(model, read_prefix(model, prefix, device), batch)
    return [row[seen] for row, seen in zip(logits, batch.attention.bool())]


def in_one_sequence(model, prefix, rests, device):
    """The same numbers by pack."""
    rows = [(prefix + rest[:1], rest[1:], 0) for rest in rests]
    inputs, places, _ = pack(rows, prefix[0], device, next(model.parameters()).dtype)
    logits = model(**inputs, use_cache=False).logits[places]
    return [row[:len(rest)] for row, rest in zip(logits, rests)]


SHARES = weakref.WeakKeyDictionary()  # model: {way of sharing: (length of the rows tried, were they right)}


@torch.no_grad()
def can_share_prefix(model, length, device, shared=behind_cache):
    """Whether a model reads rows of up to `length` tokens behind a shared prefix as it reads them whole.

    Between the prefix and a short row lies padding, or another row, which some models count (ALiBi, windows);
    others cannot go on from a cache, or do not know it. So it is tried, with rows of very unequal length,
    once for each doubling of `length`. All ranks try the same, and answer alike.
    """
    plain = getattr(model, "func", model)  # a role of OneBase is a functools.partial
    plain = getattr(plain, "module", plain)
    config, why = plain.config.get_text_config(), "other values come out"
    length = min(1 << (max(length, 32) - 1).bit_length(),
                 getattr(config, "max_position_embeddings", None) or 10**9)
    tried, can = SHARES.setdefault(plain, {}).get(shared, (0, True))
    if length <= tried or not can:
        return can
    ids = np.random.default_rng(0).integers(config.vocab_size, size=length).tolist()
    prefix, rests = ids[:length // 2], [ids[length // 2:], ids[-(length // 16):]]
    try:
        whole = [read_behind(model, None, collate([prefix + rest], [[]], ids[0], device))[0, len(prefix):]
                 for rest in rests]
        # The families that cannot are apart by 0.45 of the spread and more; bfloat16 alone, by up to 0.14
        limit = whole[0].float().std() * (1e-3 if next(plain.parameters()).dtype == torch.float32 else 0.3)
        can = all((row.float() - wanted.float()).square().mean().sqrt() <= limit
                  for row, wanted in zip(shared(model, prefix, rests, device), whole))
    except Exception as e:  # whatever a model does that was not made for it
        can, why = False, one_line(e)
    agreed, ranks = all_sum(can, 1, device=device)
    SHARES[plain][shared] = length, agreed == ranks
    if agreed < ranks:
        print0(f"what rows have in front in common, as tau, is read anew with each of them: "
               f"{config.model_type} cannot share it ({why})")
    return agreed == ranks
