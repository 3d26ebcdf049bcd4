"""The report holds every number, needs no other file, and takes any name for what it is: text."""

import html.parser
import re
import xml.etree.ElementTree

import pytest

from modjax.evaluation import report
from modjax.evaluation.curves import Curve

NASTY = "<script>alert('1')</script>|&*_x_"
VOID = {"meta", "br"}


def rows(methods=("lora", "flix"), seeds=(0, 1), languages=("en", "sw"), task="parse"):
    return [
        {
            "method": method,
            "task": task,
            "language": language,
            "setting": "seen" if language == "en" else "unseen_pair",
            "metric": metric,
            "value": min(100.0, 10.0 + 20 * m + 5 * s + 2 * i),
            "n": 10,
            "seed": s,
        }
        for m, method in enumerate(methods)
        for s in seeds
        for language in languages
        for i, metric in enumerate(("exact_match", "malformed"))
    ]


def curves(methods=("lora", "flix"), seeds=(0, 1)):
    return [
        Curve(m, s, [{"step": k, "loss": 9.0 / k, "accuracy": k / 50} for k in range(1, 41)])
        for m in methods
        for s in seeds
    ]


class Page(html.parser.HTMLParser):
    """Reads a page, checks that tags nest, and keeps its tags, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words, self._open = [], [], [], []
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        if not self._open or self._open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def test_both_forms_hold_every_mean_mark_and_fact():
    markdown, page = report.render(rows(), curves(), {"machine": "2 cores", "seeds": [0, 1]})
    text = Page(page).text
    for document in (markdown, text):
        for expected in ("lora", "flix", "12.5", "32.5", "14.5", "34.5", "◇", "2 cores", "0, 1"):
            assert expected in document, expected
        assert "10.0–15.0" in document  # the range over seeds
    assert "**32.5**◇" in markdown and "**14.5**◇" in markdown  # higher, and lower, is better
    assert page.count("<b>32.5</b>") == 2 * 2 == page.count("<b>14.5</b>")  # a cell and a mean each
    assert page.count("<polyline") == 2 * (2 + 2 * 2)  # figures x (means + seeds)


def test_the_page_needs_nothing_but_itself():
    _, text = report.render(rows(), curves(), {"date": "today"})
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(page.tags)
    references = [v for k, v in page.attributes if k in ("src", "href", "srcset", "data", "action")]
    assert all(re.fullmatch(r"#[\w-]+", reference) for reference in references)
    assert not re.search(r"@import|url\(|https?:|\bon\w+=", text)
    anchors = {v for k, v in page.attributes if k == "id"}
    assert {reference[1:] for reference in references} <= anchors


def test_plots_are_well_formed_and_drawn_within_their_frame():
    _, page = report.render(rows(), curves(), {})
    plots = re.findall(r"<svg.*?</svg>", page, flags=re.S)
    assert len(plots) == 2 + 2 + 2  # legend, settings, curves
    for plot in plots:
        tree = xml.etree.ElementTree.fromstring(plot)
        _, _, width, height = map(float, tree.attrib["viewBox"].split())
        for line in tree.iter("polyline"):
            for point in line.attrib["points"].split():
                x, y = map(float, point.split(","))
                assert 0 <= x <= width and 0 <= y <= height
        for rect in tree.iter("rect"):
            assert 0 <= float(rect.attrib["x"]) + float(rect.attrib["width"]) <= width


def test_names_are_text_wherever_they_stand():
    markdown, text = report.render(
        rows(methods=(NASTY, "flix"), languages=("en", NASTY), task=NASTY),
        curves(methods=(NASTY,)),
        {NASTY: NASTY, "command": NASTY},
        title=NASTY,
    )
    page = Page(text)
    assert "script" not in page.tags
    assert NASTY in page.text
    assert "<script>" not in markdown
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in tables]
    assert set(widths) == {3, 7}  # facts; task, method, two means and two languages


@pytest.mark.parametrize(
    "changes",
    [{"methods": ("lora",)}, {"seeds": (3,)}, {"languages": ("en",)}, {"languages": ("sw",)}],
)
def test_one_of_anything_is_enough(changes):
    markdown, page = report.render(rows(**changes))
    assert Page(page).text and "| task | method |" in markdown
    assert "Learning curves" not in page and "The run" not in page


def test_more_methods_than_colours_and_constant_curves_can_be_drawn():
    names = [f"m{i}" for i in range(11)]
    flat = [Curve(n, 0, [{"step": 5, "loss": 0.0}, {"step": 6, "loss": 0.0}]) for n in names]
    _, page = report.render(rows(methods=names), flat)
    assert page.count("<polyline") == 11
    assert "nan" not in page


def test_curves_without_common_steps_are_drawn_seed_by_seed():
    one = Curve("flix", 0, [{"step": 1, "loss": 1.0}, {"step": 3, "loss": 2.0}])
    two = Curve("flix", 1, [{"step": 2, "loss": 1.0}, {"step": 4, "loss": 2.0}])
    _, page = report.render(rows(), [one, two])
    assert page.count('class="mean m1"') == 2 and 'polyline class="seed' not in page


def test_a_written_report_is_what_was_rendered(tmp_path):
    paths = report.write_report(tmp_path / "new", rows(), curves(), {"a": 1}, title="T")
    assert [p.name for p in paths] == ["report.md", "report.html"]
    assert tuple(p.read_text() for p in paths) == report.render(
        rows(), curves(), {"a": 1}, title="T"
    )
    assert len(list((tmp_path / "new").iterdir())) == 2


def test_a_table_for_the_terminal_shows_the_metrics_asked_for():
    text = report.table(rows(), ["exact_match"])
    assert text.startswith("exact_match\n\n| task | method | mean seen | mean unseen pair ◇ |")
    assert "malformed" not in text
    assert len(text.splitlines()) == 2 + 2 + 2
