"""The exam through Baton's own engine: `python -m baton.models.training.evaluate [--count 100]`.

Fresh prompts with held-out names and codes, answered greedily in fp32; prints accuracies against
targets. Exit code 1 when a target is missed.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

from rich.console import Console
from rich.table import Column, Table
from tokenizers import Tokenizer

from baton.common.sampling import SamplingParams
from baton.engine.llm import LLM
from baton.models.conversations.probes import DecileScore, by_decile, recall_probes
from baton.models.conversations.tasks import Turn
from baton.models.training.exam import EXAM, RECALLS
from baton.models.training.tokens import encode_prompt, load_tokenizer

MODEL = Path(__file__).resolve().parents[1] / "baton_tiny"
# Training draws from seeds that are numbers; these are words and meet none of them.
SEED = "evaluation"
# The longest answer is a JSON object of six facts.
MAX_ANSWER_TOKENS = 120
# Whole prompts in one step are the fastest on a CPU: a chunk gathers all that came before it.
TOKENS_PER_STEP = 16_384
NUM_BLOCKS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """`right` of `prompts` answers; recall has its deciles."""

    task: str
    prompts: int
    right: int
    target: float
    deciles: list[DecileScore] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        return self.right / self.prompts

    @property
    def reaches_target(self) -> bool:
        return self.accuracy >= self.target


def open_model(folder: Path = MODEL) -> LLM:
    """The model in fp32, for many prompts at once."""
    return LLM(
        folder,
        dtype="float32",
        num_blocks=NUM_BLOCKS,
        max_num_batched_tokens=TOKENS_PER_STEP,
        max_num_seqs=64,
    )


def evaluate_task(llm: LLM, tokenizer: Tokenizer, task: str, *, count: int, seed: int = 0) -> Score:
    """The score of `count` fresh prompts of one task of the exam."""
    make, target = EXAM[task]
    depths: list[float] = []
    if task in RECALLS:
        num_tokens, num_facts = RECALLS[task]
        probes = recall_probes(seed, count, num_tokens=num_tokens, num_facts=num_facts)
        depths = [probe.depth for probe in probes]
        chats = [probe.turns for probe in probes]
    else:
        rng = Random(f"{SEED} {seed} {task}")
        chats = [make(rng) for _ in range(count)]
    said = answers(llm, tokenizer, chats)
    is_right = [
        matches(task, text, turns[-1].assistant) for text, turns in zip(said, chats, strict=True)
    ]
    return Score(
        task=task,
        prompts=count,
        right=sum(is_right),
        target=target,
        deciles=by_decile(zip(depths, is_right, strict=True)) if depths else [],
    )


def answers(llm: LLM, tokenizer: Tokenizer, chats: list[list[Turn]]) -> list[str]:
    """What the model says to the last turn of each chat; earlier answers are given."""
    sampling = SamplingParams(max_tokens=MAX_ANSWER_TOKENS, temperature=0.0)
    prompts = [encode_prompt(tokenizer, turns) for turns in chats]
    return [done.text for done in llm.generate(prompts, sampling)]


def matches(task: str, said: str, expected: str) -> bool:
    """The same text; JSON must parse and be equal."""
    if task != "JSON":
        return said == expected
    try:
        return bool(json.loads(said) == json.loads(expected))
    except json.JSONDecodeError:
        return False


def show(scores: list[Score]) -> None:
    """The table of tasks, and recall by depth."""
    console = Console(width=100)
    tasks = Table("task", *(_number(name) for name in ("prompts", "right", "accuracy", "target")))
    for score in scores:
        missed = "" if score.reaches_target else " missed"
        tasks.add_row(
            score.task,
            str(score.prompts),
            str(score.right),
            f"{score.accuracy:.1%}",
            f"{score.target:.0%}{missed}",
        )
    console.print(tasks)
    deep = [score for score in scores if score.deciles]
    depths = Table("depth of the fact", *(_number(score.task) for score in deep))
    for index in range(len(deep[0].deciles) if deep else 0):
        cells = [score.deciles[index] for score in deep]
        depths.add_row(
            f"{10 * index} to {10 * index + 10} %",
            *(f"{cell.right} of {cell.asked}" for cell in cells),
        )
    console.print(depths)


def _number(name: str) -> Column:
    return Column(name, justify="right")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="prompts of each task")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other prompts")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--json", type=Path, help="also write the scores to this file")
    arguments = parser.parse_args()
    llm, tokenizer = open_model(arguments.model), load_tokenizer(arguments.model)
    scores = []
    for task in EXAM:
        score = evaluate_task(llm, tokenizer, task, count=arguments.count, seed=arguments.seed)
        print(f"{task}: {score.right} of {score.prompts}", file=sys.stderr, flush=True)
        scores.append(score)
    show(scores)
    if arguments.json is not None:
        found = [{**asdict(score), "accuracy": score.accuracy} for score in scores]
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0 if all(score.reaches_target for score in scores) else 1


if __name__ == "__main__":
    sys.exit(main())
