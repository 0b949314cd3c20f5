"""和训练好的模型聊天。 / Talk to what was trained.

    python inference.py                                   聊天 / chat
    python inference.py --prompt "What is AI?"            问一句 / one question
    python inference.py --model_dir outputs/x/checkpoint-250 --prompt Hi --prompt Bye

参数和全部步骤在 lora_practice/inference/answer.py。 / Its settings and all its steps are there.
"""

from __future__ import annotations

from lora_practice.inference.answer import InferenceSettings, main

__all__ = ["InferenceSettings", "main"]

if __name__ == "__main__":
    main()
