"""What the training scripts share: model sizes, batches of even length, the optimiser and the loop."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from tokenizer import build_tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, GenerationConfig, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

IGNORE = -100  # a label that the loss skips
Example = tuple[list[int], ...]  # token ids, then rows of labels: for each token what is read at it

SHAPES = {
    "0.1m": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 176},
    "0.6m": {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 352},
    "1m": {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 352},
    "3m": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 704},
}
KV_HEADS = {"0.1m": 2, "0.6m": 2, "1m": 2, "3m": 4}


def llama_config(size: str, tokenizer: PreTrainedTokenizerFast, **options: object) -> LlamaConfig:
    """Return the configuration of a Llama of one of the `SHAPES`."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        num_key_value_heads=KV_HEADS[size],
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SHAPES[size],
        **options,
    )


def cut_by_length(examples: Sequence[Example], pad: int, chunks: int) -> Iterator[list[Tensor]]:
    """Yield the examples, sorted by length, in `chunks` padded batches (ids, *labels) of about as many tokens each."""
    ordered = sorted(examples, key=lambda example: len(example[0]))
    share = sum(len(example[0]) for example in ordered) / chunks
    groups: list[list[Example]] = [[] for _ in range(chunks)]
    seen = 0
    for example in ordered:
        groups[min(int(seen / share), chunks - 1)].append(example)
        seen += len(example[0])
    for group in filter(None, groups):
        width = len(group[-1][0])
        fillers = [pad] + [IGNORE] * (len(group[0]) - 1)
        yield [
            torch.tensor([row + [filler] * (width - len(row)) for row in rows])
            for filler, rows in zip(fillers, zip(*group, strict=True), strict=True)
        ]


def optimizers(model: PreTrainedModel, lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the layers and AdamW for the rest."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [p for name, p in trained.items() if p.ndim == 2 and ".layers." in name]
    rest = [p for name, p in trained.items() if not (p.ndim == 2 and ".layers." in name)]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def train(
    model: PreTrainedModel,
    draw: Callable[[], Sequence[Example]],
    loss_of: Callable[..., Tensor],
    *,
    pad: int,
    tokens: int,
    lr: float,
    chunks: int = 2,
    log_every: int = 50,
) -> None:
    """Train on at least `tokens` tokens, the learning rate rising over the first 2% and falling linearly to zero.

    `draw` returns the examples of one optimiser step; `loss_of(model, ids, *labels)` the sum of losses over the labels
    that are not ``IGNORE``.
    """
    model.train()
    model.set_attn_implementation("short_causal")
    optimisers = optimizers(model, lr)
    start, seen, step = time.perf_counter(), 0, 0
    while seen < tokens:
        rate = lr * min(1.0, (seen + 1) / (0.02 * tokens)) * (1 - seen / tokens)
        examples = draw()
        count = sum(label != IGNORE for _, *rows in examples for row in rows for label in row)
        total = 0.0
        for batch in cut_by_length(examples, pad, chunks):
            with _precision(model):
                loss = loss_of(model, *batch) / count
            loss.backward()
            total += loss.item()
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.step()
            optimiser.zero_grad()
        seen += sum(len(example[0]) for example in examples)
        if step % log_every == 0 or seen >= tokens:
            speed = seen / (time.perf_counter() - start)
            print(f"step {step:5d}  tokens {seen / 1e6:6.2f}M  loss {total:.4f}  {speed:.0f} tokens/s", flush=True)
        step += 1
    model.eval()


def short_causal_attention(
    _module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: object, scaling: float, **_: object
) -> tuple[Tensor, None]:
    """Attend causally over short, right-padded rows; the backward of SDPA took two fifths of a step on a CPU.

    query [B, Hq, T, D], key and value [B, Hkv, T, D]; returns [B, T, Hq, D]. Padding comes last, so no row sees it.
    """
    batch, heads, length, size = query.shape
    kv_heads = key.shape[1]
    grouped = (query * scaling).reshape(batch, kv_heads, -1, size)  # [B, Hkv, G*T, D]
    scores = (grouped @ key.transpose(2, 3)).view(batch, heads, length, length)
    future = torch.full((length, length), -torch.inf, dtype=scores.dtype).triu(1)
    weights = torch.softmax(scores + future, dim=-1).view(batch, kv_heads, -1, length)
    return (weights @ value).view(query.shape).transpose(1, 2), None


AttentionInterface.register("short_causal", short_causal_attention)


def token_loss(model: PreTrainedModel, ids: Tensor, labels: Tensor) -> Tensor:
    """Return the summed cross-entropy of ``labels[b, t]``, read from the logits at ``ids[b, t]``."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    chosen = labels != IGNORE
    logits = model.get_output_embeddings()(hidden[chosen])
    return F.cross_entropy(logits.float(), labels[chosen], reduction="sum")


def save(model: PreTrainedModel, folder: str) -> None:
    """Write a Hugging Face checkpoint in bfloat16."""
    tokenizer = build_tokenizer()
    if model.can_generate():
        model.generation_config = GenerationConfig(
            do_sample=True,
            temperature=0.8,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def command_line(
    description: str, names: Iterable[str], train_model: Callable[..., PreTrainedModel], **more: str
) -> None:
    """Train the model that the command line names and save it; `more` are further options and their defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(names))
    parser.add_argument("folder")
    parser.add_argument("--fraction", type=float, default=1.0, help="share of the tokens, to try a script")
    parser.add_argument("--seed", type=int, default=0)
    for option, default in more.items():
        parser.add_argument(f"--{option}", default=default)
    options = vars(parser.parse_args())
    start, folder = time.perf_counter(), options.pop("folder")
    model = train_model(**options)
    save(model, folder)
    minutes = (time.perf_counter() - start) / 60
    print(f"{options['name']}: {model.num_parameters()} parameters, {minutes:.1f} minutes")


def _precision(model: PreTrainedModel) -> AbstractContextManager[object]:
    """Matrix products of bfloat16 pay on a CPU from a hidden size of about 128."""
    if model.config.hidden_size < 128:
        return nullcontext()
    return torch.autocast("cpu", torch.bfloat16)
