"""Runs a GGUF in llama.cpp, the program behind Ollama, through the package `xllamacpp`."""

from __future__ import annotations

import importlib.util
import json
import urllib.request
from pathlib import Path
from typing import Any, Optional

from lora_practice.console.text import text


def missing() -> str:
    """Why llama.cpp cannot be run, in a few words; "" if it can."""
    if importlib.util.find_spec("xllamacpp") is None:
        hint = 'pip install -e ".[gguf]"'
        return text(f"没有检查：{hint}", f"not checked: {hint}")
    return ""


class Llama:
    """One GGUF (and an adapter on top of it) in a llama.cpp server inside this process, on the CPU.

    Requests go over the loopback address, past any proxy.
    """

    def __init__(self, model: Path, adapter: Optional[Path] = None) -> None:
        import torch
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_ctx, params.n_parallel, params.n_gpu_layers, params.verbosity = 2048, 1, 0, -1
        params.warmup = False
        # its threads spin while they wait for each other: with more of them than free cores it crawls
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        if adapter is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self.server: Any = xllamacpp.Server(params)
        self.open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a chat, by the chat template and the tokenizer in the GGUF."""
        # a bos that the tokenizer adds is taken out of the rendered chat, so that it is there once after this
        prompt = self._post("/apply-template", messages=messages)["prompt"]
        return self._post("/tokenize", content=prompt, add_special=True, parse_special=True)["tokens"]

    def logprobs(self, ids: list[int], rows: int) -> list[float]:
        """Log-probabilities (rows,) of the token after `ids`; `rows` is the size of the vocabulary."""
        # An end token or half a character would come without probabilities, so a bias makes the token "a"; the
        # probabilities are those before the bias.
        options = {"n_predict": 1, "n_probs": rows, "logit_bias": [["a", 1000.0]]}
        answer = self._post("/completion", prompt=ids, temperature=0, cache_prompt=False, **options)
        logprobs = [float("-inf")] * rows
        for one in answer["completion_probabilities"][0]["top_logprobs"]:
            logprobs[one["id"]] = one["logprob"]
        return logprobs

    def greedy(self, ids: list[int], max_new_tokens: int) -> tuple[list[int], bool]:
        """(greedy tokens after `ids`, without the end token; whether the answer ended by itself)"""
        options = {"n_predict": max_new_tokens, "temperature": 0, "return_tokens": True, "cache_prompt": False}
        answer = self._post("/completion", prompt=ids, **options)
        has_ended = answer["stop_type"] == "eos"
        return answer["tokens"][: -1 if has_ended else None], has_ended

    def _post(self, path: str, **body: Any) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.server.listening_address + path, json.dumps(body).encode(), headers)
        with self.open(request, timeout=600) as answer:
            return json.load(answer)
