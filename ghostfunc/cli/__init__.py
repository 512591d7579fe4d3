"""The command `ghostfunc`: flags and files in, library calls, tables out."""
