"""The study behind the demo's settings: arms trained in one process, without the service. See
docs/study.md.
"""
