"""How fast a server writes, as a table and as JSON: batches of 1, 8 and 32 requests of the same drawn prompts on every machine."""

from __future__ import annotations

import random
from dataclasses import dataclass

from buildsys.errors import BuildError
from buildsys.serving.load import Rate

PROMPT_TOKENS, NEW_TOKENS = 128, 256
ROUNDS = 2  # requests for each place in a batch
FEWEST = 4  # requests, so that one slow one at batch 1 does not decide
SEED = 0
HEAD = f"  {'batch':>5} {'tokens/s':>10} {'a request':>10} {'first token':>12}"


@dataclass(frozen=True)
class Prompts:
    """Token ids drawn below the vocabulary: no text, and so no data set and no tokenizer, decides what is measured."""

    vocab_size: int
    tokens: int  # of a prompt
    new_tokens: int  # asked of each

    @classmethod
    def fitting(cls, vocab_size: int, session_len: int, where: str) -> Prompts:
        """The usual lengths, or shorter ones where a session does not hold them."""
        tokens = min(PROMPT_TOKENS, session_len // 4)
        if tokens < 1:
            raise BuildError(where, f"session_len is {session_len}", "serve with at least 4 tokens in a session")
        return cls(vocab_size, tokens, min(NEW_TOKENS, session_len // 2))

    def draw(self, batch: int) -> list[list[int]]:
        """For a batch of that size, the same every time. The first ids of a vocabulary are often special, so they are left out."""
        ids, lowest = random.Random(SEED), min(1000, self.vocab_size // 2)
        count = max(FEWEST, ROUNDS * batch)
        return [[ids.randrange(lowest, self.vocab_size) for _ in range(self.tokens)] for _ in range(count)]

    def __str__(self) -> str:
        drawn = f"{self.tokens} token ids a prompt, drawn below {self.vocab_size:,} with seed {SEED}"
        return f"{drawn}; {self.new_tokens} greedy tokens each, past the end of text"


def row(rate: Rate) -> str:
    """Of the table; a request's own speed is the batch's share of it."""
    each = rate.tokens_per_s / rate.batch
    return f"  {rate.batch:>5} {rate.tokens_per_s:>10,.1f} {each:>10,.1f} {1000 * rate.first_token_s:>9,.1f} ms"
