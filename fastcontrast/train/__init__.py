"""Training recipes that reproduce published systems, in plain functions.

A leaf of the package: only the command line imports it. It needs the extra
``fastcontrast[train]``. From Python, ``train_semisup(SemisupConfig(...))`` of
:mod:`fastcontrast.train.semisup` runs the recipe and returns its figures.
"""
