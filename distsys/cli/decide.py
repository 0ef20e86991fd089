"""`distsys decide`: whether a pattern pays off at your stage, and a simpler alternative."""

from __future__ import annotations

import argparse

from distsys.cli.common import Usage, print_json
from distsys.decide.matrix import PATTERNS, RULE_OF_THUMB, recommend


def decide(options: argparse.Namespace) -> int:
    """Print one recommendation, or a line for each pattern."""
    names = [options.pattern] if options.pattern else [p.name for p in PATTERNS]
    try:
        answers = [recommend(name, options.stage, options.instances) for name in names]
    except ValueError as problem:
        raise Usage(str(problem)) from None
    if options.json:
        ours = [{"pattern": a.pattern.name, "ours": a.pattern.ours, "links": dict(a.links)} for a in answers]
        print_json([vars(a) | facts for a, facts in zip(answers, ours, strict=True)])
    elif options.pattern:
        print(answers[0])
    else:
        for a in answers:
            print(f"{a.verdict:<15} {a.pattern.name + (' (ours)' if a.pattern.ours else ''):<25} {a.alternative}")
        print(f"\n{RULE_OF_THUMB}")
    return 0
