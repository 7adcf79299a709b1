"""A page in a real browser: sorting works, nothing is blank, long tables do not push the page wide."""

import json
import re
import shutil
import subprocess

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")
# Run at the end of the page: presses headings as a reader would and leaves what is then there in the title.
PROBE = """
<script>
const rows = (name) => Array.from(document.querySelectorAll(`#${name} tbody tr`));
const column = (name, number) => rows(name).map((row) => row.cells[number].dataset.key);
const heading = (name, number) => document.getElementById(name).tHead.rows[0].cells[number];
const found = {opened: column("results", 4), opened_sort: heading("results", 4).getAttribute("aria-sort")};
const button = heading("results", 4).querySelector("button");
button.click();
found.clicked = column("results", 4);
found.clicked_sort = heading("results", 4).getAttribute("aria-sort");
heading("results", 1).querySelector("button").click();
found.weights = column("results", 1);
found.sorted_columns = document.querySelectorAll("#results [aria-sort]").length;
heading("results", 0).querySelector("button").click();
found.names = column("results", 0);
button.focus();
found.focused = document.activeElement === button;
found.page_width = document.documentElement.scrollWidth;
found.window_width = document.documentElement.clientWidth;
found.table_width = document.getElementById("results").scrollWidth;
const sizes = Array.from(document.querySelectorAll("svg"), (svg) => svg.getBoundingClientRect());
found.pictures = sizes.filter((size) => size.width > 300 && size.height > 100).length;
document.title = JSON.stringify(found);
</script>
</body>"""


def run_browser(*arguments: str) -> str:
    """What a headless browser prints."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout


def test_headings_sort_their_tables_and_the_page_stays_as_wide_as_its_window(study_page, tmp_path):
    probed = tmp_path / "probed.html"
    probed.write_text(study_page.read_text(encoding="utf-8").replace("</body>", PROBE), encoding="utf-8")
    address = f"file://{probed}#sort=results:4:ascending"
    dumped = run_browser("--window-size=500,800", "--dump-dom", address)
    title = re.search(r"<title>(\{.*?\})</title>", dumped).group(1)
    found = json.loads(title.replace("&quot;", '"').replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))

    scores = [float(key) for key in found["opened"]]
    assert len(scores) == 4 and scores == sorted(scores) and found["opened_sort"] == "ascending"
    assert found["clicked"] == found["opened"][::-1] and found["clicked_sort"] == "descending"
    # Cells without a number stand last; only one column is said to be sorted.
    weights = found["weights"]
    assert float(weights[0]) > float(weights[1]) and weights[2:] == ["", ""] and found["sorted_columns"] == 1
    assert found["names"] == sorted(found["names"])
    assert found["focused"]
    assert found["table_width"] > found["window_width"] == found["page_width"]
    assert found["pictures"] == 6


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_screenshot_shows_text_on_the_background_of_either_scheme(study_page, tmp_path, scheme):
    from matplotlib.image import imread

    shot = tmp_path / "shot.png"
    preference = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    run_browser("--window-size=900,1200", preference, f"--screenshot={shot}", f"file://{study_page}")
    pixels = imread(shot)[..., :3].mean(axis=2)
    assert pixels.shape == (1200, 900)
    background = pixels[2, 2]
    assert background > 0.95 if scheme == "light" else background < 0.15
    # The heading, in the upper left, is written in a colour far from the background's.
    heading = pixels[20:70, 20:300]
    assert (abs(heading - background) > 0.6).mean() > 0.02
    assert 0.03 < (abs(pixels - background) > 0.3).mean() < 0.9
