"""The lab: real servers, real processes, faults at exact points, and a checker's verdict. See `Lab.open`.

A rule never imports it. `checkpoint` is free outside of an experiment, so a candidate may keep its named points.
"""

from distsys._support.lazy import load_lazily

__all__, __getattr__ = load_lazily(__name__, __file__)
