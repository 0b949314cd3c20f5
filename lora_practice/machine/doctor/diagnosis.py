"""What is wrong on a machine and how to fix it: pure functions of its facts and surroundings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lora_practice.console.text import text
from lora_practice.machine import gpus
from lora_practice.machine.doctor.surroundings import Place, Surroundings
from lora_practice.machine.facts import Facts
from lora_practice.machine.gpu_problems import gpu_problem, sm_name
from lora_practice.sources import embedded

STOP, MEND, NOTE = "stop", "mend", "note"
# measured for SmolLM2-135M on short chats: the least it can start with, and what it takes
LEAST_MEMORY, COMFORTABLE_MEMORY = 1.1e9, 2.1e9
LEAST_DISK = 200e6  # bytes; an adapter and a few checkpoints


@dataclass(frozen=True)
class Finding:
    """One finding: `level` is STOP (no training here), MEND (training works, but worse) or NOTE; `cure` a command or
    advice, often empty.
    """

    level: str
    what: str
    cure: str = ""


def diagnose(facts: Facts, around: Surroundings) -> list[Finding]:
    """All findings, the worst level first."""
    found = [*_libraries(facts, around), *_memory(facts), *_disks(around), *_card(facts), *_processor(facts, around)]
    found += _network(around)
    return sorted(found, key=lambda one: (STOP, MEND, NOTE).index(one.level))


def _libraries(facts: Facts, around: Surroundings) -> Iterator[Finding]:
    missing = [name for name, version in around.versions.items() if version is None]
    if missing:
        what = text(f"没有安装：{'、'.join(missing)}", f"not installed: {', '.join(missing)}")
        yield Finding(STOP, what, "pip install -e .")
    if facts.torch_trouble and "torch" not in missing:
        what = text(f"torch 无法加载：{facts.torch_trouble}", f"torch does not load: {facts.torch_trouble}")
        yield Finding(STOP, what, "pip install --force-reinstall torch")
    if (0, 0) < gpus.release(facts.torch) < (2, 6):
        zh, en = f"torch {facts.torch} 太旧，无法从检查点继续训练", f"torch {facts.torch} is too old to resume"
        yield Finding(STOP, text(zh, en), 'pip install "torch>=2.6"')


def _memory(facts: Facts) -> Iterator[Finding]:
    total, free = facts.memory_total, facts.memory
    close = text("关掉其他程序", "close other programs")
    if facts.memory_limit:
        close = text("放宽容器的内存限制", "give the container more memory")
    if facts.memory_ulimit and facts.memory_ulimit <= free:
        close = "ulimit -v unlimited"
    if total and total < LEAST_MEMORY:
        what = text(
            f"内存一共只有 {gigabytes(total)}，训练至少要 1.1 GB",
            f"{gigabytes(total)} of memory; training takes 1.1 GB",
        )
        yield Finding(STOP, what, close)
    elif free and free < COMFORTABLE_MEMORY:
        yield Finding(
            MEND,
            text(
                f"内存只剩 {gigabytes(free)}：短对话约需 1.5 GB",
                f"{gigabytes(free)} of memory free; short chats take about 1.5 GB",
            ),
            text(f"{close}，或加 --max_length 128", f"{close}, or add --max_length 128"),
        )


def _disks(around: Surroundings) -> Iterator[Finding]:
    to_fetch = not all(need.here for need in around.embedded)
    fetching = embedded.MODEL.disk_megabytes * 1e6 if to_fetch else 0.0
    for place, needed, variable in (
        (around.output, LEAST_DISK, "--output_dir"),
        (around.cache, fetching, "LORA_PRACTICE_CACHE"),
    ):
        if not needed:
            continue
        elsewhere = text(f"用 {variable} 换个地方", f"choose another place with {variable}")
        if not place.writable:
            yield Finding(STOP, text(f"无法写入 {place.path}", f"{place.path} cannot be written"), elsewhere)
        elif place.free < needed:
            yield Finding(STOP, _too_little(place, needed), elsewhere)


def _too_little(place: Place, needed: float) -> str:
    return text(
        f"{place.path} 只剩 {place.free / 1e6:.0f} MB，要 {needed / 1e6:.0f} MB",
        f"{place.path}: {place.free / 1e6:.0f} MB free, {needed / 1e6:.0f} MB needed",
    )


def _card(facts: Facts) -> Iterator[Finding]:
    problem = gpu_problem(facts)
    if problem and (facts.gpu or facts.card_on_bus or facts.driver_trouble):
        yield Finding(MEND if problem.cure else NOTE, problem.what, problem.cure)
    elif problem and facts.wsl:
        yield Finding(
            NOTE,
            text("WSL 里看不到 NVIDIA 显卡", "no NVIDIA card is seen inside WSL"),
            text(
                "如果有显卡：用 WSL 2，驱动装在 Windows 里",
                "if there is one: WSL 2, with the driver installed in Windows",
            ),
        )
    elif not problem and facts.capability and facts.capability < (7, 5):
        yield Finding(
            NOTE,
            text(
                f"{facts.gpu}（{sm_name(facts)}）：torch 2.14 是最后一个支持它的版本，驱动最高 580",
                f"{facts.gpu} ({sm_name(facts)}): torch 2.14 is the last for it, and driver 580",
            ),
            text("不要升级到 torch 2.15", "do not upgrade to torch 2.15"),
        )


def _processor(facts: Facts, around: Surroundings) -> Iterator[Finding]:
    if facts.cores < facts.board_cores:
        zh = f"机器有 {facts.board_cores} 核，这里只能用 {facts.cores} 核"
        yield Finding(NOTE, text(zh, f"the machine has {facts.board_cores} cores, {facts.cores} of them usable here"))
    if facts.cuda_usable and not gpu_problem(facts):
        return  # the findings below concern training on the CPU
    if facts.instructions is not None and not {"avx2", "asimd"} & set(facts.instructions):
        yield Finding(NOTE, text("CPU 没有 AVX2：能训练，但慢得多", "the CPU has no AVX2: it trains, but much slower"))
    if facts.torch and not around.compiler:
        yield Finding(
            MEND,
            text(
                "没有 C++ 编译器：快速路径改用 torch 算子，慢一些",
                "no C++ compiler: the fast path takes torch's pieces, slower",
            ),
            text(
                "sudo apt install g++（macOS：xcode-select --install）",
                "sudo apt install g++ (macOS: xcode-select --install)",
            ),
        )


def _network(around: Surroundings) -> Iterator[Finding]:
    hub, wanted = around.hub, [need for need in around.wanted if not need.here]
    if not hub.reachable and wanted:
        names = text("、", ", ").join(need.name for need in wanted)
        why = text(f"连不上 {hub.endpoint}", f"{hub.endpoint} cannot be reached")
        cure = text("用 HF_ENDPOINT 设一个镜像，或用 --embedded", "set a mirror in HF_ENDPOINT, or use --embedded")
        if hub.offline_wanted:
            why = text("设置了 HF_HUB_OFFLINE（离线）", "HF_HUB_OFFLINE is set")
            cure = text("取消 HF_HUB_OFFLINE，或用 --embedded", "unset HF_HUB_OFFLINE, or use --embedded")
        yield Finding(MEND, text(f"{why}，无法下载 {names}", f"{why}, so {names} cannot be fetched"), cure)
    if hub.token == "refused":
        zh, en = "Hub 不接受你的 token", "the Hub does not accept your token"
        yield Finding(MEND, text(zh, en), text("换一个，或加 --skip_login", "use another, or add --skip_login"))
    elif hub.token == "read":
        zh, en = "token 是只读的：能下载，不能上传", "the token is read-only: it fetches, but cannot upload"
        yield Finding(NOTE, text(zh, en))


def gigabytes(count: float) -> str:
    """Text like "7.5 GB", where 1 GB is 2**30 bytes, as memory and cards are sold."""
    return f"{count / 2**30:.1f} GB"
