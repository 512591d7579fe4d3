"""`python -m ghostfunc.cli`, and `torchrun -m ghostfunc.cli`: the command."""

from ghostfunc.cli import main

main()
