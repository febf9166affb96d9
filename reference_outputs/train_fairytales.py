"""Train the bundled checkpoint `fairytales` from a folder with andersen.txt and grimm.txt.

    pip install torch sentencepiece numpy safetensors
    python reference_outputs/train_fairytales.py CORPUS_FOLDER -o FOLDER [--device cuda]

It learns the tokenizer, trains the language model with early stopping on held-out stories, makes
greedy decoding less repetitive, rounds the weights to bfloat16, trains the head `score` on the
frozen rounded trunk, measures everything on test stories that no decision has looked at, and
writes a Hugging Face folder with its card.
A story file holds stories separated by four newlines: title line, blank line, paragraphs.
Every number of the recipe can be changed: `--set dropout=0.1 --set epochs=2`.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import io
import json
import math
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

AUTHORS = ("Andersen", "Grimm")
UNK, BOS, EOS = 0, 1, 2
IGNORE = -100


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides the result; the first block is the architecture."""

    vocab_size: int = 2048
    hidden_size: int = 240
    intermediate_size: int = 640
    num_hidden_layers: int = 7
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    max_position_embeddings: int = 512
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0

    epochs: int = 15
    patience: int = 4  # epochs without a better validation loss before training stops
    rows: int = 8  # crops per step
    learning_rate: float = 3e-3
    embedding_learning_rate: float = 3e-3
    warmup: int = 100  # steps
    weight_decay: float = 0.3
    dropout: float = 0.2
    subword_dropout: float = 0.1  # BPE-dropout, fading to 0 at the end of training
    title_rate: float = 0.5  # how often a story starts with its title
    author_weight: float = 0.02  # "who wrote this?" as a side task for the trunk
    optimizer: str = "adamw"  # or "muon" for the layers' matrices
    repeat_rounds: int = 2  # against repetitions, after training
    repeat_updates: int = 125  # in each round
    repeat_rows: int = 12
    repeat_learning_rate: float = 2e-4
    repeat_weight: float = 1.0
    repeat_blend: float = 0.5  # how far the weights move towards those after these updates
    seed: int = 1

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


# ---------------------------------------------------------------- stories and tokens


@dataclasses.dataclass(frozen=True)
class Story:
    author: int
    title: str
    body: str

    @property
    def text(self) -> str:
        return f"{self.title}\n\n{self.body}"


Parts = tuple[list[Story], list[Story], list[Story]]


def read_stories(folder: Path) -> list[Story]:
    stories = []
    for author, name in enumerate(AUTHORS):
        text = (folder / f"{name.lower()}.txt").read_text(encoding="utf-8")
        for part in re.split(r"\n{4,}", text.strip()):
            title, _, body = part.partition("\n")
            stories.append(Story(author, title.strip(), body.strip()))
    return stories


def split(stories: list[Story]) -> Parts:
    """Whole stories for training, validation (decisions) and test (the card): 22 : 1 : 1."""
    parts: Parts = ([], [], [])
    for author in range(len(AUTHORS)):
        for i, story in enumerate(s for s in stories if s.author == author):
            parts[{7: 1, 19: 2}.get(i % 24, 0)].append(story)
    return parts


def train_tokenizer(stories: list[Story], vocab_size: int, path: Path) -> None:
    """SentencePiece BPE with LLaMA's settings; newlines become the byte piece <0x0A>."""
    model = io.BytesIO()  # given a path, the library would store it in the model
    lines = (line for story in stories for line in story.text.split("\n") if line)
    spm.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=0.99995,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        allow_whitespace_only_pieces=True,
        unk_surface=" \u2047 ",
        unk_id=UNK,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        max_sentence_length=1 << 20,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


def encode(tokenizer: spm.SentencePieceProcessor, text: str, dropout: float = 0.0) -> list[int]:
    """BOS and the ids of the text; with dropout, a random segmentation of it."""
    if dropout > 0:
        ids = tokenizer.encode(text, enable_sampling=True, alpha=dropout, nbest_size=-1)
    else:
        ids = tokenizer.encode(text)
    return [BOS, *ids]


def crops(length: int, width: int, rng: random.Random) -> Iterator[int]:
    """Where a story of `length` ids is cut: always at 0, so that BOS means a beginning, then on
    a randomly shifted grid, with the last crop moved back so that it ends with the story."""
    yield 0
    last = length - width
    start = rng.randint(width // 2, width)
    while start < last:
        yield start
        start += width
    if last > 0:
        yield last


def epoch_batches(
    stories: list[Story],
    tokenizer: spm.SentencePieceProcessor,
    recipe: Recipe,
    subword_dropout: float,
    rng: random.Random,
) -> list[tuple[Tensor, Tensor]]:
    """One pass over the stories as shuffled batches of (ids (B, T+1), author (B,))."""
    width = recipe.max_position_embeddings + 1  # inputs and targets overlap by all but one id
    rows = []
    for story in stories:
        text = story.text if rng.random() < recipe.title_rate else story.body
        ids = [*encode(tokenizer, text, subword_dropout), EOS]
        for start in crops(len(ids), width, rng):
            row = ids[start : start + width]
            rows.append((row + [IGNORE] * (width - len(row)), story.author))
    rng.shuffle(rows)
    batches = []
    for i in range(0, len(rows) - recipe.rows + 1, recipe.rows):
        ids_of, author_of = zip(*rows[i : i + recipe.rows], strict=True)
        batches.append((torch.tensor(ids_of), torch.tensor(author_of)))
    return batches


# ---------------------------------------------------------------- the model


class Attention(nn.Module):
    def __init__(self, r: Recipe) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            r.num_attention_heads,
            r.num_key_value_heads,
            r.head_dim,
        )
        narrow = self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(r.hidden_size, r.hidden_size, bias=False)
        self.k_proj = nn.Linear(r.hidden_size, narrow, bias=False)
        self.v_proj = nn.Linear(r.hidden_size, narrow, bias=False)
        self.o_proj = nn.Linear(r.hidden_size, r.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(b, t, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(b, t, self.kv_heads, self.head_dim).transpose(1, 2)
        out = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.o_proj(out.transpose(1, 2).reshape(b, t, -1))


def attend(q: Tensor, k: Tensor, v: Tensor, block: int = 128) -> Tensor:
    """Causal grouped-query attention in blocks of queries, each over the keys it can see.

    On a CPU in bfloat16 this is three times faster than scaled_dot_product_attention."""
    b, n, t, h = q.shape
    kv = k.shape[1]
    q = (q * h**-0.5).view(b, kv, n // kv, t, h)
    outs = []
    for i in range(0, t, block):
        rows, end = min(block, t - i), min(i + block, t)
        scores = q[:, :, :, i:end].reshape(b, kv, -1, h) @ k[:, :, :end].transpose(-1, -2)
        hidden = torch.full((rows, end), -math.inf, dtype=q.dtype, device=q.device).triu(i + 1)
        weights = (scores.view(b, kv, -1, rows, end) + hidden).softmax(-1).to(v.dtype)
        out = weights.view(b, kv, -1, end) @ v[:, :, :end]
        outs.append(out.view(b, kv, -1, rows, h))
    return torch.cat(outs, dim=3).view(b, n, t, h)


def drop(x: Tensor, rate: float, training: bool) -> Tensor:
    """Dropout with the rate rounded to 1/256: a random byte per value, 4 times faster on a CPU."""
    level = round(256 * rate)
    if not training or level == 0:
        return x
    words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device)
    bytes_ = words.random_(-(2**63), None).view(torch.uint8)[: x.numel()].view(x.shape)
    return x * (bytes_ >= level).to(x.dtype).mul_(256 / (256 - level))


class MLP(nn.Module):
    def __init__(self, r: Recipe) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(r.hidden_size, r.intermediate_size, bias=False)
        self.up_proj = nn.Linear(r.hidden_size, r.intermediate_size, bias=False)
        self.down_proj = nn.Linear(r.intermediate_size, r.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, r: Recipe) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(r.hidden_size, r.rms_norm_eps)
        self.self_attn = Attention(r)
        self.post_attention_layernorm = nn.RMSNorm(r.hidden_size, r.rms_norm_eps)
        self.mlp = MLP(r)
        self.dropout = r.dropout

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        step = self.self_attn(self.input_layernorm(x), cos, sin)
        x = x + drop(step, self.dropout, self.training)
        step = self.mlp(self.post_attention_layernorm(x))
        return x + drop(step, self.dropout, self.training)


class Trunk(nn.Module):
    def __init__(self, r: Recipe) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(r.vocab_size, r.hidden_size)
        self.layers = nn.ModuleList(Layer(r) for _ in range(r.num_hidden_layers))
        self.norm = nn.RMSNorm(r.hidden_size, r.rms_norm_eps)


class Llama(nn.Module):
    """Module names are the tensor names of the Hugging Face layout; the LM head is tied."""

    def __init__(self, r: Recipe) -> None:
        super().__init__()
        self.recipe = r
        self.model = Trunk(r)
        self.score = nn.Linear(r.hidden_size, len(AUTHORS), bias=False)
        residual = 0.02 / math.sqrt(2 * r.num_hidden_layers)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                out = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=residual if out else 0.02)

    def hidden(self, ids: Tensor) -> Tensor:
        r = self.recipe
        x = self.model.embed_tokens(ids)
        x = drop(x, r.dropout, self.training)
        frequency = r.rope_theta ** -(torch.arange(0, r.head_dim, 2) / r.head_dim)
        angle = torch.arange(ids.shape[1])[:, None] * frequency
        angle = torch.cat((angle, angle), dim=-1).to(x.device)
        cos, sin = angle.cos(), angle.sin()
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.model.embed_tokens.weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, dim=-1)
    return (torch.cat((a, b), -1) * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)


# ---------------------------------------------------------------- training


@dataclasses.dataclass(frozen=True)
class Log:
    history: list[tuple[int, float, float]]  # epoch, training loss, validation loss
    steps: int
    best_epoch: int
    seconds: float


def optimizers(model: Llama, r: Recipe) -> list[torch.optim.Optimizer]:
    """The layers' matrices and the embedding decay; the norms' gains do not."""
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    gains = [p for p in model.model.parameters() if p.dim() == 1]
    table = [model.model.embed_tokens.weight, model.score.weight]
    adam: list[dict[str, object]] = [
        {"params": table, "lr": r.embedding_learning_rate, "weight_decay": r.weight_decay},
        {"params": gains, "lr": r.embedding_learning_rate, "weight_decay": 0.0},
    ]
    if r.optimizer == "muon":
        muon = torch.optim.Muon(
            matrices,
            lr=r.learning_rate,
            weight_decay=r.weight_decay,
            momentum=0.95,
            adjust_lr_fn="match_rms_adamw",
        )
        return [muon, torch.optim.AdamW(adam, betas=(0.9, 0.95))]
    adam.append({"params": matrices, "lr": r.learning_rate, "weight_decay": r.weight_decay})
    return [torch.optim.AdamW(adam, betas=(0.9, 0.95))]


def schedule(step: int, total: int, warmup: int) -> float:
    """Linear warm-up times a cosine to 0; `total` is an estimate, as epochs differ in length."""
    return min(1.0, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, step / total)))


def losses(model: Llama, ids: Tensor, author: Tensor) -> tuple[Tensor, Tensor]:
    """Mean next-token loss, and the loss of naming the author at every position."""
    inputs, labels = ids[:, :-1], ids[:, 1:]
    hidden = model.hidden(inputs.clamp(min=0))
    logits = model.logits(hidden).float()
    lm = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
    who = torch.where(labels == IGNORE, IGNORE, author[:, None])
    guess = model.score(hidden).float()
    return lm, F.cross_entropy(guess.flatten(0, 1), who.flatten(), ignore_index=IGNORE)


def story_loss(model: Llama, rows: list[list[int]], stride: int) -> tuple[float, int]:
    """Total nats and count of predicted ids; after the first window only the last `stride`
    predictions of a window count, so that each has a context of at least T - stride ids."""
    width, device = model.recipe.max_position_embeddings, model.score.weight.device
    windows, labels = [], []
    for ids in rows:
        done = 1  # BOS is given
        while done < len(ids):
            end = min(len(ids), width + 1 if done == 1 else done + stride)
            begin = max(0, end - 1 - width)
            label = [IGNORE] * (done - begin - 1) + ids[done:end]
            pad = width - len(label)
            windows.append(ids[begin : end - 1] + [0] * pad)
            labels.append(label + [IGNORE] * pad)
            done = end
    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for i in range(0, len(windows), 8):
            x = torch.tensor(windows[i : i + 8], device=device)
            y = torch.tensor(labels[i : i + 8], device=device)
            logits = model.logits(model.hidden(x)).float().flatten(0, 1)
            total += F.cross_entropy(
                logits, y.flatten(), ignore_index=IGNORE, reduction="sum"
            ).item()
            count += int((y != IGNORE).sum())
    model.train()
    return total, count


def update(
    model: Llama,
    opts: list[torch.optim.Optimizer],
    batch: tuple[Tensor, Tensor],
    scale: float,
) -> float:
    """One optimizer step at `scale` times the base learning rates; returns the LM loss."""
    device = model.score.weight.device
    for opt in opts:
        for group in opt.param_groups:
            group["lr"] = group.setdefault("base_lr", group["lr"]) * scale
    with torch.autocast(device.type, dtype=torch.bfloat16):
        lm, who = losses(model, batch[0].to(device), batch[1].to(device))
    (lm + model.recipe.author_weight * who).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for opt in opts:
        opt.step()
        opt.zero_grad(set_to_none=True)
    return lm.item()


def train(
    model: Llama,
    tokenizer: spm.SentencePieceProcessor,
    stories: list[Story],
    validation: list[list[int]],
    path: Path,
) -> Log:
    """Leave the weights of the best epoch in the model and, as bfloat16, in the file `path`."""
    r, begun = model.recipe, time.time()
    rng = random.Random(r.seed)
    spm.set_random_generator_seed(r.seed)
    opts = optimizers(model, r)
    total = r.epochs * len(epoch_batches(stories, tokenizer, r, 0.0, random.Random(r.seed)))
    step, best, best_epoch, best_state = 0, math.inf, 0, model.state_dict()
    history: list[tuple[int, float, float]] = []
    for epoch in range(1, r.epochs + 1):
        fade = r.subword_dropout * (1 - (epoch - 1) / max(1, r.epochs - 1))
        seen = []
        for batch in epoch_batches(stories, tokenizer, r, fade, rng):
            seen.append(update(model, opts, batch, schedule(step, total, r.warmup)))
            step += 1
            if step % 20 == 0:
                print(
                    f"  step {step}/{total} {seen[-1]:.3f} {time.time() - begun:.0f} s", flush=True
                )
        with torch.autocast(model.score.weight.device.type, dtype=torch.bfloat16):
            nats, count = story_loss(model, validation, r.max_position_embeddings)
        history.append((epoch, sum(seen) / len(seen), nats / count))
        print("epoch {}: training {:.4f} validation {:.4f}".format(*history[-1]), flush=True)
        if nats / count < best:
            best, best_epoch, best_state = nats / count, epoch, copy.deepcopy(model.state_dict())
            save_weights(model, path)
        elif epoch - best_epoch >= r.patience:
            break
    model.load_state_dict(best_state)
    return Log(history, step, best_epoch, time.time() - begun)


# ---------------------------------------------------------------- against going round in circles


def continuations(model: Llama, prefixes: Tensor, count: int) -> Tensor:
    """Prefixes (B, P) and `count` greedy ids after each, (B, P + count)."""
    ids = prefixes
    model.eval()
    with torch.no_grad(), torch.autocast(ids.device.type, dtype=torch.bfloat16):
        for _ in range(count):
            best = model.logits(model.hidden(ids)[:, -1]).argmax(dim=-1)
            ids = torch.cat((ids, best[:, None]), dim=1)
    model.train()
    return ids


def repeats(ids: Tensor, start: int, n: int = 4) -> Tensor:
    """True where an id at or after `start` belongs to an n-gram that its row has had before."""
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for b, row in enumerate(ids.tolist()):
        seen: set[tuple[int, ...]] = set()
        for t in range(n, len(row) + 1):
            gram = tuple(row[t - n : t])
            if gram in seen:
                mask[b, t - n : t] = True
            seen.add(gram)
    mask[:, :start] = False
    return mask


def repeated_share(
    model: Llama, tokenizer: spm.SentencePieceProcessor, stories: list[Story]
) -> float:
    """How much of 120 greedy ids after each story's first 11 belongs to a repeated 4-gram."""
    heads = [encode(tokenizer, s.body)[:12] for s in stories]
    ids = continuations(model, torch.tensor(heads, device=model.score.weight.device), 120)
    return repeats(ids, 12)[:, 12:].float().mean().item()


def unlearn_repeats(
    model: Llama, tokenizer: spm.SentencePieceProcessor, stories: list[Story], rng: random.Random
) -> None:
    """A few updates in which the model reads on as usual and learns to find the phrases that its
    own greedy continuations repeat less likely; blends the weights with those before.

    Unlikelihood training, https://arxiv.org/abs/1908.04319, section 5."""
    r, device = model.recipe, model.score.weight.device
    batches = epoch_batches(stories, tokenizer, r, 0.0, rng)
    starts = [encode(tokenizer, s.body) for s in stories]
    pieces = [tokenizer.id_to_piece(i) for i in range(r.vocab_size)]
    new_word = torch.tensor([p.startswith("\u2581") for p in pieces], device=device)
    opt = torch.optim.AdamW(model.parameters(), lr=r.repeat_learning_rate, weight_decay=0.0)
    before = copy.deepcopy(model.state_dict())
    for step in range(r.repeat_updates):
        width = rng.choice((6, 12, 24, 48))
        rows = rng.sample([ids for ids in starts if len(ids) > 100], r.repeat_rows)
        cuts = [0 if rng.random() < 0.7 else rng.randrange(len(ids) - width) for ids in rows]
        prefix = [ids[cut : cut + width] for ids, cut in zip(rows, cuts, strict=True)]
        ids = continuations(model, torch.tensor(prefix, device=device), 80)
        # how a word goes on must stay likely, or the model forgets how to spell
        mask = (repeats(ids, width) & new_word[ids])[:, 1:]
        with torch.autocast(device.type, dtype=torch.bfloat16):
            hidden = model.hidden(ids[:, :-1])
            log_p = model.logits(hidden).float().log_softmax(-1).gather(-1, ids[:, 1:, None])
            lm, who = losses(model, *(x.to(device) for x in batches[step % len(batches)]))
        unlikely = -torch.log1p(-log_p[..., 0].exp().clamp(max=1 - 1e-5))
        unlikely = (unlikely * mask).sum() / mask.sum().clamp(min=1)
        (lm + r.author_weight * who + r.repeat_weight * unlikely).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in opt.param_groups:
            group["lr"] = r.repeat_learning_rate * schedule(step, r.repeat_updates, 5)
        opt.step()
        opt.zero_grad(set_to_none=True)
        share = mask[:, width - 1 :].float().mean().item()
        print(f"  repeats {step + 1}: {share:.3f}, loss {lm.item():.3f}", flush=True)
    after = model.state_dict()
    model.load_state_dict({k: before[k].lerp(after[k], r.repeat_blend) for k in before})


def round_weights(model: Llama) -> None:
    """Every weight to the nearest bfloat16, kept as float32: what the file will hold."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.to(torch.bfloat16).float())


# ---------------------------------------------------------------- the head `score`

WORDS = (8, 16, 32, 64, 128, 256)  # passage lengths


@dataclasses.dataclass(frozen=True)
class Score:
    train: float  # accuracies
    test: dict[int, float]  # by number of words
    per: int  # test passages of each length


def passages(
    stories: list[Story], words: int, count: int, rng: random.Random
) -> list[tuple[str, int]]:
    """`count` passages per author: random stories weighted by length, random word starts."""
    found = []
    for author in range(len(AUTHORS)):
        spans = [list(re.finditer(r"\S+", s.body)) for s in stories if s.author == author]
        bodies = [s.body for s in stories if s.author == author]
        usable = [i for i, span in enumerate(spans) if len(span) >= words]
        weights = [len(spans[i]) - words + 1 for i in usable]
        for i in rng.choices(usable, weights, k=count):
            start = rng.randint(0, len(spans[i]) - words)
            begin, end = spans[i][start].start(), spans[i][start + words - 1].end()
            found.append((bodies[i][begin:end], author))
    return found


def last_hidden(model: Llama, tokenizer: spm.SentencePieceProcessor, texts: list[str]) -> Tensor:
    """The final hidden state of each text's last token, (n, D); causality makes padding safe."""
    width, device = model.recipe.max_position_embeddings, model.score.weight.device
    ids = [encode(tokenizer, text)[:width] for text in texts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    out = torch.empty(len(ids), model.recipe.hidden_size)
    model.eval()
    with torch.no_grad():
        for at in range(0, len(order), 32):
            part = order[at : at + 32]
            longest = max(len(ids[i]) for i in part)
            x = torch.tensor([ids[i] + [0] * (longest - len(ids[i])) for i in part])
            last = torch.tensor([len(ids[i]) - 1 for i in part])
            hidden = model.hidden(x.to(device)).float().cpu()
            out[torch.tensor(part)] = hidden[torch.arange(len(part)), last]
    return out


def fit_logistic(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    """(C, D) weights of a logistic regression without bias, on standardized features."""
    scale = x.std(dim=0)
    weight = torch.zeros(len(AUTHORS), x.shape[1], requires_grad=True)
    solver = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(x / scale @ weight.T, y) + penalty * weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return (weight.detach() / scale).to(torch.bfloat16).float()


def accuracy(weight: Tensor, x: Tensor, y: Tensor) -> float:
    return (F.linear(x, weight).argmax(dim=-1) == y).float().mean().item()


def train_score(
    model: Llama,
    tokenizer: spm.SentencePieceProcessor,
    parts: Parts,
) -> Score:
    """Fit `score` on training passages, choose its penalty on validation, measure on test."""
    rng = random.Random(model.recipe.seed)
    data = []
    for stories, count in zip(parts, (1000, 300, 300), strict=True):
        found = [p for words in WORDS for p in passages(stories, words, count, rng)]
        x = last_hidden(model, tokenizer, [text for text, _ in found])
        data.append((x, torch.tensor([author for _, author in found])))
    (x, y), validation, (test_x, test_y) = data
    fits = {penalty: fit_logistic(x, y, penalty) for penalty in (1e-4, 1e-3, 1e-2, 1e-1)}
    penalty = max(fits, key=lambda p: accuracy(fits[p], *validation))
    with torch.no_grad():
        model.score.weight.copy_(fits[penalty])
    per = len(test_y) // len(WORDS)
    rows = {
        w: accuracy(fits[penalty], test_x[i * per : (i + 1) * per], test_y[i * per : (i + 1) * per])
        for i, w in enumerate(WORDS)
    }
    return Score(accuracy(fits[penalty], x, y), rows, per)


# ---------------------------------------------------------------- measuring


def ngram_losses(train: list[list[int]], test: list[list[int]], vocab: int) -> tuple[float, float]:
    """Nats per id of an add-one unigram model, and of an interpolated Kneser-Ney bigram model
    whose discount is n1 / (n1 + 2 n2), on the same ids that the model predicts."""
    unigram = np.ones(vocab)
    pairs = np.zeros((vocab, vocab))
    for ids in train:
        np.add.at(unigram, ids[1:], 1)
        np.add.at(pairs, (ids[:-1], ids[1:]), 1)
    unigram /= unigram.sum()
    once, twice = (pairs == 1).sum(), (pairs == 2).sum()
    discount = once / (once + 2 * twice)
    followers = (pairs > 0).sum(axis=1)
    continuation = (pairs > 0).sum(axis=0) + 1.0
    continuation /= continuation.sum()
    total = np.maximum(pairs.sum(axis=1), 1)
    backoff = np.where(followers > 0, discount * followers / total, 1.0)
    one = two = 0.0
    for ids in test:
        a, b = np.array(ids[:-1]), np.array(ids[1:])
        one -= np.log(unigram[b]).sum()
        kept = np.maximum(pairs[a, b] - discount, 0) / total[a]
        two -= np.log(kept + backoff[a] * continuation[b]).sum()
    count = sum(len(ids) - 1 for ids in test)
    return one / count, two / count


def sample(
    model: Llama,
    tokenizer: spm.SentencePieceProcessor,
    prompt: str,
    seed: int | None = None,
    count: int = 200,
    temperature: float = 0.8,
    top_k: int = 40,
) -> str:
    """`count` more ids after the prompt: greedy without a seed, drawn from the top k with one."""
    generator = torch.Generator().manual_seed(seed or 0)
    ids = encode(tokenizer, prompt)
    device = model.score.weight.device
    model.eval()
    with torch.no_grad():
        for _ in range(count):
            hidden = model.hidden(torch.tensor([ids], device=device))[:, -1]
            best, at = model.logits(hidden).float().cpu()[0].topk(top_k)
            draw = torch.multinomial((best / temperature).softmax(-1), 1, generator=generator)
            ids.append(int(at[0] if seed is None else at[draw]))
            if ids[-1] == EOS:
                break
    return tokenizer.decode(ids)


# ---------------------------------------------------------------- the folder


def write_json(path: Path, data: dict[str, object]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def write_configs(folder: Path, r: Recipe) -> None:
    config: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "hidden_act": "silu",
        "hidden_size": r.hidden_size,
        "id2label": {str(i): name for i, name in enumerate(AUTHORS)},
        "initializer_range": 0.02,
        "intermediate_size": r.intermediate_size,
        "label2id": {name: i for i, name in enumerate(AUTHORS)},
        "max_position_embeddings": r.max_position_embeddings,
        "model_type": "llama",
        "num_attention_heads": r.num_attention_heads,
        "num_hidden_layers": r.num_hidden_layers,
        "num_key_value_heads": r.num_key_value_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": r.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": r.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.37.2",
        "use_cache": True,
        "vocab_size": r.vocab_size,
    }
    write_json(folder / "config.json", config)
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": BOS, "eos_token_id": EOS, "transformers_version": "4.37.2"},
    )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    write_json(
        folder / "special_tokens_map.json",
        {key: {"content": piece, **plain} for key, piece in names.items()},
    )
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "added_tokens_decoder": {
                str(i): {"content": piece, **plain, "special": True}
                for i, piece in enumerate(names.values())
            },
            **names,
            "clean_up_tokenization_spaces": False,
            "legacy": False,
            "model_max_length": r.max_position_embeddings,
            "pad_token": None,
            "sp_model_kwargs": {},
            "tokenizer_class": "LlamaTokenizer",
        },
    )


def save_weights(model: Llama, path: Path) -> None:
    state = {
        name: p.detach().to("cpu", torch.bfloat16).contiguous()
        for name, p in model.state_dict().items()
    }
    save_file(state, path, metadata={"format": "pt"})
    path.chmod(0o644)  # the library writes 0600, which a wheel would keep


CARD = """\
# fairytales

A LLaMA of {parameters:.2f} million parameters that writes in the manner of Andersen's and the
brothers Grimm's tales, trained from nothing for this package. It is small enough to read, to ship
in a wheel and to run on any laptop; it knows the sound of a fairy tale better than how to end
one. It is not a source of facts, and the tales carry the views of their century.

| | |
|---|---|
| architecture | `LlamaForCausalLM`: D={D}, {L} layers, {N} query and {K} key/value heads of width {H}, F={F}, V={V}, context {T}, theta {theta:g}, tied embedding |
| second head | `score.weight` (2, {D}) for `LlamaForSequenceClassification`: 0 Andersen, 1 Grimm, read at the last token |
| weights | bfloat16 safetensors, {megabytes:.1f} MB; all numbers below are those of the rounded weights |
| tokenizer | SentencePiece BPE, {V} pieces with byte fallback, learned from the training stories; a newline is the byte piece `<0x0A>` |
| licence | MIT for the weights; the corpus is in the public domain |

## Data

{stories} stories (for a few long tales of Andersen: chapters): his tales in nineteenth-century
English translations, and *Household Tales* by Jacob and Wilhelm Grimm, translated by Margaret
Hunt (1884). Whole stories were held out: {n_train} for training ({tok_train:,} tokens), {n_val}
for validation ({tok_val:,}; every decision), {n_test} for test ({tok_test:,}; only this card).
Where a chapter was held out, its neighbours may have been trained on.

A sequence is `<s>`, in half of the cases the title and an empty line, the story, `</s>`. `<s>`
always starts a story. So `Once upon a time` begins one, and so does `The Golden Fish` with two
newlines.

## Training

{rows} crops of {T} tokens a step, {optimizer} (learning rate {lr:g}, weight decay {decay:g},
{warmup} steps of warm-up, then a cosine to zero), dropout {dropout:g}, BPE-dropout {subword:g}
fading to 0, and a side task of weight {author:g} for the trunk: name the author at every
position. {steps} steps ({epochs} epochs) took {minutes:.0f} minutes on {machine}; the weights are
those of epoch {best}, the best on the validation stories.

So small a model goes round in circles when the likeliest token is always taken. {rounds} rounds of
{updates} more updates at a learning rate of at most {repeat_lr:g} therefore added unlikelihood training
(<https://arxiv.org/abs/1908.04319>): besides reading on, the model made greedy continuations of
story beginnings and learned to find the words in them that repeat a 4-gram less likely (only the
first piece of each word, so that it does not forget how to spell). After each round the weights
moved {blend:.0%} of the way from those before to those after. That lowered the share of repeated
4-grams in greedy continuations of the validation stories from {circles_before:.0%} to {circles_after:.0%}.

| epoch | training loss (with dropout) | validation loss |
|---|---|---|
{log}

## Language model on the test stories

Each token is predicted from at least {half} tokens of its story (fewer at its beginning); titles
and `</s>` count. The bigram model is interpolated Kneser-Ney, the unigram model add-one, both
counted on the training stories with the same tokenizer.

| | nats per token | bits per byte |
|---|---|---|
| unigram | {uni:.3f} | {uni_bits:.3f} |
| bigram | {bi:.3f} | {bi_bits:.3f} |
| **fairytales, test stories** | **{lm:.3f}** | **{lm_bits:.3f}** |
| fairytales, validation stories | {val:.3f} | {val_bits:.3f} |
| fairytales, training stories (each 20th) | {fit:.3f} | {fit_bits:.3f} |

## Who wrote this passage?

A logistic regression on the frozen, rounded trunk's final hidden state of the last token, fitted
on passages of many lengths from the training stories (accuracy there {score_train:.1%}). {per}
random passages per length from the {n_test} test stories, half of them by either author: the
majority baseline is 50 %. Passages of so few stories are not independent; read the numbers as
give or take five points.

| words | {words} |
|---|{rule}|
| accuracy | {accuracies} |

## Samples

Unedited, {count} tokens or until `</s>`; the prompt is included.

{samples}

## How to reproduce

    pip install torch sentencepiece numpy safetensors
    python reference_outputs/train_fairytales.py CORPUS_FOLDER -o FOLDER{options}

with `andersen.txt` and `grimm.txt` in the corpus folder (title line, blank line, paragraphs; four
newlines between stories). Another machine, thread count or version of torch gives slightly other
weights.
"""  # noqa: E501

SAMPLES = (
    ("Once upon a time", None),
    ("Once upon a time", 1),
    ("The Golden Fish\n\n", 2),
)


def card(
    model: Llama,
    tokenizer: spm.SentencePieceProcessor,
    parts: Parts,
    log: Log,
    circles: tuple[float, float],
    score: Score,
    machine: str,
    options: str,
) -> str:
    r = model.recipe
    ids = [[[*encode(tokenizer, s.text), EOS] for s in part] for part in parts]
    tokens = [sum(len(row) - 1 for row in part) for part in ids]
    sizes = [sum(len(s.text.encode()) for s in part) for part in parts]
    half = r.max_position_embeddings // 2
    some = ids[0][::20]
    some_bytes = sum(len(s.text.encode()) for s in parts[0][::20])
    unigram, bigram = ngram_losses(ids[0], ids[2], r.vocab_size)
    numbers: dict[str, float] = {}
    for name, rows, size in (
        ("lm", ids[2], sizes[2]),
        ("val", ids[1], sizes[1]),
        ("fit", some, some_bytes),
    ):
        nats, count = story_loss(model, rows, half)
        numbers |= {name: nats / count, f"{name}_bits": nats / math.log(2) / size}
    for name, value in (("uni", unigram), ("bi", bigram)):
        numbers |= {name: value, f"{name}_bits": value * tokens[2] / math.log(2) / sizes[2]}
    samples = []
    for prompt, seed in SAMPLES:
        how = "greedy" if seed is None else f"temperature 0.8, top-k 40, seed {seed}"
        text = sample(model, tokenizer, prompt, seed)
        quoted = "\n".join(f"> {line}".rstrip() for line in text.split("\n"))
        samples.append(f"Prompt `{json.dumps(prompt)}`, {how}:\n\n{quoted}")
    log_rows = [f"| {e} | {a:.3f} | {b:.3f} |" for e, a, b in log.history]
    parameters = sum(p.numel() for p in model.parameters())
    return CARD.format(
        parameters=parameters / 1e6,
        megabytes=parameters * 2 / 1e6,
        D=r.hidden_size,
        L=r.num_hidden_layers,
        N=r.num_attention_heads,
        K=r.num_key_value_heads,
        H=r.head_dim,
        F=r.intermediate_size,
        V=r.vocab_size,
        T=r.max_position_embeddings,
        theta=r.rope_theta,
        stories=sum(map(len, parts)),
        n_train=len(parts[0]),
        n_val=len(parts[1]),
        n_test=len(parts[2]),
        tok_train=tokens[0],
        tok_val=tokens[1],
        tok_test=tokens[2],
        rows=r.rows,
        optimizer="Muon for the layers' matrices and AdamW for the rest"
        if r.optimizer == "muon"
        else "AdamW",
        lr=r.learning_rate,
        decay=r.weight_decay,
        warmup=r.warmup,
        dropout=r.dropout,
        subword=r.subword_dropout,
        author=r.author_weight,
        steps=log.steps,
        epochs=len(log.history),
        minutes=log.seconds / 60,
        machine=machine,
        rounds=r.repeat_rounds,
        updates=r.repeat_updates,
        repeat_lr=r.repeat_learning_rate,
        circles_before=circles[0],
        circles_after=circles[1],
        blend=r.repeat_blend,
        best=log.best_epoch,
        log="\n".join(log_rows),
        half=half,
        score_train=score.train,
        per=score.per,
        words=" | ".join(str(w) for w in score.test),
        rule="---|" * (len(score.test) - 1) + "---",
        accuracies=" | ".join(f"{a:.1%}" for a in score.test.values()),
        count=200,
        samples="\n\n".join(samples),
        options=options,
        **numbers,
    )


def changed(recipe: Recipe, settings: list[str]) -> Recipe:
    """The recipe with each `name=value` applied, the value read as the field's type."""
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in {f.name for f in dataclasses.fields(Recipe)}:
            raise SystemExit(f"no such setting: {name!r}")
        recipe = dataclasses.replace(recipe, **{name: type(getattr(recipe, name))(value)})
    return recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("corpus", type=Path, help="folder with andersen.txt and grimm.txt")
    parser.add_argument("-o", "--output", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--machine", default="one machine", help="how the card names it")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument(
        "--language-model",
        type=Path,
        metavar="FILE",
        help="keep the trained language model here; where the file is there, go on from it",
    )
    args = parser.parse_args()
    recipe = changed(Recipe(), args.set)
    args.output.mkdir(parents=True, exist_ok=True)
    parts = split(read_stories(args.corpus))
    train_tokenizer(parts[0], recipe.vocab_size, args.output / "tokenizer.model")
    tokenizer = spm.SentencePieceProcessor(str(args.output / "tokenizer.model"))
    write_configs(args.output, recipe)
    torch.manual_seed(recipe.seed)
    spm.set_random_generator_seed(recipe.seed)  # for BPE-dropout
    model = Llama(recipe).to(args.device)
    validation = [[*encode(tokenizer, s.text), EOS] for s in parts[1]]
    weights = args.output / "model.safetensors"
    if args.language_model and args.language_model.exists():
        state, log = torch.load(args.language_model, weights_only=False)
        model.load_state_dict(state)
    else:
        log = train(model, tokenizer, parts[0], validation, weights)
        if args.language_model:
            torch.save((model.state_dict(), log), args.language_model)
    torch.manual_seed(recipe.seed)  # what follows is the same whether trained now or read
    round_weights(model)  # the best epoch's file could be loaded here just as well
    before = repeated_share(model, tokenizer, parts[1])
    for number in range(recipe.repeat_rounds):
        unlearn_repeats(model, tokenizer, parts[0], random.Random(recipe.seed + number))
    round_weights(model)
    circles = (before, repeated_share(model, tokenizer, parts[1]))
    score = train_score(model, tokenizer, parts)
    save_weights(model, weights)
    options = "".join(f" --set {s}" for s in args.set)
    text = card(model, tokenizer, parts, log, circles, score, args.machine, options)
    (args.output / "README.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
