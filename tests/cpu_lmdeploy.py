"""LMDeploy's own api_server on a machine without a GPU: all of it is LMDeploy's but TurboMind, in whose place transformers computes.

    python tests/cpu_lmdeploy.py serve api_server MODEL …

Run by the interpreter that has LMDeploy. Its HTTP layer, chat templates, tool parsers and grammars are the real ones; the model's weights
are read by tests/readers.py, and its cache is rounded as quant_policy says (by the layout's description, not by buildsys). What it prints
of memory stands in for what TurboMind says there. GPUHOST names a folder in which it leaves a file for tests/gpuhost.py: its process, as
the name, and the MiB that it "uses".
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import xgrammar
from lmdeploy import turbomind
from lmdeploy._guided_decoding import compile_response_format
from lmdeploy.messages import EngineOutput, GenerationConfig, RequestMetrics, ResponseType, ScheduleMetrics, TurbomindEngineConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests import readers

FREE_MIB = float(os.environ.get("GPUHOST_FREE_MIB", "1000"))  # of the GPU that there is none of


class RoundedCache(DynamicCache):
    """Keys and values as quant_policy 8 and 4 hold them: each head of each token between its own least and greatest value."""

    def __init__(self, config: Any, bits: int) -> None:
        super().__init__(config=config)
        self.top = 2**bits - 1

    def update(self, keys: Any, values: Any, layer: int, *more: Any, **named: Any) -> Any:
        return super().update(self.rounded(keys), self.rounded(values), layer, *more, **named)

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        step = ((high - low) / self.top).clamp_min(1e-9)
        return ((x - low) / step).round() * step + low


class CpuTurboMind:
    """What AsyncEngine asks of TurboMind."""

    def __init__(self, path: str, config: TurbomindEngineConfig) -> None:
        self.engine_config, self.lock = config, threading.Lock()
        self.executor = ThreadPoolExecutor(2)
        with tempfile.TemporaryDirectory() as folder:
            # dtype float32: in half precision a CPU's sums are not a GPU's
            quantized = "quantization_config" in (Path(path) / "config.json").read_text()
            place = readers.as_float(Path(path), Path(folder) / "float") if quantized else Path(path)
            self.model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(path)
        vocab = self.model.config.vocab_size
        self.compiler = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab))
        self.vocab = vocab
        budget = FREE_MIB * config.cache_max_entry_count
        if os.environ.get("TM_LOG_LEVEL") == "INFO":
            said = f"Object cache budget: {budget:.2f} MB from free {FREE_MIB:.2f} MB and ratio {config.cache_max_entry_count:.3f}"
            print(f"[TM][INFO] {said}", flush=True)
        if "GPUHOST" in os.environ:
            (Path(os.environ["GPUHOST"]) / str(os.getpid())).write_text(f"{100 + budget:.0f}")

    @staticmethod
    def from_pretrained(path: str, engine_config: TurbomindEngineConfig, **_: Any) -> CpuTurboMind:
        return CpuTurboMind(path, engine_config)

    def create_instance(self) -> CpuInstance:
        return CpuInstance(self)

    def get_schedule_metrics(self) -> ScheduleMetrics:
        return ScheduleMetrics()

    async def get_health_status(self) -> dict[str, Any]:
        return {"alive": True, "message": "a CPU", "schedule_metrics": self.get_schedule_metrics()}

    def close(self) -> None:
        self.executor.shutdown(wait=False, cancel_futures=True)

    def cache(self) -> DynamicCache:
        policy = int(self.engine_config.quant_policy)
        return RoundedCache(self.model.config, policy) if policy else DynamicCache(config=self.model.config)


class CpuInstance:
    """One request at a time."""

    def __init__(self, engine: CpuTurboMind) -> None:
        self.engine = engine
        self.cancelled = False

    async def async_cancel(self, session_id: int | None = None) -> None:
        self.cancelled = True

    async def async_end(self, session_id: int) -> None:
        return

    async def async_stream_infer(
        self, session_id: int, input_ids: Sequence[int], gen_config: GenerationConfig, **_: Any
    ) -> AsyncIterator[EngineOutput]:
        self.cancelled = False
        grammar = None
        if gen_config.response_format is not None:
            grammar = xgrammar.GrammarMatcher(compile_response_format(self.engine.compiler, gen_config.response_format))
        cache, tokens, seen = self.engine.cache(), list(input_ids), set(input_ids)
        ends = set(gen_config.stop_token_ids or ())
        for written in range(gen_config.max_new_tokens):
            loop = asyncio.get_running_loop()
            token = await loop.run_in_executor(self.engine.executor, self.step, tokens, cache, grammar, gen_config, written, seen)
            tokens, seen = [token], seen | {token}
            over = grammar is not None and grammar.is_terminated()
            ended = over or (token in ends and not gen_config.ignore_eos)
            if self.cancelled:
                yield EngineOutput(ResponseType.CANCEL, [])
                return
            last = ended or written + 1 == gen_config.max_new_tokens
            metrics = RequestMetrics(token_timestamp=time.time(), engine_events=[])
            yield EngineOutput(ResponseType.FINISH if last else ResponseType.SUCCESS, [token], req_metrics=metrics)
            if last:
                return

    def step(self, tokens: list[int], cache: DynamicCache, grammar: Any, config: GenerationConfig, written: int, seen: set[int]) -> int:
        """The next token, the most likely one or a drawn one; `tokens` join the cache."""
        with torch.inference_mode():
            logits = self.engine.model(torch.tensor([tokens]), past_key_values=cache, use_cache=True).logits[0, -1].float()
        logits = logits.clone()  # an inference tensor takes no assignment
        if config.min_new_tokens and written < config.min_new_tokens:
            logits[list(config.stop_token_ids or ())] = -torch.inf
        if config.repetition_penalty and config.repetition_penalty != 1:  # arXiv:1909.05858, section 4.1
            at = torch.tensor(sorted(seen))
            logits[at] = torch.where(logits[at] < 0, logits[at] * config.repetition_penalty, logits[at] / config.repetition_penalty)
        if grammar is not None:
            mask = xgrammar.allocate_token_bitmask(1, self.engine.vocab)
            grammar.fill_next_token_bitmask(mask)
            xgrammar.apply_token_bitmask_inplace(logits[None], mask)
        if config.top_k == 1 or config.temperature < 1e-3:
            token = int(logits.argmax())
        else:
            generator = torch.Generator().manual_seed((config.random_seed or 0) % 2**31 + 1_000_003 * written)
            token = int(torch.multinomial((logits / config.temperature).softmax(-1), 1, generator=generator))
        if grammar is not None:
            assert grammar.accept_token(token)
        return token


def main() -> None:
    turbomind.is_available = lambda: True
    turbomind.TurboMind = CpuTurboMind  # type: ignore[attr-defined, misc]
    from lmdeploy.cli import entrypoint

    sys.argv[0] = "lmdeploy"
    entrypoint.run()


if __name__ == "__main__":
    main()
