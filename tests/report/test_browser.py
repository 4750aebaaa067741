"""The page in a real browser, from the disk: nothing on the console, all pictures drawn, nothing wider than a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from embedgrad.cli.commands import report

pytest.importorskip("plotly")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# A frame as wide as a phone, because a window without a head has a least width; it measures the page inside.
FRAME = """<!DOCTYPE html><title>frame</title><iframe id="page" width="375" height="700" src="report.html"></iframe>
<pre id="seen"></pre>
<script>
document.getElementById("page").addEventListener("load", () => setTimeout(() => {
  const page = document.getElementById("page").contentDocument;
  document.getElementById("seen").textContent = JSON.stringify({
    width: page.documentElement.scrollWidth,
    plots: page.querySelectorAll(".plot").length,
    drawn: page.querySelectorAll(".plot .main-svg .subplot").length,
    wide: [...page.querySelectorAll(".scroll")].some(box => box.scrollWidth > box.clientWidth),
    colour: getComputedStyle(page.body).backgroundColor,
  });
}, 2000));
</script>"""


@pytest.mark.parametrize(("flags", "background"), [([], "rgb(255, 255, 255)"), (["dark"], "rgb(20, 24, 28)")])
def test_the_page_in_a_browser(copied: Path, tmp_path: Path, flags: list[str], background: str) -> None:
    browser = next((found for name in NAMES if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on PATH")
    report.run([copied], None, 5)
    (copied / "frame.html").write_text(FRAME)
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
            f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=20000",
            *(["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if flags else []),
            "--dump-dom", (copied / "frame.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r'<pre id="seen">(\{.*?\})</pre>', done.stdout)
    assert found is not None, done.stderr[-2000:]
    seen = json.loads(found[1])
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    assert seen["plots"] == 5
    assert seen["drawn"] == 5
    assert seen["width"] <= 375
    assert seen["wide"]  # the table of tokens, in its own box
    assert seen["colour"] == background
