"""llama.cpp through the package `xllamacpp`: what the program behind Ollama makes of a GGUF."""

from __future__ import annotations

import importlib.util
import json
import urllib.request
from pathlib import Path
from typing import Any, Optional

from lora_practice.console.text import text


def missing() -> str:
    """Why llama.cpp cannot be asked, in a few words; "" if it can."""
    if importlib.util.find_spec("xllamacpp") is None:
        hint = 'pip install -e ".[gguf]"'
        return text(f"没有检查：{hint}", f"not checked: {hint}")
    return ""


class Llama:
    """One GGUF in a llama.cpp server inside this process, asked over the loopback address, on the CPU."""

    def __init__(self, model: Path, adapter: Optional[Path] = None) -> None:
        import torch
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_ctx, params.n_parallel, params.n_gpu_layers, params.verbosity = 2048, 1, 0, -1
        params.warmup = False
        # its threads wait for each other in a loop: more of them than are free, and it crawls
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        if adapter is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self.server: Any = xllamacpp.Server(params)
        self.open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """The chat through the template and the tokenizer that stand in the GGUF."""
        prompt = self._post("/apply-template", messages=messages)["prompt"]
        return self._post("/tokenize", content=prompt, add_special=False, parse_special=True)["tokens"]

    def logprobs(self, ids: list[int], rows: int) -> list[float]:
        """log-probabilities (rows,) of the token after `ids`."""
        # An end mark and half a character come without numbers, so "a" is written whatever they are; they are those
        # before the bias.
        asked = {"n_predict": 1, "n_probs": rows, "logit_bias": [["a", 1000.0]]}
        said = self._post("/completion", prompt=ids, temperature=0, cache_prompt=False, **asked)
        found = [float("-inf")] * rows
        for one in said["completion_probabilities"][0]["top_logprobs"]:
            found[one["id"]] = one["logprob"]
        return found

    def greedy(self, ids: list[int], most: int) -> tuple[list[int], bool]:
        """(tokens after `ids`, the end mark not among them; whether it stopped by itself)."""
        said = self._post(
            "/completion", prompt=ids, n_predict=most, temperature=0, return_tokens=True, cache_prompt=False
        )
        stopped = said["stop_type"] == "eos"
        return said["tokens"][: -1 if stopped else None], stopped

    def _post(self, path: str, **body: Any) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.server.listening_address + path, json.dumps(body).encode(), headers)
        with self.open(request, timeout=600) as answer:
            return json.load(answer)
