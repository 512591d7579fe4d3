"""The command `ghostfunc`: index a corpus's gradients, search them, and look at them. The library does the work."""

import sys

_EXTRA = {"jinja2", "pyarrow", "rich", "safetensors", "tokenizers", "typer", "yaml"}


def main() -> None:
    """Run the command; its entry point.

    Text that the output's encoding does not have is written as `?`.
    """
    try:
        from ghostfunc.cli._app import app
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        sys.exit(f'error: the command needs {error.name}, which is an extra: pip install "ghostfunc[index]"')
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    app(prog_name="ghostfunc")
