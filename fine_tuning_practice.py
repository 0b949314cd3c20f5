"""用 LoRA 微调 SmolLM2-135M：一条命令，笔记本 CPU 或老显卡都行。
Fine-tune SmolLM2-135M with LoRA: one command, on a laptop CPU or an old card.

    python fine_tuning_practice.py                      全部默认 / all defaults
    python fine_tuning_practice.py --embedded           不用 Hub / without the Hub
    python fine_tuning_practice.py --lora_r 8 --max_steps 20

改默认值：改下面的 TrainSettings，或用同名参数。
To change a default, edit TrainSettings below or pass the flag of the same name.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

from lora_practice.console.errors import UserError, entry_point
from lora_practice.console.settings import named_by_user, parse, setting
from lora_practice.console.text import tell, text
from lora_practice.model.pissa import STARTS, check_lora_settings
from lora_practice.model.quantization import four_bit
from lora_practice.run.folder import DEFAULT_OUTPUT_DIR, OutputFolder


@dataclass
class TrainSettings:
    """Everything a run can be told. Each field: default, why (zh), why (en), limits."""

    # 模型和数据 / model and data
    model_name: str = setting(
        "HuggingFaceTB/SmolLM2-135M",
        "底座模型：Hub 名字或文件夹；135M 小到 CPU 也练得动",
        "base model: Hub name or folder; 135M is small enough for a CPU",
    )
    chat_template_path: str = setting(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "聊天模板从哪来：底座没有对话格式，借 Instruct 版的",
        "where the chat template comes from: the base has none, so it borrows Instruct's",
    )
    dataset_path: str = setting(
        "HuggingFaceTB/smoltalk",
        "数据：Hub 名字，或本地 JSONL/JSON/CSV/Parquet 文件",
        "data: Hub name, or a local JSONL/JSON/CSV/Parquet file",
    )
    dataset_name: str = setting(
        "everyday-conversations",
        "Hub 数据集的子集：短的日常对话",
        "the data set's subset: short everyday chats",
    )
    train_subset_size: int = setting(
        2000, "最多用多少行；0 是全部", "rows used at most; 0 takes all", minimum=0, maximum=10**9
    )
    eval_subset_size: int = setting(
        0,
        "留出多少段对话不训练，只用来测损失和困惑度",
        "conversations held out, never trained on: their loss and perplexity are measured",
        minimum=0,
    )
    eval_strategy: str = setting(
        "steps",
        "训练中何时测留出的对话；no 只在前后各测一次",
        "when the held-out ones are measured; no: only before and after",
        choices=("no", "steps", "epoch"),
    )
    eval_steps: int = setting(
        50, "eval_strategy=steps 时每几步测一次", "steps between measurements with eval_strategy=steps", minimum=1
    )
    load_best_model_at_end: bool = setting(
        True, "结束时用留出损失最低的适配器", "end with the adapter whose held-out loss was the lowest"
    )
    early_stopping_patience: int = setting(
        0,
        "连续几次没有更低就提前停；0 不提前停",
        "stop after so many measurements without a lower loss; 0 never",
        minimum=0,
        maximum=10**9,
    )
    skip_bad_rows: bool = setting(
        False, "坏行跳过并计数；默认遇到就停", "skip and count bad rows; by default they stop the run"
    )
    embedded: bool = setting(
        False,
        "用内置模型和对话（来自 PyPI），不碰 Hub",
        "use the embedded model and chats (from PyPI), no Hub",
    )
    # 输出 / output
    output_dir: str = setting(DEFAULT_OUTPUT_DIR, "结果放哪里", "where the results go")
    overwrite: bool = setting(False, "换掉 output_dir 里已有的结果", "replace the earlier run in output_dir")
    resume: bool = setting(False, "从最新的完整存盘点继续", "go on from the newest whole checkpoint")
    trust_checkpoint: bool = setting(
        False,
        "也从别处拷来的存盘点继续：只对信得过的来源用",
        "resume a checkpoint from elsewhere too: only if you trust it",
    )
    plan: bool = setting(
        False, "只估计时间、内存和磁盘（真的试两步），不训练", "try two steps, tell time, memory and disk, do not train"
    )
    json: bool = setting(False, "和 --plan 一起：计划写成 JSON", "with --plan: the plan as JSON")
    # 序列 / sequences
    max_length: int = setting(
        512,
        "一行最多多少 token；越长越慢、越占内存",
        "tokens in a row at most; longer is slower and larger",
        minimum=8,
        maximum=1_000_000,
    )
    packing: bool = setting(
        False,
        "把短行拼成一行（互不可见）：更快，但每步样本变多",
        "join short rows (blind to each other): other batches",
    )
    assistant_only_loss: bool = setting(
        True, "只学助手的话，不学用户的提问", "learn only the assistant's words, not the questions"
    )
    # 训练 / training
    per_device_train_batch_size: int = setting(
        1, "一次前向的行数：小内存用 1", "rows in one forward pass: 1 for little memory", minimum=1, maximum=4096
    )
    gradient_accumulation_steps: int = setting(
        8, "攒几次梯度走一步：等效批量 1x8", "passes per optimizer step: effective batch 1x8", minimum=1, maximum=4096
    )
    num_train_epochs: float = setting(
        1.0,
        "数据过几遍：小数据多了会背下来",
        "passes over the data: many on little data is rote",
        above=0,
        maximum=10_000,
    )
    max_steps: int = setting(
        -1,
        "走多少步就停，大于 0 时代替 epoch",
        "stop after so many steps; above 0 it overrides epochs",
        minimum=-1,
        maximum=10**8,
    )
    learning_rate: float = setting(
        2e-4,
        "LoRA 的学习率比全参大十倍",
        "ten times that of full fine-tuning, usual for LoRA",
        above=0,
        maximum=1,
    )
    lr_scheduler_type: str = setting(
        "constant",
        "学习率怎么变：短训练不衰减最简单",
        "how the rate changes: constant is simplest for a short run",
        choices=("constant", "constant_with_warmup", "linear", "cosine"),
    )
    warmup_ratio: float = setting(
        0.03,
        "预热占总步数的比例（constant 不用）",
        "share of steps for warm-up (constant ignores it)",
        minimum=0,
        maximum=0.99,
    )
    max_grad_norm: float = setting(
        0.3,
        "梯度裁剪：小批量噪声大，裁紧一点",
        "gradient clipping: tight, since small batches are noisy",
        above=0,
        maximum=10**6,
    )
    optim: str = setting(
        "adamw_torch",
        "优化器：到处都能跑的那个；融合版要自己选",
        "optimizer: the one that runs everywhere; fused only when asked for",
        choices=("adamw_torch", "adamw_torch_fused", "sgd", "adafactor"),
    )
    seed: int = setting(42, "随机种子：同样的数重现同样的训练", "same seed, same run", minimum=0, maximum=2**32 - 1)
    # LoRA
    lora_r: int = setting(
        6,
        "秩：适配器有多大，6 约 1.8M 参数",
        "rank: how large the adapter is; 6 is about 1.8M parameters",
        minimum=1,
        maximum=1024,
    )
    lora_alpha: int = setting(
        8, "缩放：更新乘以 alpha/r", "scale: the update is multiplied by alpha/r", minimum=1, maximum=10_000
    )
    lora_dropout: float = setting(
        0.05, "随机丢弃：防止背诵", "random zeros against rote learning", minimum=0, maximum=0.95
    )
    target_modules: str = setting(
        "all-linear",
        "哪些层加 LoRA：全部，或逗号隔开，如 q_proj,v_proj",
        "layers that get LoRA: all of them, or such as q_proj,v_proj",
    )
    use_rslora: bool = setting(
        False,
        "rsLoRA：缩放改为 alpha/√r，秩大时才不变弱",
        "rsLoRA: scale alpha/√r, so that a high rank is not weaker",
    )
    use_dora: bool = setting(
        False,
        "DoRA：权重的长度和方向分开学，秩很小时更准，但慢",
        "DoRA: learns length and direction apart; better at low rank, slower",
    )
    init_lora_weights: str = setting(
        "default",
        "从哪开始：pissa、olora 从底座最主要的部分开始，学得更快",
        "where it begins: pissa and olora at the base's main part, and learn sooner",
        choices=STARTS,
    )
    loraplus_lr_ratio: float = setting(
        1.0,
        "LoRA+：B 的学习率是 A 的几倍；1 是普通 LoRA",
        "LoRA+: B's learning rate over A's; 1 is plain LoRA",
        minimum=1,
        maximum=1000,
    )
    # 精度和内存 / precision and memory
    fast: str = setting(
        "auto",
        "快速路径：同样的数学，快好几倍；off 是普通的 TRL",
        "the fast path: same mathematics, several times faster; off is plain TRL",
        choices=("auto", "on", "off"),
        bare="on",
    )
    bf16: bool = setting(False, "用 bf16：硬件真支持才开", "use bf16: only where the hardware truly has it")
    gradient_checkpointing: str = setting(
        "auto",
        "用时间换内存：auto 只在内存不够时开",
        "trade time for memory: auto only when memory needs it",
        choices=("auto", "on", "off"),
        bare="on",
    )
    load_in_4bit: bool = setting(
        False,
        "底座用 4 位放在内存里（QLoRA，要 bitsandbytes）：大底座才值得",
        "hold the base in 4 bits (QLoRA, needs bitsandbytes): for large bases",
    )
    allow_shorter: bool = setting(
        False,
        "一行都放不下时，允许缩短 max_length",
        "where not even one row fits, max_length may be lowered",
    )
    # 记录 / records
    logging_steps: int = setting(10, "每几步记一次 loss", "steps between logged losses", minimum=1, maximum=10**8)
    save_strategy: str = setting(
        "epoch",
        "何时存盘：每个 epoch、每 N 步、不存",
        "when to save a checkpoint",
        choices=("epoch", "steps", "no"),
    )
    save_steps: int = setting(
        100,
        "save_strategy=steps 时每几步存一次",
        "steps between checkpoints with save_strategy=steps",
        minimum=1,
        maximum=10**8,
    )
    save_total_limit: Optional[int] = setting(
        None, "最多留几个存盘点；不写就全留", "checkpoints kept at most; all if not given", minimum=1, maximum=10**6
    )
    report_to: str = setting(
        "none",
        "把曲线发给哪个工具",
        "tracker that gets the curve",
        choices=("none", "tensorboard", "wandb", "trackio", "swanlab"),
    )
    # 训练之后 / afterwards
    merge_adapter: bool = setting(
        False, "另写一份合并好的完整模型到 merged/", "also write the merged whole model to merged/"
    )
    run_inference: bool = setting(
        False,
        "训练后答四个问题，底座和微调并排",
        "answer four prompts afterwards, base and adapter side by side",
    )
    skip_login: bool = setting(False, "不用 HF_TOKEN 登录", "do not log in with HF_TOKEN")


@entry_point
def main(argv: Optional[Sequence[str]] = None, prog: str = "fine_tuning_practice.py") -> int:
    """The whole story: settings, sources, data, model, training, files."""
    settings = parse(
        TrainSettings,
        argv,
        prog=prog,
        description=text("用 LoRA 微调一个小模型", "fine-tune a small model with LoRA"),
    )
    from lora_practice.run.resume import cached_as_before, check_same_base, check_same_data, remember
    from lora_practice.sources.environment import check_login, leave_launcher, prepare_environment
    from lora_practice.sources.find import SHIPPED, find_dataset, find_model

    check_lora_settings(settings)
    if settings.json and not settings.plan:
        raise UserError(text("--json 只和 --plan 一起用", "--json goes with --plan"), fix="--plan --json")
    prepare_environment()
    leave_launcher()
    plain_settings = dataclasses.asdict(settings)
    replace = settings.overwrite or (settings.plan and not settings.resume)  # a plan touches nothing
    started = time.time()
    folder = OutputFolder.claim(settings.output_dir, settings.resume, replace, plain_settings)
    meant = {name: named_by_user(settings, name, shipped) for name, shipped in SHIPPED.items()}
    # a resumed run goes on with the model and the data that it began with
    embedded_data = settings.embedded or folder.began_with("data", "embedded")
    own_data = meant["dataset_path"] or meant["dataset_name"] or folder.began_with("data", "hub")
    data = find_dataset(settings.dataset_path, not own_data, embedded_data)
    embedded_model = settings.embedded or folder.began_with("model", "embedded")
    own_model = meant["model_name"] or folder.began_with("model", "hub")
    check_login(settings.skip_login or (embedded_model and data.kind != "hub"))
    same_model = cached_as_before(folder.resumed, settings.model_name)
    base = remember(same_model or find_model(settings.model_name, not own_model, embedded_model))
    check_same_base(folder.resumed, base)
    for source in (base, data):
        if source.note:
            tell(source.note)
    # the default subset belongs to the default data set
    subset = settings.dataset_name if meant["dataset_name"] or not meant["dataset_path"] else None

    from lora_practice import compat

    compat.check_stack()
    compat.check_tracker(settings.report_to)
    from lora_practice.data.prepare import prepare
    from lora_practice.export import merge
    from lora_practice.inference import samples
    from lora_practice.machine.device import decide
    from lora_practice.machine.facts import read_facts
    from lora_practice.model import load as load_model
    from lora_practice.model import lora as model_lora
    from lora_practice.run import record
    from lora_practice.training import build, run
    from lora_practice.training import plan as training_plan

    machine = decide(read_facts(), settings.bf16, weights=load_model.stored_bytes(base.path))
    tokenizer = load_model.load_tokenizer(base, settings.chat_template_path, meant["chat_template_path"])
    rows = prepare(data, subset, tokenizer, settings)
    check_same_data(folder.resumed, rows.facts)
    quantised = four_bit(machine.device, machine.precision) if settings.load_in_4bit else {}
    weights = load_model.load_base(base, load_model.weights_dtype(machine, base, settings.fast), **quantised)
    lora = model_lora.add_lora(weights, settings, base)
    load_model.check_vocabulary(lora, tokenizer, base.name)
    engine = build.build_engine(lora, settings, machine)
    trainer = build.build_trainer(lora, engine, tokenizer, rows.train, settings, machine, folder)
    given = list(sys.argv[1:] if argv is None else argv)
    while shorter := build.find_room(trainer, settings.allow_shorter and not settings.resume):
        settings.max_length, given = shorter, [*given, "--max_length", str(shorter)]
        rows = prepare(data, subset, tokenizer, settings)
        trainer = build.build_trainer(lora, engine, tokenizer, rows.train, settings, machine, folder)
    downloaded = training_plan.fetched_mb(base, started) + training_plan.fetched_mb(data, started)
    plan = training_plan.estimate(trainer, base, build.steps_of(trainer), settings, rows.held_out, downloaded)
    tell(build.announce(machine, base, data, rows, trainer, plan))
    if settings.plan:
        if settings.json:
            print(training_plan.plan_as_json(plan, trainer, settings, machine))
        else:
            tell(training_plan.plan_text(plan, trainer, settings, machine))
        return 0

    notes = record.starting_record(settings, machine, base, data, rows, given)
    notes["estimate"] = plan.record()
    folder.begin(notes)
    notes.update(run.train(trainer, rows.held_out, settings))
    if notes["interrupted"]:
        folder.write_record({**notes, "status": "interrupted"})
        tell(record.how_to_resume(notes))
        return 130
    run.finish(trainer, notes)
    if settings.run_inference:
        notes["samples"] = samples.answer_side_by_side(lora, tokenizer)
        run.write_card(folder, notes)
    if settings.merge_adapter:
        tell(merge.merge_sentence(*merge.merge_adapter(folder.path)))
    tell(record.farewell(folder.path, notes))
    return 0


if __name__ == "__main__":
    main()
