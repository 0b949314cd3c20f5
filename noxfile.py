"""两个版本栈、五个 Python：`nox` 逐个装好并测试；没装的 Python 会说明并跳过。
Two stacks, five Pythons: `nox` installs and tests each; a Python that is not here is skipped and said.

    nox                               全部 / all of them
    nox -s lowest                     一个 / one
    nox -s lowest -- tests/unit -x   横线后的参数传给 pytest / what follows goes to pytest

Environments are kept in .nox and used again. torch follows the machine as in scripts/environment.sh: where the
CPU build cannot be had, each environment on Linux holds a CUDA build, several GB.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from pathlib import Path

import nox

nox.options.reuse_venv = "yes"
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = False  # also where CI is set

# pyenv's python3.9 answers only where 3.9 is among the versions in use: let all be, the one that runs this first
PROGRAM = shutil.which("pyenv")  # in the root of a git clone, but Homebrew's lies elsewhere
ROOTS = [os.environ.get("PYENV_ROOT"), PROGRAM and Path(PROGRAM).parents[1], Path.home() / ".pyenv"]
FOLDERS = [Path(root) / "versions" for root in ROOTS if root]
VERSIONS = next((folder for folder in FOLDERS if folder.is_dir()), FOLDERS[-1])
if VERSIONS.is_dir():
    names = sorted(one.name for one in VERSIONS.iterdir())
    os.environ["PYENV_VERSION"] = ":".join(sorted(names, key=lambda name: name != platform.python_version()))
    os.environ["PYENV_ROOT"] = str(VERSIONS.parent)


def install(session: nox.Session, stack: str, extras: str, *others: str) -> None:
    """This project with the versions of `requirements/<stack>.txt`, its torch built for what this machine has."""
    versions = f"requirements/{stack}.txt"
    if platform.system() == "Linux":
        torch = f". scripts/environment.sh; PYTHON=python install_torch {versions}"
        session.run_install("bash", "-euc", torch, external=True)
    session.install("-c", versions, "-e", f".[{extras}]", *others)


def install_and_test(session: nox.Session, stack: str, *tests: str) -> None:
    """A stack installed; then `tests`, or what was asked for."""
    install(session, stack, "test")
    # two files at a time, each on one core, in the given order: the long ones first
    side_by_side = () if "-s" in tests else ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")
    session.run("python", "-m", "pytest", "-p", "no:cacheprovider", *side_by_side, *(session.posargs or tests))


@nox.session(python="3.11")
def newest(session: nox.Session) -> None:
    """The new stack, everything."""
    install_and_test(session, "newest", "tests/real", "tests/tiny", "tests/unit")


@nox.session(python="3.9")
def lowest(session: nox.Session) -> None:
    """The lowest versions that pyproject.toml allows, everything."""
    install_and_test(session, "lowest", "tests/real", "tests/tiny", "tests/unit")


@nox.session(python="3.9")
def old(session: nox.Session) -> None:
    """The old stack: the newest that Python 3.9 allows, everything."""
    install_and_test(session, "cu126", "tests/real", "tests/tiny", "tests/unit")


@nox.session(python=["3.10", "3.12", "3.13"])
def quick(session: nox.Session) -> None:
    """The new stack on the other Pythons, without the model."""
    install_and_test(session, "newest", "tests/tiny", "tests/unit")


@nox.session(python="3.11", default=False)
def kills(session: nox.Session) -> None:
    """Real trainings killed again and again; KILLS and KILL_SEED choose how often and when."""
    install_and_test(session, "newest", "tests/kills", "-s")


@nox.session(python="3.11", default=False)
def four_bits(session: nox.Session) -> None:
    """A base in 4 bits. Beside bitsandbytes peft imports other things, so not where everything else is tested."""
    install(session, "newest", "test,bnb")
    session.run(
        "python", "-m", "pytest", "-p", "no:cacheprovider", *(session.posargs or ["tests/real/test_lora_family.py"])
    )


@nox.session(python="3.11")
def audit(session: nox.Session) -> None:
    """Known holes in what is installed (pip-audit, which asks a service on the network), and bandit over our code."""
    install(session, "newest", "test", "pip-audit")
    session.run("bandit", "-q", "-c", "pyproject.toml", "-r", "lora_practice", *session.posargs)
    report = Path(session.create_tmp()) / "audit.json"
    report.unlink(missing_ok=True)
    how = ("--skip-editable", "--progress-spinner=off", "--timeout=15", "--format=json", f"--output={report}")
    session.run("pip-audit", *how, success_codes=[0, 1])  # 1: holes, or no service
    packages = json.loads(report.read_text("utf-8"))["dependencies"] if report.is_file() else []
    # it says "No known vulnerabilities" also where its service knew not one of the packages
    audited = [one for one in packages if "vulns" in one]
    if not audited:
        session.skip("no service of vulnerabilities could be asked (no network?): nothing was audited")
    holes = [f"{one['name']} {one['version']}: {hole['id']}" for one in audited for hole in one["vulns"]]
    if holes:
        session.error("known vulnerabilities: " + ", ".join(holes))
    session.log(f"{len(audited)} of {len(packages)} packages audited: no known vulnerabilities")
