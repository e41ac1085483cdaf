"""Every row and file that a run, an evaluation or an export leaves, declared once.

They are plain JSON objects: a writer makes one, mypy checks its keys, a reader gets the same type.
:mod:`mlx_fd.runs.records.files` has each file with its types.
"""
