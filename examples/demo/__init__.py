"""The demo: one small SigLIP, trained three times through Superbatch, on data that is mostly wrong.
See docs/demo.md.
"""
