"""Train the embedded model, llmcoopt/models/tiny: a small Llama that writes children's stories.

Needs PyTorch (2.1 or newer), tokenizers and safetensors; downloads nothing. A CUDA device does it in minutes, a CPU in hours.

    python tools/train_tiny.py --stories part1.txt part2.txt --prose novel.txt.gz --out tiny --minutes 5 --compile

Method. The text is small (a few MB), so overfitting is the danger. Several larger teachers are trained first, each regularised and stopped
at its best held-out loss; the model that is kept then learns from the average of their predictions as well as from the text (distillation).
Every pass over the text shuffles the documents and cuts some words into smaller tokens than usual (BPE dropout). The weights kept are a
moving average. Teachers need time, some 1,000 steps each: cut short, they are worse than the model would be alone, and hold it back.

Three splits, by the hash of each story: `valid` (3 %) chooses the checkpoint, `test` (3 %) is only reported, the rest is trained on. A
story that shares half of its eight-word runs with an earlier one is dropped, so that no near-copy of a held-out story is trained on.
"""

import argparse
import copy
import gzip
import hashlib
import json
import math
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

EOT = "<|endoftext|>"
VOCAB = 2048
CONTEXT = 1024

# --- text --------------------------------------------------------------------------------------------------------------------------------


def read_text(path):
    opener = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8", errors="replace") as file:
        return file.read().lstrip("\ufeff").replace("\r\n", "\n")


def plain_quotes(text):
    """Typographic quotes and dashes to ASCII; also where UTF-8 was once read as Windows-1252, which TinyStories has in places."""
    for wrong, right in (("â€œ", '"'), ("â€™", "'"), ("â€˜", "'"), ("â€”", "—"), ("â€“", "–"), ("â€\x9d", '"'), ("â€", '"')):
        text = text.replace(wrong, right)
    return text.translate(str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": "--", "…": "...", "\u00a0": " "}))


OPENING = re.compile(
    r"\n+(?=Once upon a time|Once,|Once there|There once|There was once|(?:One (?:[a-z]+ )?day|In a [a-z ]+), (?:an?|there) "
    r"|[A-Z][a-z]+ (?:was|is) an? |[A-Z][a-z]+ and [A-Z][a-z]+ (?:(?:are|were) (?:friends|best|good|twins|playing)|(?:like|love)d? to ))"
)
SINGLE = re.compile(
    r"(?<!\n)\n(?!\n|[\"'a-z]|(?:And|But|So|Then|The|They|He|She|It|As|After|When|While|Finally|From|Suddenly|Next|Later|Inside|That|This|Just|At)\b)"
)


def split_stories(text):
    """Stories of one file. Without end marks: one newline between stories and two between paragraphs, or two newlines between both."""
    if EOT in text:
        return text.split(EOT)
    return (SINGLE if len(SINGLE.findall(text)) * 10 > text.count("\n\n") else OPENING).split(text)


def clean_story(story):
    """One line a paragraph, ASCII; None for what is cut off, too short, or probably several stories run together."""
    lines = [" ".join(line.split()) for line in plain_quotes(story).split("\n")]
    story = "\n".join(line for line in lines if line)
    whole = (story[-1:] in ".!?\"'" or story.endswith("The End")) and (story[:1].isupper() or story[:1] == '"')
    return story if whole and story.isascii() and 150 <= len(story) <= 3000 else None


def drop_near_copies(stories):
    seen, kept = set(), []
    for story in stories:
        words = story.lower().split()
        runs = {" ".join(words[i : i + 8]) for i in range(max(1, len(words) - 7))}
        if sum(run in seen for run in runs) * 2 < len(runs):
            kept.append(story)
        seen |= runs
    return kept


def read_stories(paths):
    """The three splits as lists of stories: train, valid, test."""
    stories = [clean_story(story) for path in paths for story in split_stories(read_text(path))]
    splits = {"train": [], "valid": [], "test": []}
    for story in drop_near_copies(story for story in stories if story):
        bucket = int.from_bytes(hashlib.sha256(story.encode()).digest()[:4], "big") % 100
        splits["valid" if bucket < 3 else "test" if bucket < 6 else "train"].append(story)
    return splits


def read_prose(paths):
    """Chapters: paragraphs with their lines joined; anything outside the START and END lines of an e-book is left out."""
    chapters = []
    for path in paths:
        text = plain_quotes(read_text(path))
        marks = re.split(r"\*\*\* ?(?:START|END) OF TH[^*]*\*\*\*", text)
        text = marks[1] if len(marks) >= 3 else text
        for chapter in re.split(r"\n(?=(?:CHAPTER|BOOK|[IVX]+\.) ?)", text):
            paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", chapter)]
            chapter = "\n".join(part for part in paragraphs if len(part) > 40)
            if len(chapter) > 1000:
                chapters.append(re.sub(r"[^\x00-\x7f]", "", chapter).replace("_", ""))
    return chapters


def train_tokenizer(texts):
    """Byte-level BPE: 256 bytes, <|endoftext|> as id 0 (it begins and ends every document), the rest merges."""
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[EOT], initial_alphabet=alphabet, show_progress=False)
    tok.train_from_iterator(texts, trainer)
    tok.post_processor = tokenizers.processors.TemplateProcessing(single=f"{EOT} $A", pair=f"{EOT} $A {EOT} $B", special_tokens=[(EOT, 0)])
    return tok


class Passes(torch.utils.data.Dataset):
    """Item i: one pass over the text, shuffled and tokenised afresh, as rows of CONTEXT + 1 ids; the same for the same seed."""

    def __init__(self, tok, stories, prose, count, args, seed):
        self.tok = tokenizers.Tokenizer.from_str(tok.to_str())
        self.tok.model.dropout = args.bpe_dropout or None
        self.stories, self.prose, self.count, self.seed = stories, prose, count, seed
        self.prose_bytes = args.prose_share * sum(map(len, stories))

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        rng, docs, room = random.Random(self.seed * 10007 + number), list(self.stories), self.prose_bytes
        for chapter in rng.sample(self.prose, len(self.prose)):
            if room <= 0:
                break
            docs.append(chapter)
            room -= len(chapter)
        rng.shuffle(docs)
        ids, starts = [], []
        for encoding in self.tok.encode_batch(docs):
            starts.append(len(ids))
            ids += encoding.ids
        ids.append(0)
        rows, begin, doc = [], 0, 0
        while begin + CONTEXT + 1 <= len(ids):
            rows.append(ids[begin : begin + CONTEXT + 1])
            end = begin + CONTEXT
            while doc + 1 < len(starts) and starts[doc + 1] <= end:
                doc += 1
            # A row starts with a document: the one the last row cut is given again in full, unless it fills a row by itself.
            begin = starts[doc] if starts[doc] > begin else end
        rng.shuffle(rows)
        return torch.tensor(rows)


# --- model -------------------------------------------------------------------------------------------------------------------------------


@dataclass
class Shape:
    hidden: int = 256
    heads: int = 8
    layers: int = 4
    ffn: int = 768

    @property
    def head_dim(self):
        return self.hidden // self.heads


class RMSNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.heads = shape.heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(shape.hidden, shape.hidden, bias=False) for _ in range(4))

    def forward(self, x, cos, sin, dropout):
        rows, n, hidden = x.shape
        q, k, v = (proj(x).view(rows, n, self.heads, -1).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (t * cos + torch.cat((-t[..., t.shape[-1] // 2 :], t[..., : t.shape[-1] // 2]), -1) * sin for t in (q, k))
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True, dropout_p=dropout if self.training else 0.0)
        return self.o_proj(out.transpose(1, 2).reshape(rows, n, hidden))


class FeedForward(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(shape.hidden, shape.ffn, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(shape.hidden), RMSNorm(shape.hidden)
        self.self_attn, self.mlp = Attention(shape), FeedForward(shape)


class Llama(nn.Module):
    """Module names are those of the checkpoint format, without the leading `model.`; the output head is the embedding."""

    def __init__(self, shape, dropout):
        super().__init__()
        self.shape, self.dropout = shape, dropout
        self.embed_tokens = nn.Embedding(VOCAB, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden)
        angle = torch.outer(torch.arange(CONTEXT), 10000.0 ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim))
        self.register_buffer("cos", torch.cat((angle, angle), -1).cos(), persistent=False)
        self.register_buffer("sin", torch.cat((angle, angle), -1).sin(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * shape.layers) if deep else 0.02)

    def forward(self, ids):
        """ids [rows, n] -> logits [rows, n, VOCAB]."""
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        x = F.dropout(self.embed_tokens(ids), self.dropout, self.training)
        for layer in self.layers:
            x = x + F.dropout(layer.self_attn(layer.input_layernorm(x), cos, sin, self.dropout), self.dropout, self.training)
            x = x + F.dropout(layer.mlp(layer.post_attention_layernorm(x)), self.dropout, self.training)
        return F.linear(self.norm(x), self.embed_tokens.weight)


# --- training ----------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(predict, tok, stories, device):
    """Mean loss of the stories, each alone from mark to mark: nats a token, nats a byte. `predict`: ids -> log-probabilities."""
    total = tokens = 0
    encoded = sorted(([*e.ids, 0] for e in tok.encode_batch(stories)), key=len)
    for at in range(0, len(encoded), 32):
        group = [torch.tensor(ids[: CONTEXT + 1]) for ids in encoded[at : at + 32]]
        ids = nn.utils.rnn.pad_sequence(group, batch_first=True, padding_value=-100).to(device)
        target = ids[:, 1:]
        logp = predict(ids[:, :-1].clamp(min=0))
        total += F.nll_loss(logp.flatten(0, 1), target.flatten(), ignore_index=-100, reduction="sum").item()
        tokens += (target >= 0).sum().item()
    return total / tokens, total / sum(len(s.encode()) for s in stories)


def autocast(device):
    return torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda")


def log_probs(models, ids, device, forward=Llama.__call__):
    """Log of the mean of the models' probabilities."""
    with autocast(device):
        if len(models) == 1:
            return forward(models[0], ids).float().log_softmax(-1)
        mean = sum(forward(model, ids).float().softmax(-1) for model in models) / len(models)
    return mean.clamp_(min=1e-9).log_()


def losses(logits, target, wanted, share):
    """Loss to minimise and loss of the text; `wanted`: the teachers' log-probabilities or None, `share`: their weight."""
    logp = logits.float().log_softmax(-1)
    text = F.nll_loss(logp, target)
    if wanted is None:
        return text, text
    return (1 - share) * text + share * (wanted.exp() * (wanted - logp)).sum(-1).mean(), text


def optimizer(model, lr, weight_decay):
    """AdamW; matrices decay, the norms and the (tied) embedding do not."""
    decayed = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=next(model.parameters()).is_cuda)


class Trainer:
    """What all models of a run share: the text, the options and, with --compile, the compiled functions."""

    def __init__(self, args, tok, splits, prose):
        self.args, self.tok, self.splits, self.prose, self.device = args, tok, splits, prose, args.device
        self.forward = torch.compile(Llama.forward, dynamic=False) if args.compile else Llama.__call__
        self.losses = torch.compile(losses, dynamic=False) if args.compile else losses

    def passes(self, count, seed):
        data = Passes(self.tok, self.splits["train"], self.prose, count, self.args, seed)
        workers = 8 if self.device == "cuda" else 0
        return torch.utils.data.DataLoader(data, batch_size=None, num_workers=workers)

    def held_out(self, models):
        return evaluate(lambda ids: log_probs(models, ids, self.device), self.tok, self.splits["valid"], self.device)[0]

    def step(self, model, opt, rows, teachers):
        """One update; returns the loss of the text, still on the device."""
        ids, target, wanted = rows[:, :-1], rows[:, 1:].flatten(), None
        if teachers:
            with torch.no_grad():
                wanted = log_probs(teachers, ids, self.device, self.forward).flatten(0, 1)
        with autocast(self.device):
            logits = self.forward(model, ids).flatten(0, 1)
        loss, text_loss = self.losses(logits, target, wanted, self.args.distill)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        return text_loss.detach()

    def fit(self, name, shape, seed, dropout, weight_decay, lr, epochs, end, share=1.0, teachers=(), keep=None):
        """Train for `epochs` passes, or for `share` of what is left until `end` after the first step (set-up and compilation are over then).

        Returns the averaged weights at their best held-out loss; `keep`, if given, is called with each new best.
        """
        torch.manual_seed(seed)
        model = Llama(shape, dropout).to(self.device)
        opt, average, batch = optimizer(model, lr, weight_decay), copy.deepcopy(model).eval(), self.args.batch
        best_loss, best, step, done, begun, seconds = math.inf, None, 0, 0.0, time.time(), math.inf

        def look():
            nonlocal best_loss, best
            now = self.held_out([average])
            print(f"{name}: {time.time() - begun:5.0f} s  step {step}  train {text_loss.item():.4f}  valid {now:.4f}", flush=True)
            if now < best_loss:
                best_loss, best = now, copy.deepcopy(average.state_dict())
                if keep:
                    keep(average)
            return now

        for rows in self.passes(epochs, seed):
            rows, steps = rows.to(self.device), max(1, len(rows) // batch)
            for at in range(steps):
                done = max(step / (epochs * steps), (time.time() - begun) / seconds)
                if done >= 1:
                    break
                for group in opt.param_groups:
                    group["lr"] = lr * min((step + 1) / 100, 1 - done)
                model.train()
                text_loss = self.step(model, opt, rows[at * batch : (at + 1) * batch], teachers)
                step += 1
                with torch.no_grad():
                    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), max(1 / step, 0.003))
                if step == 1:
                    begun = time.time()
                    seconds = max(share * (end - begun), 1e-3)
                if step % self.args.eval_every == 0 and look() > best_loss + 0.08:
                    done = 1  # it overfits and will not come back
            if done >= 1:
                break
        look()
        average.load_state_dict(best)
        print(f"{name}: {step} steps in {time.time() - begun:.0f} s, best valid {best_loss:.4f}", flush=True)
        return average


# --- output ------------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(model, tok, prompt, temperature, top_p, length, device, seed):
    """Continue `prompt` up to <|endoftext|>; temperature 0 is greedy. Every token recomputes all: for a look at the result only."""
    ids, draw = tok.encode(prompt).ids, torch.Generator(device).manual_seed(seed)
    for _ in range(length):
        logits = model(torch.tensor([ids[-CONTEXT:]], device=device))[0, -1].float()
        if temperature == 0:
            ids.append(logits.argmax().item())
        else:
            probs, order = (logits / temperature).softmax(-1).sort(descending=True)
            probs[probs.cumsum(0) - probs >= top_p] = 0
            ids.append(order[torch.multinomial(probs, 1, generator=draw)].item())
        if ids[-1] == 0:
            break
    return tok.decode(ids, skip_special_tokens=True)


def save(model, tok, out):
    out.mkdir(parents=True, exist_ok=True)
    shape = model.shape
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
    }
    generation = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "do_sample": True, "temperature": 0.7, "top_p": 0.95}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOT,
        "eos_token": EOT,
        "pad_token": EOT,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    for name, content in (("config", config), ("generation_config", generation), ("tokenizer_config", tokenizer_config)):
        (out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    tok.save(str(out / "tokenizer.json"))
    weights = {f"model.{name}": value.to("cpu", torch.bfloat16).contiguous() for name, value in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", nargs="+", type=Path, required=True, help="text files of stories (.txt or .txt.gz)")
    parser.add_argument("--prose", nargs="*", type=Path, default=[], help="text files of other prose")
    parser.add_argument("--prose-share", type=float, default=0.3, help="bytes of prose a pass, as a share of the stories' (%(default)s)")
    parser.add_argument("--tokenizer", type=Path, help="use this tokenizer.json instead of training one")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--minutes", type=float, default=5.0, help="time limit of the training, all together (%(default)s)")
    parser.add_argument("--epochs", type=int, default=100, help="passes over the text at most (%(default)s)")
    parser.add_argument("--lr", type=float, default=3e-3, help="(%(default)s)")
    parser.add_argument("--dropout", type=float, default=0.0, help="(%(default)s; without teachers take 0.1)")
    parser.add_argument("--weight-decay", type=float, default=1.0, help="(%(default)s)")
    parser.add_argument("--teachers", type=int, default=4, help="models to distil from; 0: learn from the text alone (%(default)s)")
    parser.add_argument("--teacher-hidden", type=int, default=512, help="width of a teacher (%(default)s)")
    parser.add_argument("--teacher-layers", type=int, default=6, help="depth of a teacher (%(default)s)")
    parser.add_argument("--teacher-share", type=float, default=0.5, help="share of the time for all teachers together (%(default)s)")
    parser.add_argument("--teacher-epochs", type=int, default=24, help="passes of each teacher at most (%(default)s)")
    parser.add_argument("--teacher-lr", type=float, default=2e-3, help="(%(default)s)")
    parser.add_argument("--teacher-dropout", type=float, default=0.1, help="(%(default)s)")
    parser.add_argument("--teacher-weight-decay", type=float, default=1.0, help="(%(default)s)")
    parser.add_argument("--distill", type=float, default=0.8, help="weight of the teachers against the text (%(default)s)")
    parser.add_argument("--bpe-dropout", type=float, default=0.02, help="share of merges left out in training text (%(default)s)")
    parser.add_argument("--batch", type=int, default=16, help=f"rows of {CONTEXT} tokens a step (%(default)s)")
    parser.add_argument("--eval-every", type=int, default=100, help="steps between two looks at the held-out loss (%(default)s)")
    parser.add_argument("--samples", type=int, default=3, help="stories to print at the end (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="use torch.compile (worth it from about 3 minutes on)")
    return parser.parse_args()


def main():
    args = arguments()
    begun = time.time()
    torch.set_float32_matmul_precision("high")
    splits, prose = read_stories(args.stories), read_prose(args.prose)
    for name, part in (*splits.items(), ("prose", prose)):
        print(f"{name}: {len(part)} documents, {sum(map(len, part))} bytes")
    if not all(splits.values()):
        raise SystemExit("too few stories: each of the splits train, valid and test needs at least one")
    tok = tokenizers.Tokenizer.from_file(str(args.tokenizer)) if args.tokenizer else train_tokenizer(splits["train"])

    trainer, teachers = Trainer(args, tok, splits, prose), []
    wide = Shape(hidden=args.teacher_hidden, layers=args.teacher_layers, ffn=3 * args.teacher_hidden)
    options = {
        "dropout": args.teacher_dropout,
        "weight_decay": args.teacher_weight_decay,
        "lr": args.teacher_lr,
        "epochs": args.teacher_epochs,
    }
    teachers_end = begun + 60 * args.minutes * args.teacher_share
    for number in range(1, args.teachers + 1):
        share = 1 / (args.teachers + 1 - number)
        teachers.append(trainer.fit(f"teacher {number}", wide, args.seed + number, end=teachers_end, share=share, **options))
    if teachers:
        print(f"teachers together: valid {trainer.held_out(teachers):.4f}")
    options = {"dropout": args.dropout, "weight_decay": args.weight_decay, "lr": args.lr, "epochs": args.epochs, "teachers": teachers}
    end = begun + 60 * args.minutes
    model = trainer.fit("tiny", Shape(), args.seed, end=end, keep=lambda best: save(best, tok, args.out), **options)

    model = model.bfloat16().float().eval()  # the losses and samples below are of the weights as they are saved
    save(model, tok, args.out)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {time.time() - begun:.0f} s in all, saved to {args.out}")
    for name in ("train", "valid", "test"):
        stories = splits[name][:400]
        token, byte = evaluate(lambda x: model(x).float().log_softmax(-1), tok, stories, args.device)
        print(f"{name}: {token:.4f} nats a token, {byte:.4f} nats a byte ({len(stories)} stories)")
    for seed in range(args.samples):
        print(f"--- sample {seed}\n{sample(model, tok, 'Once upon a time', 0.7, 0.95, 400, args.device, seed)}")


if __name__ == "__main__":
    main()
