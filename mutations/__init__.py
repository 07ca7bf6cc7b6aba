"""Faults planted in every kernel, one at a time, to see whether the tests notice: ``python -m mutations``.

A mutant is a kernel with one small change: a barrier taken out, a bound that is off by one, a stride of another
dimension, a mask forgotten. Each is put into a copy of the tree, and the tests of its kernel (``suites``) are run
there. One that they pass is a survivor: a test is missing, or the change makes no difference (``survivors.txt`` says
which and why).
"""
