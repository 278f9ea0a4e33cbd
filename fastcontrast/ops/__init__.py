"""The narrow waist: one file per op, each a public function over a PyTorch custom operator.

Losses, miners and trainers call these and nothing below; ``fastcontrast/backends`` implements them.
"""
