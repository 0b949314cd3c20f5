"""The package installed as users install one, not in place: every command works from a folder that holds nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest
from journey_harness import ROOT, environment

from lora_practice.sources import embedded

FEW = ("--embedded", "--train_subset_size", "4", "--gradient_accumulation_steps", "4", "--output_dir", "out")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from what a clone holds, without the folders that building leaves behind."""
    place = tmp_path_factory.mktemp("wheel")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in names.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (place / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
            (place / "clone" / name).write_bytes((ROOT / name).read_bytes())
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", "-q", "-w", str(place)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(place / "clone")], check=True)
    return next(place.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of an environment with the wheel and these tests' libraries, but not with this folder."""
    home = tmp_path_factory.mktemp("environment") / "env"
    venv.create(home, symlinks=os.name != "nt")
    bin_folder = home / ("Scripts" if os.name == "nt" else "bin")
    python = str(bin_folder / "python")
    report = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", report], capture_output=True, text=True, check=True).stdout.strip())
    # a line that is a path adds it, and does not read the .pth files there: our editable install stays outside
    (site / "libraries.pth").write_text("\n".join({sysconfig.get_path("purelib"), *_library_folders()}) + "\n")
    options = ["--no-deps", "--no-index", "--disable-pip-version-check", "-q", "--prefix", str(home), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "install", "--ignore-installed", *options], check=True)
    return bin_folder


def _library_folders() -> set[str]:
    """Where these tests' libraries lie, if not in this environment's own folder."""
    import torch

    return {str(Path(torch.__file__).parents[1])}


def run(installed: Path, place: Path, *words: str) -> subprocess.CompletedProcess:
    """`lora-practice *words` in the folder `place`."""
    env = environment(place / "home", PYTHONPATH=None, LORA_PRACTICE_CACHE=str(embedded.cache_dir()))
    command = [str(installed / "lora-practice"), *words]
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done


def test_the_wheel_holds_no_global_module_but_the_training_script(wheel: Path) -> None:
    names = ZipFile(wheel).namelist()
    top = {name.partition("/")[0] for name in names if ".dist-info" not in name}
    assert top == {"lora_practice", "fine_tuning_practice.py"}
    for data in ("report/html.jinja", "fast/kernels/kernels.cpp", "fast/kernels/blocks.h"):
        assert f"lora_practice/{data}" in names


@pytest.mark.usefixtures("embedded_model", "embedded_rows")
def test_training_and_what_follows_it_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    where = "import lora_practice; print(lora_practice.__file__)"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run([installed / "python", "-c", where], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert str(installed.parent) in found.stdout, found  # the wheel's, not this folder's
    told = run(installed, tmp_path, "train", *FEW).stderr
    assert "lora-practice infer" in told and (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert run(installed, tmp_path, "infer", "--model_dir", "out", "--prompt", "Hi", "--max_new_tokens", "4").stdout
    assert "report.html" in run(installed, tmp_path, "report", "out").stdout
    assert run(installed, tmp_path, "inspect", "out").stdout
