"""同样的训练，一个文件从头读到尾：只用 trl 和 peft，不用本项目的代码。从这里开始读。
The same training in one file from top to bottom: trl and peft only, none of this project's code. Begin reading here.

    python -m lora_practice.sources.embedded   # 一次：把模型和对话放进缓存 / once: puts model and chats into the cache
    python examples/minimal.py 24              # 训练 24 步 / train for 24 steps

在 CPU 上，fine_tuning_practice.py --embedded --fast off 每一步的 loss 和这里相同；它多做的事：更快、更安全、会解释。
On a CPU each step has the loss of `fine_tuning_practice.py --embedded --fast off`, which adds speed, safety and words.
"""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # everything is on this disk
if not os.environ.get("OMP_WAIT_POLICY") and not os.environ.get("GOMP_SPINCOUNT"):
    os.environ["GOMP_SPINCOUNT"] = "1000"  # waiting threads sleep soon: other programs run beside this one

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq
from trl import SFTConfig, SFTTrainer

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 24
SEED, MAX_LENGTH, IGNORE_INDEX = 42, 512, -100
OUTPUT = Path("outputs/minimal")
CACHE = os.environ.get("LORA_PRACTICE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "lora-practice"
MODEL = Path(CACHE).expanduser() / "SmolLM2-135M-Instruct-q4_1-1"
CONVERSATIONS = Path(CACHE).expanduser() / "chatterbot-corpus-english-1" / "conversations.jsonl"

# 1. The base model and its tokenizer with the chat template. The weights in the cache are fp16, dequantized once from a
#    Q4_1 GGUF; here they become fp32. Step 3 freezes them.
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


# 2. Conversations -> token ids and labels. Only the assistant's words and their end mark are trained: the label of
#    every other token is -100, which the loss ignores. Labels stand at their own token; the model shifts them by one.
def tokenize(messages: list[dict[str, str]]) -> dict[str, list[int]]:
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    pieces, done = [], 0  # (text, is it trained?)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
            answer = message["content"] + tokenizer.eos_token
            pieces += [(whole[done : len(prompt)], False), (answer, True)]
            done = len(prompt) + len(answer)
    ids, labels = [], []
    for text, trained in [*pieces, (whole[done:], False)]:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += tokens
        labels += tokens if trained else [IGNORE_INDEX] * len(tokens)
    return {"input_ids": ids[:MAX_LENGTH], "labels": labels[:MAX_LENGTH]}


rows = [json.loads(line)["messages"] for line in CONVERSATIONS.read_text(encoding="utf-8").splitlines()]
dataset = Dataset.from_list([tokenize(messages) for messages in rows])

# 3. LoRA: get_peft_model freezes each W (out, in) and puts a trained B A beside it, with A (r, in) random and
#    B (out, r) zero at first:
#    y = W x + alpha / r * B A dropout(x)   (Hu et al. 2021, https://arxiv.org/abs/2106.09685)
torch.manual_seed(SEED)
lora = LoraConfig(r=6, lora_alpha=8, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(model, lora)
model.print_trainable_parameters()

# 4. Training: one row a forward pass. An optimizer step sums the gradients of eight passes; the loss of each pass is
#    the sum over its trained tokens, divided by the number of trained tokens in all eight: each token counts the same
arguments = SFTConfig(
    output_dir=str(OUTPUT),
    per_device_train_batch_size=1,
    gradient_accumulation_steps=8,
    max_steps=STEPS,
    learning_rate=2e-4,
    lr_scheduler_type="constant",
    max_grad_norm=0.3,
    optim="adamw_torch",
    gradient_checkpointing=False,
    bf16=False,
    use_cpu=not torch.cuda.is_available(),
    seed=SEED,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    dataset_kwargs={"skip_prepare_dataset": True},  # the rows have their token ids and labels already
    remove_unused_columns=False,
)
collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORE_INDEX)  # pads the rows of a batch to one length
trainer = SFTTrainer(model, arguments, data_collator=collator, train_dataset=dataset, processing_class=tokenizer)
trainer.train()

# 5. The adapter: adapter_model.safetensors (A and B), adapter_config.json, and the tokenizer with its template
trainer.save_model(str(OUTPUT))
trainer.save_state()  # trainer_state.json: the losses
print(f"适配器在 / the adapter is in: {OUTPUT}")
