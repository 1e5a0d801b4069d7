"""What the answer must be: greedy tokens of one engine in one process, without any hand-over."""

from pathlib import Path

from baton.common.sampling import SamplingParams
from baton.engine.llm import LLM


class Oracle:
    """Greedy continuations by `baton.engine.LLM`, itself tested against transformers."""

    def __init__(self, model: Path) -> None:
        self._llm = LLM(model, num_threads=1)

    def greedy(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        return [list(done.token_ids) for done in self._llm.generate(prompts, sampling)]
