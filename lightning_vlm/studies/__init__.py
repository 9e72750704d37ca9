"""Studies: which recipe is better, by how much, and how sure that is.

`find_file` and `read_evaluation` read per-example files, `group` gives them arms and training seeds, `compare` tests
every pair of arms.
"""

from lightning_vlm.studies.compare import Arm, Comparison, Pair, compare
from lightning_vlm.studies.per_example import Evaluation, Run, find_file, group, read_evaluation
