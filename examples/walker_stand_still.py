"""A task that the suite does not have: the walker stands, and must not move. Every script runs on it unchanged:

  python examples/walker_stand_still.py mop_td3_collect.py --task walker-stand_still --scale laptop \
      --medium-return 460

Reward: the stand task's, times 1 at rest, 0.1 at the speed of the walk task and less above it, forwards and backwards.
"""

import os
import runpy
import sys

os.environ.setdefault("MUJOCO_GL", "disable")  # nothing is rendered here
from dm_control import suite
from dm_control.rl import control
from dm_control.suite import walker
from dm_control.utils import rewards

MARGIN = 1.0  # m/s, at which a tenth of the reward is left


class StandStill(walker.PlanarWalker):
    """The stand task (move_speed=0) with a penalty on horizontal movement of the centre of mass."""

    def get_reward(self, physics) -> float:
        return super().get_reward(physics) * rewards.tolerance(physics.horizontal_velocity(), margin=MARGIN)


@walker.SUITE.add()
def stand_still(time_limit=25, random=None, environment_kwargs=None) -> control.Environment:
    """Called by suite.load("walker", "stand_still"); the same physics and episodes as the other walker tasks."""
    physics = walker.Physics.from_xml_string(*walker.get_model_and_assets())
    task = StandStill(move_speed=0, random=random)
    return control.Environment(physics, task, time_limit, control_timestep=0.025, **(environment_kwargs or {}))


suite.ALL_TASKS += (("walker", "stand_still"),)  # where the scripts look

if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
