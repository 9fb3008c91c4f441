"""Exact rewards and values of a language model in the toy world: plugs `fn(rows, policy, tokenizer)`.

A prompt has only 36 well-formed answers, so expectations under any policy are sums, not samples. The answers
are teacher-forced once per distinct prompt, at temperature 1; everything else the policy might say is
malformed. The sum is over the answers y that start with the prefix:

    E[r | prefix] = MALFORMED + sum_y P(y | prefix) (r(y) - MALFORMED)

rows      list of dicts: "prompt" (chat messages, the last one is the question), "prompt_ids" (list of int,
          what the policy saw, ends where the response starts), "response" (text), "response_ids" (list of
          int, with the EOS where there is one)
policy    a causal LM or a DeepSpeed engine: policy(input_ids=, attention_mask=, position_ids=).logits. Its
          mode (train or eval) is left alone, and no gradient is recorded.
returns   one entry per row, always in units of r

A prompt cut short, or with other turns in front, is valued as the policy really saw it, by its prompt_ids. A
response without EOS is no answer: `sampled_reward` calls it malformed, `values` gives each prefix the
expectation it has.

Shapes: A = 36 answers of a prompt, L = tokens of the longest one with EOS, N = sequences of one forward.
"""
from collections import namedtuple
from functools import cache

import numpy as np
import torch
import torch.distributed as dist

from toy.world import CLOSINGS, MALFORMED, POLITE, answer_table, answers, true_score
from toy.world import true_reward as reward_of_text

CHUNK = 64                              # sequences per forward; larger ones are slower on a CPU core
NO_TOKEN = -1                           # after the end of an answer; equal to no token id

# ids [A, L], NO_TOKEN after the EOS; rewards [A]; tail [A, L + 1]: log P(y_t.. | x, y_<t), 0 after the EOS
Answers = namedtuple("Answers", "ids rewards tail")


# ---- teacher forcing ----

def question_of(row):
    """The text of the question, which names the fact."""
    return row["prompt"][-1]["content"]


@cache  # there are only 384 questions
def answer_ids(question, tokenizer):
    """Token ids of the 36 answers, EOS appended: tuple of 36 tuples."""
    encoded = tokenizer(answers(question), add_special_tokens=False)["input_ids"]
    return tuple((*ids, tokenizer.eos_token_id) for ids in encoded)


@cache
def inputs_to_run(question, tokenizer):
    """The inputs from which every answer can be read: list of (input ids, indices of the answers read there).

    The last token is predicted, never an input, so an answer without closing is read from one with a closing:
    24 sequences instead of 36.
    """
    ids = answer_ids(question, tokenizer)
    readers = {}
    for i, answer in enumerate(ids):
        inputs = max((other[:-1] for other in ids if other[:len(answer) - 1] == answer[:-1]), key=len)
        readers.setdefault(inputs, []).append(i)
    return list(readers.items())


def answer_rewards(question):
    """Noise-free rewards of the 36 answers: [A]."""
    return np.array([reward_of_text(question, text) for text in answers(question)])


def forwards_needed(sequences, device):
    """Number of forwards: the most that any rank needs, because under ZeRO-3 unequal numbers would hang."""
    count = torch.tensor(-(-len(sequences) // CHUNK), device=device)
    if dist.is_initialized():
        dist.all_reduce(count, op=dist.ReduceOp.MAX)
    return int(count)


@torch.no_grad()
def next_token_logprobs(chunk, policy, pad_id, device):
    """log pi(. | x, y_<t) after the prompt and after each further input token.

    chunk     list of N pairs (prompt ids, input ids), tuples
    returns   list of N float32 arrays [len(input ids) + 1, V]

    ids         p0  p1  y0  y1  pad       right padding: causal attention never looks there
    read at         p1  y0  y1            the distributions of y0, y1, EOS
    """
    length = max(len(prompt) + len(inputs) for prompt, inputs in chunk)
    ids = torch.full((len(chunk), length), pad_id)
    mask = torch.zeros_like(ids)
    for i, (prompt, inputs) in enumerate(chunk):
        ids[i, :len(prompt) + len(inputs)] = torch.tensor(prompt + inputs)
        mask[i, :len(prompt) + len(inputs)] = 1
    positions = torch.arange(length).expand_as(ids)
    ids, mask, positions = ids.to(device), mask.to(device), positions.to(device)
    logits = policy(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    logprobs = torch.log_softmax(logits.float(), -1).cpu().numpy()                       # [N, length, V]
    return [row[len(prompt) - 1:len(prompt) + len(inputs)] for row, (prompt, inputs) in zip(logprobs, chunk)]


def teacher_force(rows, policy, tokenizer):
    """The Answers of every row, once per distinct prompt. Every rank must call it, with at least one row."""
    keys = [(question_of(row), tuple(row["prompt_ids"])) for row in rows]
    logprobs_of = {key: {} for key in keys}                      # per prompt {index of the answer: array}
    work = [(key, *job) for key in logprobs_of for job in inputs_to_run(key[0], tokenizer)]
    work.sort(key=lambda item: len(item[0][1]) + len(item[1]))   # similar lengths together: less padding
    device = getattr(policy, "device", "cpu")
    for number in range(forwards_needed(work, device)):
        chunk = work[number * CHUNK:(number + 1) * CHUNK] or work[:1]
        pairs = [(prompt_ids, inputs) for (_, prompt_ids), inputs, _ in chunk]
        found = next_token_logprobs(pairs, policy, tokenizer.pad_token_id, device)
        for (key, _, indices), logprobs in zip(chunk, found):
            for i in indices:
                answer = list(answer_ids(key[0], tokenizer)[i])
                logprobs_of[key][i] = logprobs[np.arange(len(answer)), answer]
    tables = {key: pack(key[0], answer_ids(key[0], tokenizer), found) for key, found in logprobs_of.items()}
    return [tables[key] for key in keys]


def pack(question, ids, logprobs):
    """Answers from A ragged rows of token ids and of their log-probabilities."""
    length = max(map(len, ids))
    padded = np.full((len(ids), length), NO_TOKEN)
    logp = np.zeros((len(ids), length + 1))                      # the last column is the empty sum
    for i, row in enumerate(ids):
        padded[i, :len(row)] = row
        logp[i, :len(row)] = logprobs[i]
    tail = np.flip(np.cumsum(np.flip(logp, 1), 1), 1)            # [A, L + 1], tail[:, t] = sum of logp[:, t:]
    return Answers(padded, answer_rewards(question), tail)


# ---- the plugs ----

def true_reward(rows, policy, tokenizer):
    """Exact expected noise-free reward of each row's prompt under the policy. The response is not used."""
    return [float(MALFORMED + np.exp(a.tail[:, 0]) @ (a.rewards - MALFORMED))
            for a in teacher_force(rows, policy, tokenizer)]


def sampled_reward(rows, policy, tokenizer):
    """Noise-free reward of each row's response itself. The policy is not used.

    It is judged by its ids: the text would hide special tokens in the middle and a missing EOS.
    """
    rewards = []
    for row in rows:
        reward_of = dict(zip(answer_ids(question_of(row), tokenizer), answer_rewards(question_of(row))))
        rewards.append(float(reward_of.get(tuple(row["response_ids"]), MALFORMED)))
    return rewards


def score(rows, policy, tokenizer):
    """Noise-free score, 1 to 10, of each row's response as a text, for label.py."""
    return [true_score(question_of(row), row["response"]) for row in rows]


def values(rows, policy, tokenizer):
    """Exact values along each row's response: T + 1 floats, entry 0 is V(s_1), entry t is Q after token t.

    After the EOS of an answer this is exactly r(y); a prefix of none of the 36 answers is worth MALFORMED.
    """
    tables = teacher_force(rows, policy, tokenizer)
    return [prefix_values(row["response_ids"], table) for row, table in zip(rows, tables)]


def prefix_values(response_ids, table):
    """E[r | y_<t] for t = 0..T: list of T + 1 floats. table: Answers of the prompt."""
    matching = np.ones(len(table.ids), dtype=bool)               # [A], answers that start with the prefix
    result = []
    for t in range(len(response_ids) + 1):
        if t > 0:
            matching &= (table.ids[:, t - 1] == response_ids[t - 1]) if t <= table.ids.shape[1] else False
        p = np.exp(table.tail[matching, min(t, table.ids.shape[1])])
        result.append(float(MALFORMED + p @ (table.rewards[matching] - MALFORMED)))
    return result


def summary(rows, policy, tokenizer):
    """What the policy would answer to each row's prompt, exactly: a dict of floats per row.

    reward       expected noise-free reward, as true_reward
    well_formed  P(one of the 36 answers)
    right        P(right and well-formed), polite likewise
    length       expected tokens of a well-formed answer, EOS included
    closing_0..  P(this closing | well-formed); closings never touch the reward, so their drift is bias
    """
    result = []
    for row, table in zip(rows, teacher_force(rows, policy, tokenizer)):
        parsed = list(answer_table(question_of(row)).values())
        p = np.exp(table.tail[:, 0])                             # [A]
        given = p / p.sum()
        found = {
            "reward": MALFORMED + p @ (table.rewards - MALFORMED),
            "well_formed": p.sum(),
            "right": p @ [y.right for y in parsed],
            "polite": p @ [POLITE[y.opener] for y in parsed],
            "length": given @ (table.ids != NO_TOKEN).sum(1),
        }
        found |= {f"closing_{c}": given @ [y.closing == c for y in parsed] for c in range(len(CLOSINGS))}
        result.append({name: float(value) for name, value in found.items()})
    return result
