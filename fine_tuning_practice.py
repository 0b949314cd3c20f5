"""用 LoRA 微调 SmolLM2-135M：一条命令，笔记本 CPU 或老显卡都行。
Fine-tune SmolLM2-135M with LoRA: one command, on a laptop CPU or an old card.

    python fine_tuning_practice.py                      全部默认 / all defaults
    python fine_tuning_practice.py --embedded           不用 Hub / without the Hub
    python fine_tuning_practice.py --lora_r 8 --max_steps 20

改默认值：改下面的 TrainSettings，或用同名参数。
To change a default, edit TrainSettings below or pass the flag of the same name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Optional

from lora_practice import compat
from lora_practice.console.errors import UserError, entry_point
from lora_practice.console.settings import given_by_user, parse, setting, with_given
from lora_practice.console.text import tell, text
from lora_practice.data.prepare import prepare
from lora_practice.export.merge import merge_adapter, merge_sentence
from lora_practice.inference.samples import answer_side_by_side
from lora_practice.machine.device import choose_device
from lora_practice.machine.facts import read_facts
from lora_practice.model.load import check_vocabulary, load_base, load_tokenizer, stored_bytes, weights_dtype
from lora_practice.model.lora import add_lora, check_lora_settings
from lora_practice.model.pissa import LORA_INITS
from lora_practice.model.quantization import four_bit
from lora_practice.run.folder import DEFAULT_OUTPUT_DIR, OutputFolder, record_in
from lora_practice.run.record import closing_lines, how_to_resume, starting_record
from lora_practice.run.resume import check_same_base, check_same_data, settings_as_begun, with_file_digests
from lora_practice.sources.environment import ensure_single_process, prepare_environment
from lora_practice.sources.find import SHIPPED, find_sources
from lora_practice.training.settings import DEFAULT_LOGGING_STEPS


@dataclass
class TrainSettings:
    """All settings of a run. Each field: default, why (zh), why (en), limits; `section` heads a group of them."""

    model_name: str = setting(
        "HuggingFaceTB/SmolLM2-135M",
        "底座模型：Hub 上的名字或本地文件夹；135M 足够小，CPU 也能训练",
        "base model: a Hub name or a folder; 135M is small enough for a CPU",
        common=True,
        section=("模型和数据", "model and data"),
    )
    chat_template_path: str = setting(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "聊天模板的来源：底座没有对话格式，借用 Instruct 版的",
        "source of the chat template: the base has none, so it borrows Instruct's",
    )
    dataset_path: str = setting(
        "HuggingFaceTB/smoltalk",
        "训练数据：Hub 上的名字，或本地 JSONL/JSON/CSV/TSV/Parquet 文件",
        "training data: a Hub name, or a local JSONL, JSON, CSV, TSV or Parquet file",
        common=True,
    )
    dataset_name: str = setting(
        "everyday-conversations",
        "Hub 数据集的子集：默认是简短的日常对话",
        "subset of the Hub data set: short everyday conversations",
    )
    train_subset_size: int = setting(
        2000, "训练最多用多少行；0 表示全部", "most rows to train on; 0 takes all", minimum=0, maximum=10**9
    )
    skip_bad_rows: bool = setting(
        False, "跳过有问题的行并计数；默认遇到就停止", "skip and count bad rows; by default one stops the run"
    )
    embedded: bool = setting(
        False,
        "使用内置的模型和对话（来自 PyPI），不访问 Hub",
        "use the embedded model and conversations (from PyPI), no Hub",
        common=True,
    )
    eval_subset_size: int = setting(
        0,
        "划出多少行作验证集：不参与训练，只用来测验证损失和困惑度",
        "rows of the validation set: never trained on, only measured (loss, perplexity)",
        minimum=0,
        common=True,
        section=("验证集", "validation set"),
    )
    eval_strategy: str = setting(
        "steps",
        "训练中何时测验证损失：每 eval_steps 步、每个 epoch；no 只在训练前后各测一次",
        "when the validation loss is measured: every eval_steps steps, each epoch; no: only before and after",
        choices=("no", "steps", "epoch"),
    )
    eval_steps: int = setting(
        50,
        "eval_strategy=steps 时，每多少步测一次",
        "steps between measurements with eval_strategy=steps",
        minimum=1,
    )
    load_best_model_at_end: bool = setting(
        True, "训练结束时采用验证损失最低的适配器", "end with the adapter of the lowest validation loss"
    )
    early_stopping_patience: int = setting(
        0,
        "验证损失连续多少次没有降低就提前停止；0 表示不提前停止",
        "stop after this many measurements without a lower validation loss; 0: never",
        minimum=0,
        maximum=10**9,
    )
    output_dir: str = setting(
        DEFAULT_OUTPUT_DIR,
        "训练结果写到哪个文件夹",
        "folder for the results",
        common=True,
        section=("输出", "output"),
    )
    overwrite: bool = setting(
        False, "替换 output_dir 里已有的训练结果", "replace an earlier run in output_dir", common=True
    )
    resume: bool = setting(
        False,
        "从最新的完整检查点（checkpoint）继续训练；没写的参数沿用原来的",
        "go on from the newest complete checkpoint, with its run's settings where none are given",
        common=True,
    )
    trust_checkpoint: bool = setting(
        False,
        "检查点来自别处也继续：仅限来源可信时使用",
        "resume a checkpoint from elsewhere too: only if you trust its source",
    )
    plan: bool = setting(
        False,
        "只试两步，估计时间、内存和磁盘，不训练",
        "try two steps to estimate time, memory and disk; do not train",
        common=True,
    )
    json: bool = setting(False, "与 --plan 连用：以 JSON 输出", "with --plan: print it as JSON")
    max_length: int = setting(
        512,
        "一行最多多少个 token；越长越慢、越占内存",
        "most tokens in a row; longer is slower and takes more memory",
        minimum=8,
        maximum=1_000_000,
        common=True,
        section=("序列", "sequences"),
    )
    packing: bool = setting(
        False,
        "把短的行拼成一行（互不可见）：更快，但每步包含的样本不同",
        "join short rows (blind to each other): faster, but other batches",
    )
    assistant_only_loss: bool = setting(
        True, "只在助手的回答上计算 loss，不学用户的提问", "loss on the assistant's answers only, not on the questions"
    )
    per_device_train_batch_size: int = setting(
        1,
        "一次前向计算多少行：内存小就用 1；快速路径只看它与梯度累积次数的乘积",
        "rows in one forward pass: 1 for little memory; the fast path only uses its product with the accumulation",
        minimum=1,
        maximum=4096,
        section=("训练", "training"),
    )
    gradient_accumulation_steps: int = setting(
        8,
        "累积几次梯度更新一次参数：默认等效批量 1x8；快速路径只看这个乘积",
        "forward passes per optimizer step: by default an effective batch of 1x8; the fast path uses only the product",
        minimum=1,
        maximum=4096,
    )
    num_train_epochs: float = setting(
        1.0,
        "数据过几遍：数据少、遍数多，模型会死记硬背（过拟合）",
        "passes over the data: many passes over little data overfit",
        above=0,
        maximum=10_000,
        common=True,
    )
    max_steps: int = setting(
        -1,
        "最多训练多少步；大于 0 时代替 num_train_epochs",
        "most optimizer steps; above 0 it overrides num_train_epochs",
        minimum=-1,
        maximum=10**8,
        common=True,
    )
    learning_rate: float = setting(
        2e-4,
        "学习率：LoRA 通常是全参数微调的 10 倍",
        "learning rate: for LoRA usually ten times that of full fine-tuning",
        above=0,
        maximum=1,
        common=True,
    )
    lr_scheduler_type: str = setting(
        "constant",
        "学习率如何变化：训练短时，保持不变最简单",
        "schedule of the learning rate: constant is simplest for a short run",
        choices=("constant", "constant_with_warmup", "linear", "cosine"),
    )
    warmup_ratio: float = setting(
        0.03,
        "预热步数占总步数的比例；constant 不预热",
        "share of steps for warm-up; constant has none",
        minimum=0,
        maximum=0.99,
    )
    max_grad_norm: float = setting(
        0.3,
        "梯度裁剪的上限：批量小、梯度噪声大，所以设得低",
        "gradient clipping: low, since gradients of small batches are noisy",
        above=0,
        maximum=10**6,
    )
    optim: str = setting(
        "adamw_torch",
        "优化器：默认的到处都能运行；融合版（fused）需要自己选",
        "optimizer: the default runs everywhere; fused only when asked for",
        choices=("adamw_torch", "adamw_torch_fused", "sgd", "adafactor"),
    )
    seed: int = setting(
        42, "随机种子：种子相同，训练结果相同", "random seed: same seed, same run", minimum=0, maximum=2**32 - 1
    )
    lora_r: int = setting(
        6,
        "秩（rank）：决定适配器的大小，6 约为 180 万参数",
        "rank: size of the adapter; 6 is about 1.8M parameters",
        minimum=1,
        maximum=1024,
        common=True,
        section=("LoRA", "LoRA"),
    )
    lora_alpha: int = setting(
        8, "缩放：更新量乘以 alpha/r", "scale: the update is multiplied by alpha/r", minimum=1, maximum=10_000
    )
    lora_dropout: float = setting(
        0.05,
        "训练时随机置零的输入比例：减轻过拟合",
        "share of inputs zeroed at random while training: against overfitting",
        minimum=0,
        maximum=0.95,
    )
    target_modules: str = setting(
        "all-linear",
        "哪些层加 LoRA：全部线性层，或用逗号分隔的名字，如 q_proj,v_proj",
        "modules that get LoRA: all linear ones, or names such as q_proj,v_proj",
    )
    use_rslora: bool = setting(
        False,
        "rsLoRA：缩放改为 alpha/√r，秩大时更新量不会变弱",
        "rsLoRA: scale alpha/√r, so that a high rank does not weaken the update",
    )
    use_dora: bool = setting(
        False,
        "DoRA：分别学习权重的大小和方向；秩很小时效果更好，但较慢",
        "DoRA: learns magnitude and direction apart; better at low rank, slower",
    )
    init_lora_weights: str = setting(
        "default",
        "初始化：pissa、olora 从底座权重的主成分开始，学得更快",
        "initialisation: pissa and olora begin with the base's principal part and learn sooner",
        choices=LORA_INITS,
    )
    loraplus_lr_ratio: float = setting(
        1.0,
        "LoRA+：B 矩阵的学习率是 A 矩阵的几倍；1 为普通 LoRA",
        "LoRA+: learning rate of B over that of A; 1 is plain LoRA",
        minimum=1,
        maximum=1000,
    )
    fast: str = setting(
        "auto",
        "快速路径：数学上相同，快好几倍；auto 只在 CPU 上用它，off 使用普通的 TRL",
        "fast path: the same mathematics, several times faster; auto takes it on a CPU only, off is plain TRL",
        choices=("auto", "on", "off"),
        bare="on",
        section=("精度和内存", "precision and memory"),
    )
    bf16: bool = setting(
        False, "用 bf16 计算：硬件真正支持才打开", "compute in bf16: only where the hardware truly has it"
    )
    gradient_checkpointing: str = setting(
        "auto",
        "用时间换内存：auto 只在内存不够时启用",
        "trade time for memory: auto only when memory needs it",
        choices=("auto", "on", "off"),
        bare="on",
    )
    load_in_4bit: bool = setting(
        False,
        "底座以 4 位放在内存里（QLoRA，需要 bitsandbytes）：底座大时才值得",
        "hold the base in 4 bits (QLoRA, needs bitsandbytes): for large bases",
    )
    allow_shorter: bool = setting(
        False,
        "连一行都放不下时，允许缩短 max_length",
        "where not even one row fits, max_length may be lowered",
    )
    logging_steps: int = setting(
        DEFAULT_LOGGING_STEPS,
        "每多少步记录一次 loss；不指定时，不到 200 步的训练每步都记",
        "steps between logged losses; unless it is given, a run below 200 steps logs each of them",
        minimum=1,
        maximum=10**8,
        section=("日志和检查点", "logs and checkpoints"),
    )
    save_strategy: str = setting(
        "epoch",
        "何时保存检查点：每个 epoch、每 save_steps 步，或不保存",
        "when to save a checkpoint: each epoch, every save_steps steps, or never",
        choices=("epoch", "steps", "no"),
    )
    save_steps: int = setting(
        100,
        "save_strategy=steps 时，每多少步保存一次",
        "steps between checkpoints with save_strategy=steps",
        minimum=1,
        maximum=10**8,
    )
    save_total_limit: Optional[int] = setting(
        None, "最多保留几个检查点；不写则全部保留", "most checkpoints kept; all if not given", minimum=1, maximum=10**6
    )
    report_to: str = setting(
        "none",
        "把训练曲线发送给哪个工具",
        "tracker that gets the curves",
        choices=("none", "tensorboard", "wandb", "trackio", "swanlab"),
    )
    merge_adapter: bool = setting(
        False,
        "另写一份合并好的完整模型到 merged/",
        "also write the merged whole model to merged/",
        section=("训练之后", "afterwards"),
    )
    run_inference: bool = setting(
        False,
        "训练后让底座和微调后的模型并排回答四个问题；有验证集就从中取，附参考答案",
        "afterwards base and adapter answer four questions, from the validation set, if there is one, with references",
        common=True,
    )
    skip_login: bool = setting(False, "不使用 HF_TOKEN 登录", "do not log in with HF_TOKEN")


def claim_folder(settings: TrainSettings) -> tuple[TrainSettings, OutputFolder]:
    """The settings of the run and its folder, once both are known to be right; nothing is written yet."""
    ensure_single_process()
    if settings.resume:
        settings = settings_as_begun(settings, record_in(settings.output_dir))
    check_lora_settings(settings)
    compat.check_tracker(settings.report_to)
    if settings.json and not settings.plan:
        raise UserError(text("--json 只和 --plan 一起用", "--json goes with --plan"), fix="--plan --json")
    # a plan writes nothing, so an earlier run is no obstacle
    overwrite = settings.overwrite or (settings.plan and not settings.resume)
    return settings, OutputFolder.claim(settings.output_dir, settings.resume, overwrite, asdict(settings))


@entry_point
def main(argv: Optional[Sequence[str]] = None, prog: str = "fine_tuning_practice.py") -> int:
    """The story of a run, chapter by chapter; what one chapter makes, the next ones use. Returns the exit code."""
    settings = parse(TrainSettings, argv, prog, text("用 LoRA 微调一个小模型", "fine-tune a small model with LoRA"))

    # 1. Claim the output folder; a resumed run takes the settings that are not given from its record there
    prepare_environment()
    settings, folder = claim_folder(settings)  # folder.resumed_record: {} for a new run

    # 2. Find the base model and the data: a folder, a file, the Hub, or the embedded ones
    given = given_by_user(settings, SHIPPED)  # used as they are; only defaults may be replaced by the embedded ones
    sources = find_sources(settings, given, folder.resumed_record)
    sources = replace(sources, model=with_file_digests(sources.model))  # by which --resume knows the base again
    check_same_base(folder.resumed_record, sources.model)
    compat.check_torch_version()
    from lora_practice.training import build, plan, plan_text  # torch, transformers, TRL and PEFT: seconds to load
    from lora_practice.training import run as training_run

    # 3. Choose device and precision; prepare the data: token ids, and labels that train the answers only
    machine = choose_device(read_facts(measure=True), settings.bf16, weights=stored_bytes(sources.model.path))
    tokenizer = load_tokenizer(sources.model, settings.chat_template_path, "chat_template_path" in given)
    data = prepare(sources.data, sources.subset, tokenizer, settings)
    check_same_data(folder.resumed_record, data.facts)

    # 4. Build the model: the frozen base with LoRA, and, on a CPU (`--fast auto`), the fast engine if it supports them
    quantization = four_bit(machine.device, machine.precision) if settings.load_in_4bit else {}
    base = load_base(sources.model, weights_dtype(machine, sources.model, settings.fast), **quantization)
    model = add_lora(base, settings, sources.model)
    check_vocabulary(model, tokenizer, sources.model.name)
    engine = build.build_engine(model, settings, machine)

    # 5. Fit a step into memory: computed in smaller portions (same rows, same steps); --allow_shorter may cut long rows
    trainer = build.build_trainer(model, engine, tokenizer, data.train, settings, machine, folder)
    while (fitting_length := build.fit_memory(trainer, settings)) < settings.max_length:
        settings = with_given(settings, max_length=fitting_length)  # recorded as given, so that --resume keeps it
        data = prepare(sources.data, sources.subset, tokenizer, settings)
        trainer = build.build_trainer(model, engine, tokenizer, data.train, settings, machine, folder)

    # 6. Try two steps and tell what the run will take; then train, unless only the plan was asked for
    steps = build.steps_of(trainer)
    estimate = plan.estimate(trainer, sources.model, steps, settings, data.held_out, sources.downloaded_mb)
    tell(build.opening_lines(machine, sources.model, sources.data, data, trainer, estimate, settings.plan))
    if settings.plan:
        return plan_text.show_plan(estimate, trainer, settings, machine)
    record = {**starting_record(settings, machine, sources, data), "estimate": estimate.record()}
    folder.begin(record)
    record.update(training_run.train(trainer, data.held_out, settings))
    if record["interrupted"]:
        folder.write_record({**record, "status": "interrupted"})
        tell(how_to_resume(record))
        return 130  # the exit code of Ctrl-C

    # 7. Write the results: adapter, tokenizer, model card, and the record last; then what was asked for besides
    training_run.finish(trainer, record)
    if settings.run_inference:
        record["samples"] = answer_side_by_side(model, tokenizer, data.held_out_conversations)
        training_run.write_card(folder, record)
    if settings.merge_adapter:
        tell(merge_sentence(*merge_adapter(folder.path)))
    tell(closing_lines(folder.path, record))
    return 0


if __name__ == "__main__":
    main()
