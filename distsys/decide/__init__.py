"""Whether to use a pattern at all: the decision matrix, and its tables and dashboard."""

from distsys.decide.matrix import DECISIONS, PATTERNS, RULES, STAGES, find, recommend
from distsys.decide.tables import decisions_markdown, matrix_markdown, rules_markdown, stage_strip

__all__ = ["DECISIONS", "PATTERNS", "RULES", "STAGES", "decisions_markdown", "find", "matrix_markdown", "recommend",
           "rules_markdown", "stage_strip"]  # fmt: skip
