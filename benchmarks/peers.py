"""The peers that the benchmarks compare with, in an environment of their own.

    python benchmarks/peers.py --venv ~/peers           # installs them, and says which came

The folder, made if it is not there, has the packages of this interpreter too, which stay as they are: a peer is
installed without what it requires, but for what it needs here and this interpreter lacks.
"""

import argparse
import subprocess
import sys
import sysconfig
from pathlib import Path

REQUIREMENTS = {
    "backpack": ["backpack-for-pytorch==1.7.1", "unfoldNd==0.2.3"],
    "bergson": [
        "bergson==2.5.1", "simple-parsing==0.1.9", "docstring-parser==0.18.0", "natsort==8.4.0", "ml-dtypes==0.6.0",
        "petname==2.9",
    ],
    "dattri": ["dattri==0.3.0"],
    "opacus": ["opacus==1.6.0"],
    "trak": ["traker==0.3.2"],
}  # fmt: skip


def make_venv(folder: Path) -> Path:
    """An environment that has this interpreter's packages too: its own interpreter."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        own = subprocess.check_output([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
        line = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
        (Path(own.decode().strip()) / "project.pth").write_text(line)
    return python


def installed(python: Path, peer: str) -> str | None:
    """Install a peer without its dependencies, but for those that it needs here: None, or what went wrong."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run([*command, *REQUIREMENTS[peer]], stderr=subprocess.PIPE, text=True)
    return None if done.returncode == 0 else f"does not install: {last_line(done.stderr)}"


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no message"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, required=True, help="a folder outside of the repository")
    parser.add_argument("--peers", nargs="+", choices=REQUIREMENTS, default=list(REQUIREMENTS))
    arguments = parser.parse_args()
    python = make_venv(arguments.venv.absolute())
    reasons = {peer: installed(python, peer) for peer in arguments.peers}
    for peer, reason in reasons.items():
        print(f"{peer:10}{reason or ', '.join(REQUIREMENTS[peer])}")
    sys.exit(any(reasons.values()))


if __name__ == "__main__":
    main()
