"""A page is one file that needs nothing beside it, says everything, and shows whatever a study holds as text."""

import json
import re
import sys
from html.parser import HTMLParser

import pytest
from report_records import TUNED, changed, run_command
from synthetic_study import analysis, log_text

from mtl_lora.report.page.inline_svg import inline_svg
from mtl_lora.report.page.tables import accuracy_cell, difference_cell
from mtl_lora.report.study import OVER_QUESTIONS, OVER_SEEDS, Value

EVALUATION = {
    **TUNED,
    "commit": "f" * 40,
    "device": "a machine",
    "versions": {"torch": "9.9"},
    "command": "commonsense_evaluate.py --checkpoint run",
    "settings": {"mode": "score", "template": "<script>alert(1)</script>"},
    "adapter": {"weights_sha256": "d" * 64, "origin": {"base_fingerprint": "e" * 64, "commit": "9" * 40}},
}


class Outline(HTMLParser):
    """Ids, tags with their attributes, and the cells of each table by its id."""

    def __init__(self, text: str):
        super().__init__()
        self.ids, self.tags, self.tables = [], [], {}
        self.table = self.cell = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag == "table":
            self.table = self.tables.setdefault(attributes.get("id", "facts"), [])
        elif tag == "tr":
            self.table.append([])
        elif tag in ("th", "td"):
            self.table[-1].append("")
            self.cell = True

    def handle_endtag(self, tag):
        self.cell = None if tag in ("th", "td") else self.cell

    def handle_data(self, data):
        if self.cell:
            self.table[-1][-1] += data.replace("\u00a0", " ")


@pytest.fixture(scope="module")
def page(study_page) -> str:
    """The page of the small study."""
    return study_page.read_text(encoding="utf-8")


def test_nothing_is_fetched_and_everything_refers_to_something_in_the_file(page):
    outline = Outline(page)
    for tag, attributes in outline.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base"), tag
        for name in ("src", "href", "xlink:href", "srcset", "action", "poster"):
            target = attributes.get(name, "#")
            assert target.startswith(("#", "data:image/png;base64,")), (tag, target)
            assert target == "#" or target.startswith("data:") or target[1:] in outline.ids, target
        assert not [name for name in attributes if name.startswith("on")]
    assert "@import" not in page
    for target in re.findall(r"url\(([^)]*)\)", page):
        assert target.startswith("#") and target[1:] in outline.ids, target
    assert len(set(outline.ids)) == len(outline.ids)
    assert page.startswith("<!DOCTYPE html>")


def test_tables_hold_the_studys_numbers(page):
    tables = Outline(page).tables
    assert list(tables) == ["results", "against", "transfer", "search", "runs", "facts"]
    results = {row[0]: row[1:] for row in tables["results"]}
    columns = ["CR", "SST-5", "AG <News> & more", "Average"]
    assert results["Experiment"] == [
        *("Trained weights, M (%)", "Rank", "Learning rate"), *columns, "95 % interval of the average",
    ]  # fmt: skip
    assert results["always the most frequent answer"] == ["–", "–", "–", "30.0", "34.0", "38.0", "34.0", "–"]
    assert results["LoRA"][:3] == ["1.85 (1.35 %)", "8", "0.002"]
    assert all(re.fullmatch(r"\d\d\.\d ± \d\.\d", cell) for cell in results["MTL-LoRA"][3:7])
    assert re.fullmatch(r"\d\d\.\d to \d\d\.\d", results["MTL-LoRA"][7])
    assert re.fullmatch(r"\d\d\.\d", results["SmolLM2-135M <base> & no adapter"][3])  # a single run has no spread
    assert [row[0] for row in tables["against"][1:]] == ["MTL-LoRA − LoRA"]
    assert re.fullmatch(r"[+-]\d\.\d \[[+-]\d\.\d, [+-]\d\.\d\]", tables["against"][1][1])
    assert tables["search"][:3] == [
        ["Experiment", "learning_rate", "Development average", "Choice"],
        ["LoRA", "0.001", "50.0", "–"],
        ["LoRA", "0.002", "60.0", "chosen"],
    ]
    assert [row[:5] for row in tables["runs"][2:4]] == [
        ["LoRA", "0", "400", "5.2", "0.7"], ["LoRA", "1", "400", "5.2", "0.7"],
    ]  # fmt: skip


def test_what_a_study_holds_is_shown_as_text_and_never_as_markup(page):
    assert "A note with &lt;b&gt;markup&lt;/b&gt; &amp; an ampersand" in page
    assert "SmolLM2-135M &lt;base&gt; &amp; no adapter" in page
    assert "<base" not in page and "<News" not in page and "<b>" not in page


def test_headers_have_their_scope_and_pictures_their_names(page):
    tags = Outline(page).tags
    headers = [attributes for tag, attributes in tags if tag == "th"]
    assert headers and {attributes["scope"] for attributes in headers} == {"col", "row"}
    ids = Outline(page).ids
    pictures = [attributes for tag, attributes in tags if tag == "svg"]
    assert len(pictures) == 6
    for attributes in pictures:
        assert attributes["role"] == "img"
        assert attributes["aria-labelledby"] in ids and attributes["aria-describedby"] in ids
    assert ("html", {"lang": "en"}) in tags


def test_settings_commands_and_origins_are_there(page):
    for text in ("python finetune.py --adapter_name mtl_lora --seed 1", "0" * 40, "a" * 64, "b" * 64, "max_steps"):
        assert text in page
    assert "test data sha256, sst5" in page
    heading, *rows = Outline(page).tables["runs"]
    assert heading[-2:] == ["Training commit", "Evaluation commit"]
    assert {tuple(row[-2:]) for row in rows} == {("1" * 12, "0" * 12), ("–", "0" * 12)}


def test_a_page_of_the_same_run_is_the_same_bytes(write, tmp_path, capsys):
    folder, again = write(EVALUATION), tmp_path / "again.html"
    code, out, err = run_command(capsys, "page", folder / "results.json", "--output", again)
    assert (code, out, err) == (0, f"{again}\n", "")
    assert run_command(capsys, "page", folder)[1] == f"{folder / 'page.html'}\n"
    assert (folder / "page.html").read_bytes() == again.read_bytes()


def test_a_page_of_an_evaluation(write, capsys):
    folder = write(changed(EVALUATION, tasks__first__unparsed=0.01))
    assert run_command(capsys, "page", folder)[0] == 0
    text = (folder / "page.html").read_text(encoding="utf-8")
    tables = Outline(text).tables
    assert tables["tasks"] == [
        ["Task", "Questions", "Accuracy", "Most frequent answer", "Unparsed"],
        ["First", "300", "75.0 ± 3.0", "60.0", "1.0"],
        ["second", "100", "20.0 ± 3.0", "30.0", "–"],
    ]
    facts = dict(tables["facts"])
    assert facts["evaluation: template"] == "<script>alert(1)</script>" and "<script>alert" not in text
    assert facts["training commit"] == "9" * 40
    assert (facts["commit"], facts["version of torch"], facts["adapter sha256"]) == ("f" * 40, "9.9", "d" * 64)
    assert facts["test data sha256, first"] == "aaaa"
    assert "python commonsense_evaluate.py --checkpoint run" in text


@pytest.mark.parametrize("same", [True, False])
def test_evaluation_of_an_earlier_adapter_is_not_shown_as_this_ones(write, tmp_path, capsys, same):
    write(changed(EVALUATION, settings__adapter_sha256="d" * 64), "evaluation")
    (tmp_path / "mtl_lora_config.json").write_text(json.dumps({"weights_sha256": ("d" if same else "0") * 64}))
    (tmp_path / "train_log.jsonl").write_text('{"step": 1, "loss": 2.0, "loss/first": 2.0, "loss/second": 2.0}\n')
    code, _, err = run_command(capsys, "page", tmp_path)
    assert code == 0 and ("is of an earlier adapter" in err) == (not same)
    assert ("tasks" in Outline((tmp_path / "page.html").read_text(encoding="utf-8")).tables) == same


def test_a_page_of_a_training(tmp_path, random, capsys):
    tasks = {"tides": "Tides", "maps": "Maps"}
    (tmp_path / "train_log.jsonl").write_text(log_text(random, 0.5, tasks))
    (tmp_path / "adapter_analysis.json").write_text(json.dumps(analysis(random, "moelora", tasks, blocks=1)))
    told = {"tasks": {"tasks": [{"name": name, "id": index} for index, name in enumerate(tasks)]}}
    told |= {"settings": {"learning_rate": 0.003}, "data_sha256": "9" * 64}
    (tmp_path / "run.json").write_text(json.dumps(told))
    assert run_command(capsys, "page", tmp_path)[0] == 0
    tables = Outline((tmp_path / "page.html").read_text(encoding="utf-8")).tables
    assert [row[0] for row in tables["losses"]] == ["Task", "tides", "maps", "all tasks"]
    assert dict(tables["facts"])["training: learning rate"] == "0.003"
    assert dict(tables["facts"])["training data sha256"] == "9" * 64


def test_every_mistake_ends_in_one_sentence(write, tmp_path, capsys, monkeypatch):
    folder = write(EVALUATION)
    for arguments, complaint in [
        ([], "RUN"),
        ([tmp_path / "missing"], "there is no folder"),
        ([folder, "--output", folder], "must be the path of an .html file"),
        ([folder, "--output", folder / "results.json"], "must be the path of an .html file"),
    ]:
        code, out, err = run_command(capsys, "page", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1) and complaint in err, (arguments, err)
    for package in ("jinja2", "matplotlib"):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, package, None)
            assert package in run_command(capsys, "page", folder)[2]
    assert not (folder / "page.html").exists()


@pytest.mark.parametrize(
    ("value", "seeds", "text", "key"),
    [
        (Value(0.712, 0.70, 0.724, 0.008, OVER_SEEDS), True, "71.2 ± 0.8", 0.712),
        (Value(0.5, 0.48, 0.52, None, OVER_QUESTIONS), True, "50.0", 0.5),
        (Value(0.5, 0.48, 0.52, None, OVER_QUESTIONS), False, "50.0 ± 2.0", 0.5),
        (Value(0.5), False, "50.0", 0.5),
        (None, True, "–", None),
    ],
)
def test_an_accuracys_spread_is_of_what_the_whole_table_says(value, seeds, text, key):
    cell = accuracy_cell(value, seeds)
    assert (cell.text.replace("\u00a0", " "), cell.key) == (text, key)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Value(0.012, -0.003, 0.027), "+1.2 [-0.3, +2.7]"),
        (Value(-0.0001), "+0.0"),
        (None, "–"),
    ],
)
def test_a_difference_has_its_sign_and_interval(value, text):
    assert difference_cell(value).text.replace("\u00a0", " ") == text


def test_inline_pictures_keep_their_ids_apart():
    svg = """<?xml version="1.0"?>
        <!DOCTYPE svg PUBLIC "x"><svg width="1pt"><title>old</title><metadata><a/></metadata><defs><style>*{x}</style>
        <path id="a"/></defs><use href="#a"/><!-- old --><use xlink:href="#a" clip-path="url(#a)"/></svg>"""
    found = inline_svg(svg, "one", 'A "title" <b>', "words")
    assert found.startswith('<svg role="img" aria-labelledby="one-title"') and found.count("<title") == 1
    assert 'id="one-a"' in found and 'href="#one-a"' in found and 'xlink:href="#one-a"' in found
    assert "url(#one-a)" in found and "A &quot;title&quot; &lt;b&gt;" in found
    assert "<style" not in found and "metadata" not in found and "old" not in found
