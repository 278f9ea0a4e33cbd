"""Training recipes that reproduce published systems, in plain functions.

A leaf of the package: only the command line imports it. It needs the extra
``fastcontrast[train]``. From Python, ``train_semisup(SemisupConfig(...))`` of
:mod:`fastcontrast.train.semisup` runs the recipe and returns its figures.

To read in one sitting, in this order: ``loop`` (what a step and a run are), ``stage`` (what every
recipe does around it), ``batches`` (what a step trains on), and one recipe: ``semisup``,
``triplet`` or ``spatial``. The rest is looked up: ``config`` and ``models`` are tables,
``runs`` and ``checkpoints`` what lies in a folder, ``ranks``, ``graphs`` and ``clock`` what a step
meets on the way, ``evaluation``, ``plots`` and ``reports`` what comes after it.
"""
