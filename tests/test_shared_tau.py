"""Rows behind one tau, which is read once: their values and gradients are those of rows alone."""

import json

import pytest
import torch

import train_gvm
from common import chat_ids, load_tokenizer, load_value_base, td_loss
from conftest import metrics, run_of, run_stage
from plumbing import lean

CPU, EOS = torch.device("cpu"), 1
RESPONSES = [[5, 1], [12, 4, 8, 9], [10, 9, 12, 14, 8, 1], [1]]


def packed_rows(tokenizer, shared):
    """Rows of three policies, as an optimizer batch has them; one of them has no tau."""
    taus = {0: [("is it red ?", "yes .")], 2: [],
            1: [("is it ?", "no . it is"), ("what is red ?", "it is .")]}
    chats = [[{"role": "user", "content": t}] for t in ("is it ?", "red ?", "what is it ?")]
    rows = [(chat_ids(tokenizer, chats[i % 3], taus[policy]), RESPONSES[i % 4], policy if shared else i)
            for i, policy in enumerate([1, 0, 1, 2, 0, 1])]
    return rows, torch.linspace(-1, 1, len(rows))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_rows_behind_one_tau_have_the_values_and_gradients_of_rows_alone(name, checkpointing, models_folder,
                                                                         monkeypatch):
    """Also with activations recomputed, where transformers drops every cache; eager attention takes the same
    mask, and attention in parts."""
    monkeypatch.setattr(lean, "PART", 8)
    tokenizer, found = load_tokenizer(models_folder / name), []
    for shared, attention in ((False, "sdpa"), (True, "sdpa"), (True, "eager"), (True, "sdpa_in_parts")):
        torch.manual_seed(0)
        model = load_value_base(str(models_folder / name), torch.float32)
        model.set_attn_implementation(attention)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        rows, rewards = packed_rows(tokenizer, shared)
        q, mask = train_gvm.values(model.train(), rows, run_of(tokenizer))
        loss, count = td_loss(q, rewards, mask, 0.9, 0.8)
        loss.backward()
        values = [row[:1 + n] for row, n in zip(q, mask.sum(1))]
        found.append((values, loss, count, {n: p.grad for n, p in model.named_parameters()}))
    alone, *together = found
    for values, loss, count, gradients in together:
        assert count == alone[2] and torch.allclose(loss, alone[1], rtol=1e-5)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(values, alone[0]))
        differ = {n: ((g - alone[3][n]).abs().max() / alone[3][n].abs().max()).item()
                  for n, g in gradients.items()}
        assert max(differ.values()) < 1e-5, differ


def test_tau_is_held_once(models_folder):
    """Six rows become three sequences, whose tokens are those of the taus and of the rows."""
    tokenizer = load_tokenizer(models_folder / "llama")
    rows, _ = packed_rows(tokenizer, True)
    inputs, (sequence, columns), mask = lean.pack(rows, EOS, CPU)
    assert sequence[:, 0].tolist() == [0, 1, 0, 2, 1, 0]
    first = rows[0][0] + rows[0][1]
    assert inputs["input_ids"][0, :len(first)].tolist() == first
    lone = inputs["input_ids"][2]
    assert lone[:len(rows[3][0] + rows[3][1])].tolist() == rows[3][0] + rows[3][1]
    for (prompt, response, _), i, at, answer in zip(rows, sequence[:, 0], columns, mask):
        assert inputs["input_ids"][i, at[1:]][answer].tolist() == response
        assert inputs["position_ids"][i, at[0]] == len(prompt) - 1
    tokens = sum(len(prompt) + len(response) for prompt, response, _ in rows)
    assert (inputs["position_ids"] > 0).sum() < tokens - 3 * 8


def test_attention_in_parts_leaves_out_what_no_token_of_a_part_may_see(monkeypatch):
    """36 columns in parts of 8: 8 x (8 + 16 + 24 + 32) and 4 x 36 scores of 36 x 36."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 36, 8).unbind()
    mask = torch.zeros(2, 1, 36, 36).masked_fill(torch.ones(36, 36).triu(1).bool(), -1e9)
    sdpa, scores = torch.nn.functional.scaled_dot_product_attention, []
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, *args, **kwargs: (
        scores.append(q.shape[2] * k.shape[2]), sdpa(q, k, *args, **kwargs))[1])
    for size, wanted in ((36, 36 * 36), (8, 8 * 80 + 4 * 36)):
        monkeypatch.setattr(lean, "PART", size)
        found, _ = lean.attend_in_parts(torch.nn.Module(), query, key, value, mask)
        assert torch.allclose(found, sdpa(query, key, value, mask).transpose(1, 2), atol=1e-6)
        assert sum(scores) == wanted
        scores.clear()


def test_a_model_that_cannot_read_rows_in_one_sequence_is_found(models_folder):
    """One that passes over the mask, and one that refuses it."""
    model = load_value_base(str(models_folder / "llama"), torch.float32).eval()
    assert lean.can_share_prefix(model, 32, CPU, lean.in_one_sequence)
    for name in ("deaf", "strict"):
        class Other(type(model)):
            def forward(self, attention_mask=None, strict=name == "strict", **inputs):
                four = attention_mask is not None and attention_mask.dim() == 4
                if four and strict:
                    raise ValueError("no such mask here")
                return super().forward(attention_mask=None if four else attention_mask, **inputs)
        other = Other(model.config).eval()
        assert not lean.can_share_prefix(other, 32, CPU, lean.in_one_sequence)
        assert lean.can_share_prefix(other, 32, CPU)  # by its keys and values it can


def test_what_bfloat16_rounds_is_not_taken_for_another_layout(models_folder):
    """The values of a real model (135 million parameters) were apart by 0.14 of their spread, and tau was
    read anew for each row; of the families that cannot share, none was apart by less than 0.45."""
    model = load_value_base(str(models_folder / "llama"), torch.bfloat16).eval()
    for apart, can in ((0.2, True), (0.4, False)):
        def other(*given, apart=apart):
            rows = [row.float() for row in lean.behind_cache(*given)]
            return [row + apart * rows[0].std() for row in rows]
        assert lean.can_share_prefix(model, 32, CPU, other) == can


def test_pairs_without_policy_names_train_a_gvm_without_tau(chain, flags, tmp_path):
    """As in hh-rlhf: who wrote an answer is not known."""
    data = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": f"what is {i} ?", "chosen": "the cat sat", "rejected": "a dog"} for i in range(40)]
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    run_stage(train_gvm, **{**flags.gvm, "data": data, "k": 0, "max_steps": 12}, sft_model=chain.sft,
              output_dir=tmp_path / "gvm")
    losses = [row["loss"] for row in metrics(tmp_path / "gvm")]
    assert losses[-1] < losses[0] / 2
