"""The report's page: what it shows, that hostile text leaves it whole, and that everybody can read it."""

import itertools
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from report_data import DOMAINS, hostile_data, report_data

from ghostfunc.report import Highlights, render
from ghostfunc.report._marks import LEVELS, level_of, place, shape, strongest, tokens
from ghostfunc.report._text import MAX_CHARACTERS, first_words, number, percent, plain, shortened, visible

VOID = {"meta", "br", "stop", "path", "line", "rect", "input", "img", "link"}


class Page(HTMLParser):
    """Collects a page's start tags, its text by tag, and refuses tags that do not nest."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.in_marks: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag == "mark":
            self.in_marks.append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" not in self._open:
            self.text += data
        if "mark" in self._open:
            self.in_marks[-1] += data

    def of(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def source() -> str:
    return render(report_data())


def test_the_same_data_give_the_same_page(source):
    assert render(report_data()) == source
    assert render(report_data(queries=2)) != source


def test_shows_queries_passages_and_what_they_are(source):
    page = Page(source)
    for said in ("GPT2-Nano", "The weights are untrained.", "wpe.weight", "h.0.mlp.weight", "16 by 64", "2,304"):
        assert said in page.text
    for query in report_data().queries:
        for shown in (*query.most, *query.least):
            for said in (
                number(shown.score),
                number(shown.cosine),
                shown.document,
                f"{shown.loss:.3f}",
                str(shown.row),
            ):
                assert said in page.text
    for heading in ("Overview", "Domain by domain", "Queries and passages", "What the scores mean", "Sign", "Scale"):
        assert re.search(rf"<h[23][^>]*>{heading}</h", source), heading
    assert "What may not be concluded" in page.text


def test_order_of_passages_is_kept(source):
    text = Page(source).text
    for query in report_data().queries:
        places = [text.index(shown.document) for shown in (*query.most, *query.least)]
        assert places == sorted(places)


def test_ranked_by_cosine_shows_the_inner_product_beside_it(source):
    shown = Page(render(report_data(metric="cosine"))).text
    passages = report_data().queries[0].most
    assert "It is their cosine" in shown and "It is the inner product" not in shown
    assert "It is the inner product" in Page(source).text
    assert all(number(each.dot) in shown for each in passages)


def test_scale_says_when_queries_were_preconditioned_and_when_nothing_is_random(source):
    assert "to first order" in Page(source).text and "in expectation" in Page(source).text
    changed = Page(render(report_data(preconditioned="inverse Gram, damping 0.1", random=False))).text
    assert "inverse Gram, damping 0.1" in changed
    assert "to first order" not in changed and "in expectation" not in changed


# ---------------------------------------------------------------- tokens


def test_tokens_are_the_passage_with_values_as_titles():
    scores = (0.6, -0.3, 0.001, 0.2, -0.6)
    marked = Highlights(("a", " <b>", " c", "\n", " d"), scores, 0.0, 0.0)
    source = str(tokens(marked))
    assert source == (
        '<mark class="p6" title="+0.600">a</mark><mark class="n3" title="\N{MINUS SIGN}0.300"> &lt;b&gt;</mark> c'
        '<mark class="p2" title="+0.200">↵\n</mark><mark class="n6" title="\N{MINUS SIGN}0.600"> d</mark>'
    )
    assert Page(source).text.replace("↵", "") == "".join(marked.pieces)


def test_a_token_without_characters_adds_to_the_one_whose_character_it_shares():
    marked = Highlights(("四", "", "", "x"), (0.1, 0.2, -0.05, -0.5), 0.0, 0.0)
    assert strongest(marked) == [("x", -0.5), ("四", pytest.approx(0.25))]
    assert 'title="+0.250">四</mark>' in tokens(marked)


def test_a_passage_whose_shares_are_all_zero_has_no_colours():
    assert str(tokens(Highlights(("a", "b"), (0.0, 0.0), 0.0, 0.0))) == "ab"
    assert str(tokens(Highlights((), (), 0.0, 0.0))) == ""


def test_levels_are_proportional_and_end_at_the_largest():
    assert [level_of(value, 2.0) for value in (0.0, 0.1, 1.0, -1.0, 2.0, 9.0)] == [0, 0, 3, 3, LEVELS, LEVELS]
    assert level_of(float("nan"), 1.0) == level_of(1.0, 0.0) == level_of(1.0, float("nan")) == 0


def test_the_account_of_a_score_adds_up_on_the_page(source):
    shown = report_data().queries[0].most[0]
    marked = shown.highlights
    assert sum(marked.scores) + marked.elsewhere + marked.remainder == pytest.approx(shown.dot)
    text = Page(source).text
    for value in (sum(marked.scores), marked.elsewhere, marked.remainder, shown.dot):
        assert number(value) in text


# ---------------------------------------------------------------- hostile and strange texts


def test_nothing_from_data_becomes_a_tag():
    page = Page(render(hostile_data()))
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert page.tags.count(("style", {})) == 1
    assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]
    assert "<script>document.title = 'owned'</script>" in page.text  # shown as it is
    assert "{{ 7 * 7 }}" in page.text  # no template of ours


def test_every_field_from_data_is_shown_somewhere():
    page = Page(render(hostile_data()))
    ours = Page(render(report_data(queries=1)))
    assert page.text.count("onload=alert(1)") > 12 > ours.text.count("onload")


def test_hidden_characters_become_visible():
    source = render(hostile_data())
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200b-\u200f\ufeff\x00\x1b\ud800-\udfff]", source)
    source.encode()  # a lone surrogate could not be written
    for code in ("U+202E", "U+2066", "U+200B", "U+FEFF", "U+001B", "U+0000", "U+D800"):
        assert f">{code}</span>" in source
    assert "RIGHT-TO-LEFT OVERRIDE" in source


def test_visible_keeps_what_is_text():
    text = "naïve 四 שלום é\tand\nline & <x>"
    assert str(visible(text)) == text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert str(visible("a\r\nb\rc")) == 'a\nb<span class="code-point" title="control character">U+000D</span>c'
    assert plain("a\u202eb") == "aU+202Eb"


def test_an_enormous_line_is_shortened_and_says_so():
    line = "x" * (MAX_CHARACTERS + 1234)
    assert shortened(line) == "x" * MAX_CHARACTERS + "… [1,234 more characters]"
    assert shortened("short") == "short"
    data = report_data(queries=1)
    query = replace(data.queries[0], text=line, most=(replace(data.queries[0].most[0], text=line, highlights=None),))
    source = render(replace(data, queries=(query,)))
    assert source.count("[1,234 more characters]") == 2
    assert len(source) < 2 * MAX_CHARACTERS + 100_000
    assert "overflow-wrap: anywhere" in source


def test_empty_and_missing_texts_say_so():
    data = report_data(queries=1)
    empty = replace(data.queries[0].most[0], text="", highlights=None)
    missing = replace(empty, text=None)
    query = replace(data.queries[0], text="", loss=None, most=(empty,), least=(missing,))
    page = Page(render(replace(data, queries=(query, replace(query, text=None)))))
    for said in (
        "This passage is empty.",
        "No text: its corpus was not given.",
        "This query is empty.",
        "No text of this",
    ):
        assert said in page.text
    assert "None" not in page.text


def test_numbers_that_are_none_are_said_in_words():
    data = report_data(queries=1)
    broken = replace(data.queries[0].most[0], dot=float("nan"), loss=float("inf"), cosine=float("-inf"))
    assert "not a number" in Page(render(replace(data, queries=(replace(data.queries[0], most=(broken,)),)))).text


@pytest.mark.parametrize(
    "queries, domains", [(1, DOMAINS), (50, DOMAINS), (4, ("only",)), (30, tuple("abcdefghijklmnopqrstuv"))]
)
def test_few_and_many_queries_and_domains(queries, domains):
    page = Page(render(report_data(queries=queries, k=4, domains=domains)))
    assert len([attrs for attrs in page.of("section") if attrs.get("class") == "query"]) == queries
    assert len([attrs for attrs in page.of("li") if attrs.get("class") == "passage"]) == queries * 8
    assert len(page.of("svg")) == len(domains) * min(queries, len(domains))


def test_no_passages_at_all():
    data = report_data(queries=1)
    render(
        replace(data, queries=(replace(data.queries[0], most=(), least=()),), untokened=(), notices=(), parameters=())
    )


# ---------------------------------------------------------------- for everybody


def test_needs_nothing_beside_itself_and_runs_no_script(source):
    assert not re.search(r"https?:|@import|javascript:|\bsrc=", source)
    assert set(re.findall(r"url\(([^)]*)\)", source)) <= {f"#sign-{number}" for number in range(1, 9)}
    page = Page(source)
    assert not {"script", "link", "iframe", "object", "img"} & {tag for tag, _ in page.tags}
    policy = next(attrs for attrs in page.of("meta") if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"


def test_references_within_the_page_resolve(source):
    page = Page(source)
    ids = Counter(attrs["id"] for _, attrs in page.tags if "id" in attrs)
    assert set(ids.values()) == {1}
    links = {attrs["href"].removeprefix("#") for attrs in page.of("a")}
    labels = {attrs["aria-labelledby"] for _, attrs in page.tags if "aria-labelledby" in attrs}
    gradients = set(re.findall(r"url\(#([^)]*)\)", source))
    assert links | labels | gradients <= set(ids)
    assert {f"query-{number}" for number in (1, 2, 3)} <= links


def test_tables_headings_and_drawings_say_what_they_are(source):
    page = Page(source)
    assert page.of("html") == [{"lang": "en"}]
    assert all(attrs.get("scope") in ("col", "row") for attrs in page.of("th"))
    assert source.count("<table") == source.count("<thead>") + source.count("<caption>Inner product</caption>")
    assert all(attrs["role"] == "img" and "half of the scores" in attrs["aria-label"] for attrs in page.of("svg"))
    assert source.count("<details") == source.count("<summary>")
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(headings))
    scrolling = [attrs for _, attrs in page.tags if attrs.get("class", "").split()[:1] == ["wide"]]
    assert scrolling and all(attrs["tabindex"] == "0" and attrs["aria-label"] for attrs in scrolling)


def test_a_long_text_scrolls_with_the_keyboard():
    data = report_data(queries=1)
    long = replace(data.queries[0], text="word " * 400)
    page = Page(render(replace(data, queries=(long,))))
    (box,) = [attrs for attrs in page.of("div") if attrs.get("class") == "text long"]
    assert box["tabindex"] == "0" and box["role"] == "region" and box["aria-label"] == "Text of query 1"


def _colours(source: str) -> dict[str, dict[str, tuple[float, ...]]]:
    """The colours of the light and of the dark scheme, 0 to 255."""
    schemes = re.findall(r":root \{(.*?)\}", source, re.DOTALL)[:2]
    found = {}
    for scheme, block in zip(("light", "dark"), schemes, strict=True):
        pairs = re.findall(r"--([\w-]+): ([^;]+);", block)
        found[scheme] = {name: _colour(value) for name, value in pairs}
    return found


def _colour(value: str) -> tuple[float, ...]:
    if value.startswith("#"):
        digits = value[1:] if len(value) == 7 else "".join(2 * digit for digit in value[1:])
        return tuple(int(digits[place : place + 2], 16) for place in (0, 2, 4))
    return tuple(map(float, value.split()))


def _luminance(colour: tuple[float, ...]) -> float:
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_on_every_ground_it_stands_on(source, scheme):
    """WCAG's level AA asks for 4.5."""
    colours = _colours(source)[scheme]
    (strongest_share,) = colours["strongest"]
    for ground in ("paper", "card", "shade"):
        for ink in ("ink", "soft", "p-ink", "n-ink"):
            assert _contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
    for sign in "pn":
        for share, ground in ((strongest_share, "card"), (0.6, "paper")):  # a token, a cell of the heat map
            mixed = tuple(share * c + (1 - share) * g for c, g in zip(colours[sign], colours[ground], strict=True))
            assert _contrast(colours["ink"], mixed) >= 4.5, (sign, ground)


# ---------------------------------------------------------------- numbers


def test_numbers_read_alike():
    minus = "\N{MINUS SIGN}"
    given = (0.0, 1.0, -0.5, 12345.6, 0.00012345, -1.5e-9, 9.996, 123456.0, 1e300)
    expected = (
        "0",
        "+1.00",
        f"{minus}0.500",
        "+12300",
        "+0.000123",
        f"{minus}1.50·10⁻⁹",
        "+10.0",
        "+1.23·10⁵",
        "+1.00·10³⁰⁰",
    )
    assert tuple(map(number, given)) == expected
    assert number(0.5, signed=False, digits=1) == "0.5" and number(-0.5, signed=False) == f"{minus}0.500"
    assert (number(float("inf")), number(float("-inf")), number(float("nan"))) == ("+∞", f"{minus}∞", "not a number")


def test_shares_are_never_rounded_to_all_or_nothing():
    assert [percent(share) for share in (0.0, 0.001, 0.5, 0.999, 1.0)] == ["0%", "<1%", "50%", ">99%", "100%"]


def test_first_words_are_one_line():
    assert first_words("a\n b\tc") == "a b c"
    assert first_words("word " * 100, 12) == "word word w…"
    assert first_words(" " * 5000 + "x", 12).endswith("…")


def test_a_histogram_is_drawn_within_its_box_and_on_its_scale():
    spread = report_data().spreads[0]
    path = shape(spread.distributions[0])
    numbers = [float(value) for value in re.findall(r"-?[\d.]+", path)]
    assert min(numbers) >= 0 and max(numbers) == 240
    assert place(-0.6, spread) == 0 and place(0.8, spread) == 240 and place(99.0, spread) == 240
    assert place(0.1, spread) == pytest.approx(120)
    assert place(0.0, replace(spread, low=0.0, high=0.0)) == 120
