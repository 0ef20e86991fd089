"""Whether to use a pattern at all: the decision matrix, and its tables and dashboard."""

from distsys.decide.matrix import DECISIONS as DECISIONS
from distsys.decide.matrix import PATTERNS as PATTERNS
from distsys.decide.matrix import RULES as RULES
from distsys.decide.matrix import STAGES as STAGES
from distsys.decide.matrix import find as find
from distsys.decide.matrix import recommend as recommend
from distsys.decide.tables import decisions_markdown as decisions_markdown
from distsys.decide.tables import matrix_markdown as matrix_markdown
from distsys.decide.tables import rules_markdown as rules_markdown
from distsys.decide.tables import stage_strip as stage_strip
