"""Train baton-tiny: `python -m baton.models.training.train OUT [--seconds 500]`.

One conversation per row; only what the assistant says is learned. Short rows first, so that the
model learns to look things up, then rows of the whole context.
"""

import argparse
import logging
import math
import multiprocessing as mp
import queue
import time
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn import functional

from baton.models.training.exam import EXAM
from baton.models.training.export import export
from baton.models.training.network import Network, Shape
from baton.models.training.rows import batch, fill_row
from baton.models.training.tokens import encode_turns, train_tokenizer

log = logging.getLogger("train")

TOKENS_PER_STEP = 131_072
# Up to this share of the time, rows have these lengths.
CURRICULUM = ((0.25, (512,)), (0.45, (512, 1024)), (1.0, (512, 1024, 4096, 4096)))


def make_rows(
    seed: int,
    tokenizer_json: str,
    tokens_per_step: int,
    progress: "Synchronized[float]",
    out: "mp.Queue[Any]",
) -> None:
    """A process that makes batches for as long as somebody takes them."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    rng = Random(seed)
    while True:
        lengths = next(lengths for share, lengths in CURRICULUM if progress.value <= share)
        length = rng.choice(lengths)
        out.put(batch(rng, tokenizer, max(1, tokens_per_step // length), length))


def loss_of(network: Network, forward: Any, ids: torch.Tensor, learned: torch.Tensor) -> Any:
    hidden = forward(ids[:, :-1])
    targets = ids[:, 1:][learned]
    logits = network.logits(hidden[learned])
    return functional.cross_entropy(logits.float(), targets)


def examine(
    network: Network, tokenizer: Tokenizer, device: str, *, count: int, seed: int
) -> dict[str, float]:
    """Share of right last answers per task, on fresh prompts."""
    network.eval()
    accuracy = {}
    for task, (make, _) in EXAM.items():
        rng = Random(f"{seed} {task}")
        right = 0
        for _ in range(count):
            turns = make(rng)
            tokens, mask = encode_turns(tokenizer, turns)
            ids = np.zeros(len(tokens) + 1, dtype=np.int64)
            learned = np.zeros(len(tokens), dtype=np.uint8)
            fill_row(ids, learned, tokens, mask)
            last = sum(encode_turns(tokenizer, turns[-1:])[1])
            row = torch.from_numpy(ids).to(device)[None]
            with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16):
                hidden = network(row[:, :-1])[0, -last:]
                chosen = network.logits(hidden).argmax(-1)
            right += bool((chosen == row[0, -last:]).all())
        accuracy[task] = right / count
    network.train()
    return accuracy


def train(
    out: Path,
    *,
    seconds: float,
    workers: int,
    rate: float,
    tokens_per_step: int,
    seed: int,
    start: Path | None,
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = train_tokenizer(1)
    network = Network(Shape(vocab_size=tokenizer.get_vocab_size())).to(device)
    if start is not None:
        weights = load_file(start / "model.safetensors")
        network.load_state_dict(
            {name.removeprefix("model."): value.float() for name, value in weights.items()}
        )
    log.info("%.2f M parameters", sum(p.numel() for p in network.parameters()) / 1e6)
    context = mp.get_context("spawn")
    progress = context.Value("d", 0.0 if start is None else 0.5)
    rows: mp.Queue[Any] = context.Queue(maxsize=2 * workers)
    makers = [
        context.Process(
            target=make_rows,
            args=(1000 * seed + index, tokenizer.to_str(), tokens_per_step, progress, rows),
            daemon=True,
        )
        for index in range(workers)
    ]
    for maker in makers:
        maker.start()
    run(network, rows, progress, device=device, seconds=seconds, rate=rate, first=start is None)
    for maker in makers:
        maker.terminate()
    export(network, tokenizer, out)
    for task, share in examine(network, tokenizer, device, count=300, seed=seed).items():
        log.info("%-22s %.3f", task, share)


def run(
    network: Network,
    rows: "mp.Queue[Any]",
    progress: "Synchronized[float]",
    *,
    device: str,
    seconds: float,
    rate: float,
    first: bool,
) -> None:
    """Steps until the time is up; the learning rate follows the clock."""
    decayed = [p for p in network.parameters() if p.dim() >= 2]
    others = [p for p in network.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=rate,
        betas=(0.9, 0.98),
        fused=device == "cuda",
    )
    forward = torch.compile(network, dynamic=False) if device == "cuda" else network
    began = time.monotonic()
    step, tokens, waited = 0, 0, 0.0
    while (share := (time.monotonic() - began) / seconds) < 1:
        progress.value = share if first else 0.5 + share / 2
        warm = min(1.0, (step + 1) / 200)
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
        asked = time.monotonic()
        try:
            ids_host, learned_host = rows.get(timeout=60)
        except queue.Empty as error:
            raise RuntimeError("no process makes rows any more") from error
        waited += time.monotonic() - asked
        ids = torch.from_numpy(ids_host.astype(np.int64)).to(device, non_blocking=True)
        learned = torch.from_numpy(learned_host).to(device, non_blocking=True).bool()
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = loss_of(network, forward, ids, learned)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        step += 1
        tokens += ids.numel()
        if step % 200 == 0:
            log.info(
                "step %d, %.0f %% of the time, loss %.4f, %.2f M tokens/s, %.0f %% waiting",
                step,
                100 * share,
                loss.item(),
                tokens / (time.monotonic() - began) / 1e6,
                100 * waited / (time.monotonic() - began),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=500)
    parser.add_argument("--workers", type=int, default=max(1, (mp.cpu_count() or 2) - 2))
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--tokens-per-step", type=int, default=TOKENS_PER_STEP)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start", type=Path, help="a folder to go on from")
    arguments = parser.parse_args()
    logging.basicConfig(level="INFO", format="%(message)s")
    train(
        arguments.out,
        seconds=arguments.seconds,
        workers=arguments.workers,
        rate=arguments.rate,
        tokens_per_step=arguments.tokens_per_step,
        seed=arguments.seed,
        start=arguments.start,
    )


if __name__ == "__main__":
    main()
