"""Other people's models, made here: tokenizers of every kind, chat templates of the known families, reward
models that are not ours."""

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (ByT5Tokenizer, GPT2Config, GPT2ForSequenceClassification, LlamaConfig,
                          LlamaForSequenceClassification, PreTrainedTokenizerFast, Qwen2Config,
                          Qwen2ForSequenceClassification)

from conftest import TEMPLATE
from plumbing import texts

CPU = torch.device("cpu")
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
HEADERS = ("{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n\n' "
           "+ m['content'] | trim + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}"
           "{{ '<|im_start|>assistant\n\n' }}{% endif %}")
NO_PROMPT = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + ': ' + m['content'] + '<|im_end|> .' }}"
             "{% endfor %}")  # reads whole chats, renders no prompt
NO_SYSTEM = ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
             + TEMPLATE)
SPECIAL = ["<s>", "<eos>", "<unk>", "<|im_start|>", "<|im_end|>"]
SPOKEN = ["is it on the sea coast ?", "yes it is on the sea coast .", "user assistant system",
          "< s > < eos > < unk > < | im _ start | > < | im _ end | >"] * 3
QUESTION = [{"role": "user", "content": "is it on the sea ?"}]
ANSWERS = ["yes .", "it is on the sea coast .", "no", "is it ?", "yes it is on the coast"]


def tokenizer_of(kind, template=CHATML, **more):
    """A tokenizer of each kind that there is, made of a few sentences."""
    if kind == "bytes":  # written in Python, not in Rust
        tokenizer = ByT5Tokenizer(extra_ids=0, additional_special_tokens=SPECIAL[3:])
        tokenizer.chat_template = template
        return tokenizer
    if kind == "words":
        words = [*SPECIAL, *dict.fromkeys(" ".join(SPOKEN).split())]
        made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        model, cut, decoder, trainer = {
            "bpe": (models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel(),
                    trainers.BpeTrainer(special_tokens=SPECIAL, vocab_size=330, show_progress=False,
                                        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())),
            "unigram": (models.Unigram(), pre_tokenizers.Metaspace(), decoders.Metaspace(),
                        trainers.UnigramTrainer(special_tokens=SPECIAL, vocab_size=80, unk_token="<unk>",
                                                show_progress=False)),
            "pieces": (models.WordPiece(unk_token="<unk>"), pre_tokenizers.BertPreTokenizer(),
                       decoders.WordPiece(), trainers.WordPieceTrainer(
                           special_tokens=SPECIAL, vocab_size=200, show_progress=False))}[kind]
        made = Tokenizer(model)
        made.pre_tokenizer, made.decoder = cut, decoder
        if kind == "pieces":
            made.normalizer = normalizers.BertNormalizer()
        made.train_from_iterator(SPOKEN, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template, **{
        "bos_token": "<s>", "eos_token": "<eos>", "unk_token": "<unk>",
        "additional_special_tokens": SPECIAL[3:], **more})


def controls_in(tokenizer, ids):
    return [i for i in ids if i in texts.control_tokens(tokenizer)]


SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, initializer_range=0.3, num_labels=1)


def reward_model(folder, family="qwen", template=CHATML, context=512, kind="bpe", **special):
    """A folder with a random sequence classifier and its own tokenizer."""
    torch.manual_seed(1)
    tokenizer = tokenizer_of(kind, template, **special)
    n = len(tokenizer) + 8  # the family's tokenizer may add some of its own
    if family == "gpt2":
        model = GPT2ForSequenceClassification(GPT2Config(
            vocab_size=n, n_embd=32, n_layer=2, n_head=4, n_positions=context, initializer_range=0.3,
            num_labels=1, bos_token_id=0, eos_token_id=1))
    else:
        config, cls = {"qwen": (Qwen2Config, Qwen2ForSequenceClassification),
                       "llama": (LlamaConfig, LlamaForSequenceClassification)}[family]
        model = cls(config(vocab_size=n, max_position_embeddings=context, bos_token_id=0, eos_token_id=1,
                           pad_token_id=None, **SIZES))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
