"""A page is one file that needs nothing beside it, says everything, and shows whatever a study holds as text."""

import base64
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from report_cases import TUNED, assert_mistakes, changed, run_command
from synthetic_study import log_text

from mtl_lora.report.__main__ import write_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
EVALUATION = {
    **TUNED,
    "commit": "f" * 40,
    "versions": {"torch": "9.9"},
    "command": "mtl-lora evaluate --checkpoint run",
    "settings": {"mode": "score", "template": "<script>alert(1)</script>"},
    "adapter": {"weights_sha256": "d" * 64, "origin": {"base_fingerprint": "e" * 64, "commit": "9" * 40}},
}


class Outline(HTMLParser):
    """Tags with their attributes, and the rows of each table by its caption ("" for one without)."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.tables, self.inside = [], {}, ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag
        if tag == "table":
            self.rows = self.tables.setdefault("", [])
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "caption":
            self.rows = self.tables[data] = []
        elif self.inside in ("th", "td"):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def page_path(study_folder, tmp_path_factory):
    """The path of the small study's page."""
    return write_page(str(study_folder), str(tmp_path_factory.mktemp("page") / "page.html"))


@pytest.fixture(scope="module")
def page(page_path) -> str:
    return page_path.read_text(encoding="utf-8")


@pytest.mark.slow
def test_nothing_is_fetched_and_figures_are_whole_and_described(page):
    figures = 0
    for tag, attributes in Outline(page).tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "script"), tag
        assert not [name for name in attributes if name.startswith("on") or name in ("href", "srcset", "action")]
        if tag == "img":
            head, content = attributes["src"].split(",")
            assert head == "data:image/svg+xml;base64" and attributes["alt"]
            figures += ElementTree.fromstring(base64.b64decode(content)).tag.endswith("svg")  # noqa: S314 - ours
    assert figures == 5 and "@import" not in page and "url(" not in page
    assert page.startswith("<!DOCTYPE html>")


@pytest.mark.slow
def test_tables_notes_commands_and_hashes_are_there(page):
    tables = Outline(page).tables
    assert {"Results", "Differences from the baseline", "Search of learning_rate on the development set"} <= set(tables)
    assert [row[0] for row in tables["Results"][2:]] == ["SmolLM2-135M <base> & no adapter", "LoRA", "MTL-LoRA"]
    for text in ("--adapter_name mtl_lora --seed 1", "0" * 40, "1" * 40, "a" * 64, "b" * 64, "max steps"):
        assert text in page, text


@pytest.mark.slow
def test_what_a_study_holds_is_shown_as_text_and_never_as_markup(page):
    assert "A note with &lt;b&gt;markup&lt;/b&gt; &amp; an ampersand" in page
    assert "SmolLM2-135M &lt;base&gt; &amp; no adapter" in page
    assert "<base" not in page and "<News" not in page and "<b>" not in page


@pytest.mark.slow(1)
def test_a_page_of_an_evaluation_is_the_same_bytes_every_time(write, tmp_path, capsys):
    folder, again = write(changed(EVALUATION, tasks__first__unparsed=0.01)), tmp_path / "again.html"
    assert run_command(capsys, "page", folder / "results.json", "--output", again) == (0, f"{again}\n", "")
    assert run_command(capsys, "page", folder)[1] == f"{folder / 'page.html'}\n"
    text = again.read_text(encoding="utf-8")
    assert (folder / "page.html").read_text(encoding="utf-8") == text
    tables = Outline(text).tables
    assert tables["mtl_lora (score)"][1][:5] == ["First", "300", "75.0 ± 3.0", "60.0", "1.0"]
    facts = dict(tables[""])
    assert facts["settings template"] == "<script>alert(1)</script>" and "<script>" not in text
    assert (facts["commit"], facts["versions torch"], facts["weights sha256"]) == ("f" * 40, "9.9", "d" * 64)
    assert (facts["data first"], facts["origin commit"]) == ("aaaa", "9" * 40)
    assert facts["command"] == "mtl-lora evaluate --checkpoint run"
    assert tables["mtl_lora (score)"][3][:4] == ["Average", "400", "47.5 ± 2.1", "45.0"]


def test_a_page_shows_answers_right_and_wrong_and_the_settings_of_its_own_method(write, tmp_path, capsys):
    lines = [
        {"index": index, "correct": index > 1, "answer": "yes", "text": f"<i>I say {index}</i>", "parsed": "no"}
        for index in range(4)
    ]
    (write(EVALUATION, ".") / "predictions").mkdir()
    (tmp_path / "predictions" / "first.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    configuration = {"command": "mtl-lora train --lora_r 8", "unused_settings": ["num_experts"]}
    configuration |= {"settings": {"num_B": 3, "num_experts": 8}, "tasks": TUNED["task_set"]}
    (tmp_path / "run.json").write_text(json.dumps(configuration))
    assert run_command(capsys, "page", tmp_path)[0] == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    tables = Outline(text).tables
    assert [row[1:] for row in tables["Answers of mtl_lora"][1:]] == [
        ["0", "wrong", "yes", "<i>I say 0</i>"],
        ["2", "right", "yes", "<i>I say 2</i>"],
    ]
    facts = [row for rows in tables.values() for row in rows]
    assert ["command", "mtl-lora train --lora_r 8"] in facts and ["settings num B", "3"] in facts
    assert "num experts" not in text and "<i>" not in text


@pytest.mark.slow(1)
def test_a_page_of_a_training(tmp_path, random, capsys):
    tasks = {"tides": "Tides", "maps": "Maps"}
    (tmp_path / "train_log.jsonl").write_text(log_text(random, tasks))
    configuration = {"tasks": {"tasks": [{"name": name, "id": index} for index, name in enumerate(tasks)]}}
    configuration |= {"settings": {"learning_rate": 0.003}, "data_sha256": "9" * 64}
    (tmp_path / "run.json").write_text(json.dumps(configuration))
    assert run_command(capsys, "page", tmp_path)[0] == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    facts = dict(Outline(text).tables[""])
    assert (facts["settings learning rate"], facts["data sha256"]) == ("0.003", "9" * 64)
    assert text.count("<img") == 1


def test_every_mistake_ends_in_one_sentence(write, tmp_path, capsys, monkeypatch):
    folder = write(EVALUATION)
    mistakes = [
        ([], "run"),
        ([folder, folder], "one folder"),
        ([tmp_path / "missing"], "missing"),
        ([folder, "--output", folder], ".html"),
        ([folder, "--output", folder / "results.json"], ".html"),
    ]
    assert_mistakes(capsys, "page", mistakes)
    for package in ("jinja2", "matplotlib"):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, package, None)
            assert package in run_command(capsys, "page", folder)[2]
    assert not (folder / "page.html").exists()


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")
def test_in_a_browser_figures_have_a_size_and_long_tables_do_not_push_the_page_wide(page_path, tmp_path):
    probe = """<script>addEventListener("load", () => { document.title = JSON.stringify({
        page: document.documentElement.scrollWidth, window: document.documentElement.clientWidth,
        table: document.querySelector("table").scrollWidth,
        figures: Array.from(document.images).filter((image) => image.naturalWidth > 300).length
    }); });</script></body>"""
    probed = tmp_path / "probed.html"
    text = page_path.read_text(encoding="utf-8").replace(
        "default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'"
    )
    probed.write_text(text.replace("</body>", probe), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=500,800"]
    command += ["--dump-dom", f"file://{probed}"]
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout
    found = json.loads(re.search(r"<title>(\{.*?\})</title>", dumped).group(1).replace("&quot;", '"'))
    assert found["table"] > found["window"] == found["page"] and found["figures"] == 5
