"""One way to generate, measured in its own process; prints one line of JSON. Started by `python -m bench`."""

from __future__ import annotations

import json
import sys
from typing import Any, Callable

from lora_practice.sources.environment import let_waiting_threads_sleep

QUESTIONS = ("Tell me a long story about a printer.", "What is the capital of France?", "List three fruits.")
NEW_TOKENS = 64


def main() -> None:
    spec = json.loads(sys.argv[1])
    let_waiting_threads_sleep()
    import torch

    from bench.worker import CLOCKS, peak_memory_mb
    from lora_practice.data.chat_template import render
    from lora_practice.model.load import load_tokenizer
    from lora_practice.sources import embedded
    from lora_practice.sources.find import Source

    if spec["threads"]:
        torch.set_num_threads(spec["threads"])
    clock = CLOCKS[spec["clock"]]
    folder = embedded.model_dir()
    source = Source("folder", str(folder), folder)
    tokenizer, model = load_tokenizer(source), with_random_adapter(source, spec["how"])
    generate = generator(model, spec["how"])
    prompts = []
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        prompts.append(tokenizer(render(tokenizer, chat, prompt=True), add_special_tokens=False)["input_ids"])
    generate(prompts[0])  # warm-up
    started = clock()
    generated = [generate(ids) for ids in prompts]
    seconds = clock() - started
    result = {"tokens_per_second": len(QUESTIONS) * NEW_TOKENS / seconds, "peak_memory_mb": peak_memory_mb("cpu")}
    print("RESULT " + json.dumps({**result, "generated": generated}), flush=True)


def with_random_adapter(source: Any, how: str) -> Any:
    """The embedded model with a small random adapter, always the same one; for "kernels" in the dtype of its files."""
    import torch
    from peft import LoraConfig, get_peft_model

    from lora_practice.model.load import load_base

    base = load_base(source, "stored" if how == "kernels" else "fp32")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=6, lora_alpha=8, target_modules="all-linear"))
    random = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            scale = 0.03 if "lora_A" in name else 0.003
            parameter.data = torch.randn(parameter.shape, generator=random) * scale
    return model.eval()


def generator(model: Any, how: str) -> Callable[[list[int]], list[int]]:
    """Function from a prompt to NEW_TOKENS greedy tokens; `how`: "generate" (transformers), "kernels" or "torch"."""
    import torch

    from lora_practice.fast.decode.decoder import build_decoder

    if how != "generate":
        decoder = build_decoder(model, kernels=how == "kernels")
        return lambda ids: decoder.generate(ids, NEW_TOKENS, ())
    model.config.use_cache = True

    def generate(ids: list[int]) -> list[int]:
        prompt = torch.tensor([ids])
        options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": None, "pad_token_id": 0}
        with torch.inference_mode():
            output = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
        return output[0, len(ids) :].tolist()

    return generate


if __name__ == "__main__":
    main()
