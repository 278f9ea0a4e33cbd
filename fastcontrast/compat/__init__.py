"""Drop-ins with the names and signatures of other libraries, one file each.

``from fastcontrast.compat.open_clip import ClipLoss`` in place of ``from open_clip import
ClipLoss``: one line changes. A library is imported only where its adapter builds on it, and only
when that adapter is. docs/losses.md lists them, and where their results differ by design.
"""
