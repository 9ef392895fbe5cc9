"""A task that the suite does not have: the walker stands, and must not move.

  python examples/walker_stand_still.py mop_td3_collect.py --task walker-stand_still \\
      --scale laptop --medium-return 460

The reward is the stand task's, times 1 at rest, 0.1 at the speed of the walk task and less above
it, forwards and backwards. Every script runs on the task unchanged: its command line follows the
name of this file.
"""

import importlib
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ["MUJOCO_GL"] = "disable"  # nothing is rendered here, whatever the shell asks for
from dm_control import suite
from dm_control.rl import control
from dm_control.suite import walker
from dm_control.utils import rewards

MARGIN = 1.0  # m/s, at which a tenth of the reward is left


class StandStill(walker.PlanarWalker):
    """The stand task (move_speed=0) with a penalty on horizontal movement of the walker."""

    def get_reward(self, physics) -> float:
        speed = physics.horizontal_velocity()  # of the centre of mass
        return super().get_reward(physics) * rewards.tolerance(speed, margin=MARGIN)


@walker.SUITE.add()
def stand_still(time_limit=25, random=None, environment_kwargs=None) -> control.Environment:
    """The environment of suite.load("walker", "stand_still"), with the other tasks' physics."""
    physics = walker.Physics.from_xml_string(*walker.get_model_and_assets())
    task = StandStill(move_speed=0, random=random)
    options = environment_kwargs or {}
    return control.Environment(physics, task, time_limit, control_timestep=0.025, **options)


suite.ALL_TASKS += (("walker", "stand_still"),)  # where the scripts look


def main():
    """Run the script that the command line names.

    A script's worker processes begin by importing this file, as it is the one that Python was
    started with, and so know the task. They find the script's functions since it is imported
    here, under its own name.
    """
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    sys.argv = sys.argv[1:]
    script = Path(sys.argv[0])
    sys.path.insert(0, str(script.resolve().parent))
    importlib.import_module(script.stem).main()


if __name__ == "__main__":
    main()
