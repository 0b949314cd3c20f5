"""The terms at the end of the report, explained to a reader who is new to fine-tuning."""

from __future__ import annotations

from lora_practice.console.text import text

# (term, explanation), each in Chinese and in English
TERMS = (
    (
        ("loss", "loss"),
        "模型预测下一个 token 时的平均失误，单位 nat，越低越好。0 表示每次都完全猜中。",
        "How badly the model predicts the next token on average, in nats; lower is better, 0 is perfect.",
    ),
    (
        ("困惑度（perplexity）", "perplexity"),
        "e 的 loss 次方：模型平均在多少个 token 之间拿不准。10 就像每次从 10 个里猜 1 个，1 是完全确定。",
        "e to the power of the loss: among how many tokens the model hesitates. 10 is like one guess in ten.",
    ),
    (
        ("验证集（validation set）", "validation set"),
        "从数据里划出、从不参与训练的几行。它们变好，才说明模型真的学会了，而不是背下来。",
        "Rows set aside and never trained on. Only when these get better has the model learnt, not memorised.",
    ),
    (
        ("过拟合", "overfitting"),
        "训练 loss 还在降，验证 loss 却上升：模型开始死记硬背。",
        "The training loss falls while the validation loss rises: the model begins to learn by heart.",
    ),
    (
        ("底座", "base"),
        "微调之前的模型，它的权重一直不变。",
        "The model before fine-tuning; its weights never change.",
    ),
    (
        ("LoRA、适配器", "LoRA, adapter"),
        "在底座的矩阵旁边加两个很小的矩阵 A 和 B，只训练它们；学到的改动是 scale · B·A，存成几 MB 的适配器。",
        "Two small matrices A and B beside each matrix of the base; only they are trained. The change is scale · B·A, "
        "kept in an adapter of a few MB.",
    ),
    (
        ("秩 r、alpha", "rank r, alpha"),
        "r 是 A、B 的宽度，越大能学的越多；alpha 决定改动的力度，scale = alpha / r。",
        "r is the width of A and B: the larger, the more can be learnt. alpha sets the strength: scale = alpha / r.",
    ),
    (
        ("学习率", "learning rate"),
        "每一步改多少。太大会发散，太小学不动。",
        "How far each step goes. Too high diverges, too low learns nothing.",
    ),
    (
        ("步（step）", "step"),
        "参数更新一次。一步用的行数 = per_device_train_batch_size × gradient_accumulation_steps。",
        "One update of the weights, on per_device_train_batch_size × gradient_accumulation_steps rows.",
    ),
    (
        ("梯度范数", "gradient norm"),
        "这一步梯度的大小；超过 max_grad_norm 就按比例缩小（裁剪）。突然变得很大，多半是学习率太大。",
        "The size of a step's gradient; above max_grad_norm it is scaled down (clipped). A sudden jump usually means "
        "too high a learning rate.",
    ),
)


def glossary() -> list[tuple[str, str]]:
    """(term, explanation) in the user's language."""
    return [(text(*term), text(zh, en)) for term, zh, en in TERMS]
