"""What every test shares: annotations are checked while the tests run, one thread, fixed seeds, and a device."""

import os
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

# These run at every torch operation, and would be eight times slower; `_compile` is read by the compiler.
PER_OPERATION = {
    "_compile",
    "_deriving",
    "_follow",
    "_follow_layers",
    "_follow_shapes",
    "_interpreter",
    "_operations",
    "_rules",
    "_sample_axis",
}
package = find_spec("ghostfunc")
assert package is not None and package.origin is not None, "ghostfunc is not installed: run make setup"
entries = {path.stem for path in Path(package.origin).parent.iterdir() if path.suffix == ".py" or path.is_dir()}
modules = entries - PER_OPERATION - {"__init__", "__pycache__"}
install_import_hook([f"ghostfunc.{name}" for name in sorted(modules)], "beartype.beartype")  # before ghostfunc's import

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Float32 is float32, and two cores can run two tests."""
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that a test runs on."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    return torch.device(request.param)
