"""The same prompts in plain transformers, as its users run it: generate() in half precision. What an engine's speed is held beside.

    python plain_transformers.py ASKED.json OUT.json

Run as a file by the interpreter that has LMDeploy, which may not have buildsys: nothing of it is imported. ASKED: {model: a folder,
prompts: [[ids]], loads: {batch: [[ids] of equal length]}, new_tokens, repeats}; OUT: {load_s, seconds, rates: [{batch, prompt_tokens,
new_tokens, seconds, tokens_per_s, first_token_s: a value for each repetition}]}.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def main(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Loads the model and answers, greedily and past every end of text."""
    import torch
    from transformers import AutoModelForCausalLM

    cuda, new = torch.cuda.is_available(), asked["new_tokens"]
    began = time.monotonic()
    made: Any = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.float16 if cuda else torch.float32)
    model = made.to("cuda" if cuda else "cpu").eval()
    load_s = time.monotonic() - began

    def write(prompts: list[list[int]], tokens: int) -> float:
        ids = torch.tensor(prompts, device=model.device)
        start = time.monotonic()
        with torch.inference_mode():
            written = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=0,
            )
        assert written.shape == (len(prompts), len(prompts[0]) + tokens), written.shape  # on the CPU by now: all of it is done
        written.cpu()
        return time.monotonic() - start

    write([asked["prompts"][0]], 2)  # kernels are chosen, and memory is taken, when a model first runs
    seconds = sum(write([prompt], new) for prompt in asked["prompts"])
    rates = []
    for batch, prompts in asked["loads"].items():
        firsts = [write(prompts, 1) for _ in range(asked["repeats"])]
        runs = [write(prompts, new) for _ in range(asked["repeats"])]
        one = {"batch": int(batch), "prompt_tokens": len(prompts[0]), "new_tokens": new}
        rates.append({**one, "seconds": runs, "tokens_per_s": [len(prompts) * new / run for run in runs], "first_token_s": firsts})
    return {"load_s": load_s, "seconds": seconds, "rates": rates}


if __name__ == "__main__":
    found = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(found))
