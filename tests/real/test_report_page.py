"""The report of a real run, opened in a real browser: drawn, quiet, asks nobody, and fits a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from journey_harness import run, succeeded

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
# A phone is 390 wide; a headless window has a least width, so the page stands in a frame of that width.
FRAME = """<body><iframe width="390" height="800" src="report.html"></iframe><script>
const frame = document.querySelector("iframe");
const look = setInterval(() => {
  const page = frame.contentDocument;
  if (!page.body || !page.body.dataset.drawn) return;
  clearInterval(look);
  const root = page.documentElement, style = frame.contentWindow.getComputedStyle(page.body);
  const wide = [...page.querySelectorAll("main *")].filter(one => one.getBoundingClientRect().right > 390.5);
  const drawings = [...page.querySelectorAll(".main-svg")];
  const tell = what => frame.contentWindow.dispatchEvent(new Event(what));
  tell("beforeprint");
  const scaled = drawings.map(one => one.viewBox.baseVal?.width === one.width.baseVal.value);
  tell("afterprint");
  document.body.textContent = "<<<" + JSON.stringify({
    drawn: page.body.dataset.drawn, scroll: root.scrollWidth, wide: wide.map(one => one.tagName),
    charts: [...page.querySelectorAll(".figure")].map(one => one.querySelectorAll("path.js-line, .hm image").length),
    asked: frame.contentWindow.performance.getEntriesByType("resource").map(one => one.name),
    scaled, restored: drawings.every(one => !one.hasAttribute("viewBox")),
    paper: style.backgroundColor, fallback: page.getElementById("fallback").hidden,
  }) + ">>>";
}, 50);
</script>"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


def opened(folder: Path, *flags: str) -> tuple[dict[str, Any], str]:
    """What the page in `folder` looks like to a browser, and what the browser says of it."""
    (folder / "frame.html").write_text(FRAME, "utf-8")
    profile = folder / "browser"
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        *QUIET,
        *flags,
        f"--user-data-dir={profile}",
    ]
    command += [
        "--allow-file-access-from-files",
        "--enable-logging=stderr",
        "--virtual-time-budget=20000",
        "--dump-dom",
    ]
    options: dict[str, Any] = {"capture_output": True, "text": True, "encoding": "utf-8", "timeout": 300}
    done = subprocess.run([*command, (folder / "frame.html").as_uri()], **options)
    found = re.search("&lt;&lt;&lt;(.*)&gt;&gt;&gt;", done.stdout)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(found.group(1)), done.stderr


def report(folder: Path, language: str = "en") -> subprocess.CompletedProcess:
    """The command, as a user runs it."""
    words = ("-m", "lora_practice.cli", "report", str(folder))
    return succeeded(run(folder.parent, *words, LORA_PRACTICE_LANG=language))


@pytest.mark.parametrize(("language", "theme"), [("en", 1), ("zh", 0)], ids=["en-light", "zh-dark"])
def test_the_page_is_drawn_quiet_asks_nobody_and_fits_a_phone(copied, language, theme):
    done = report(copied, language)
    assert done.stdout.strip().endswith("report.html")
    seen, said = opened(copied, f"--blink-settings=preferredColorScheme={theme}")
    assert seen["drawn"] == "yes" and seen["fallback"] is True, seen
    assert seen["asked"] == []
    assert "CONSOLE" not in said, said
    assert seen["scroll"] <= 390 and seen["wide"] == []
    assert len(seen["charts"]) == 6 and all(seen["charts"]), seen["charts"]
    assert seen["charts"][0] >= 3  # training, smoothed, held out
    assert seen["scaled"] and all(seen["scaled"]) and seen["restored"]  # to the width of the paper, while it prints
    assert seen["paper"] == ("rgb(255, 255, 255)" if theme else "rgb(20, 24, 29)")


def test_the_curves_stand_in_the_card_of_a_real_run(copied):
    report(copied)
    card = (copied / "README.md").read_text("utf-8")
    assert "![training curves](curves.png)" in card
    assert (copied / "curves.png").stat().st_size > 10_000


def test_speed_and_memory_are_recorded_at_each_logged_step(trained):
    pace = trained.record["pace"]
    assert [entry["step"] for entry in pace] == list(range(1, 9))
    assert all(entry["tokens_per_second"] > 0 and entry["memory_mb"] > 100 for entry in pace)
