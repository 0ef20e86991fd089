# The public names of the lab. `distsys/lab/__init__.py` reads them to load a name when it is first used.
from distsys.lab.run.experiment import Arm as Arm
from distsys.lab.run.experiment import Experiment as Experiment
from distsys.lab.run.worker import checkpoint as checkpoint
from distsys.lab.session import Lab as Lab
