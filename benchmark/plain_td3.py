"""TD3's step in its plain form, to be timed in turn with ours:

  python benchmark/speed.py --works td3 --peer benchmark/plain_td3.py:make

The update is that of CleanRL (td3_continuous_action.py): a module per critic, Adam as torch makes
it, targets that are copied parameter by parameter. Networks and numbers are mop_td3_collect.py's.
"""

from copy import deepcopy

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from dm_control import suite

OBS = 24  # of the walker
ACT = 6
HIDDEN = 1024
BATCH_SIZE = 1024
GAMMA = 0.99
TAU = 0.01
EXPLORATION_NOISE = 0.2
POLICY_NOISE = 0.3
NOISE_CLIP = 0.3
BUFFER_SIZE = 100_000


def mlp(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(n_in, HIDDEN),
        nn.LayerNorm(HIDDEN),
        nn.Tanh(),
        nn.Linear(HIDDEN, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, n_out),
    )


class QNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp(OBS + ACT, 1)

    def forward(self, x, a):
        return self.net(torch.cat([x, a], 1)).view(-1)


class Actor(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp(OBS, ACT)

    def forward(self, x):
        return torch.tanh(self.net(x))


def move_target(target: nn.Module, network: nn.Module) -> None:
    for param, target_param in zip(network.parameters(), target.parameters(), strict=True):
        target_param.data.copy_(TAU * param.data + (1 - TAU) * target_param.data)


def make(work: str, device: str):
    """A function that makes one step of the environment and one update; None of other works."""
    if work != "td3":
        return None
    env = suite.load("walker", "walk", environment_kwargs={"flat_observation": True})
    time_step = env.reset()
    actor = Actor().to(device)
    qf1 = QNetwork().to(device)
    qf2 = QNetwork().to(device)
    target_actor = deepcopy(actor)
    qf1_target = deepcopy(qf1)
    qf2_target = deepcopy(qf2)
    q_optimizer = torch.optim.Adam([*qf1.parameters(), *qf2.parameters()], lr=1e-4)
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=1e-4)
    buffer = {
        "observations": torch.randn(BUFFER_SIZE, OBS, device=device),
        "actions": torch.rand(BUFFER_SIZE, ACT, device=device) * 2 - 1,
        "rewards": torch.rand(BUFFER_SIZE, device=device),
        "next_observations": torch.randn(BUFFER_SIZE, OBS, device=device),
    }
    step = 0

    def one_step():
        nonlocal step, time_step
        step += 1

        # act
        obs = torch.as_tensor(time_step.observation["observations"].astype(np.float32))
        with torch.no_grad():
            action = actor(obs[None].to(device))[0].cpu()
        action = (action + EXPLORATION_NOISE * torch.randn(ACT)).clamp(-1, 1)
        time_step = env.reset() if time_step.last() else env.step(action.numpy())
        row = step % BUFFER_SIZE
        buffer["observations"][row] = obs
        buffer["actions"][row] = action
        buffer["rewards"][row] = time_step.reward or 0.0  # None after a reset
        next_obs = time_step.observation["observations"].astype(np.float32)
        buffer["next_observations"][row] = torch.as_tensor(next_obs)

        # critics
        index = torch.randint(BUFFER_SIZE, (BATCH_SIZE,), device=device)
        data = {name: values[index] for name, values in buffer.items()}
        with torch.no_grad():
            noise = (torch.randn_like(data["actions"]) * POLICY_NOISE).clamp(
                -NOISE_CLIP, NOISE_CLIP
            )
            next_actions = (target_actor(data["next_observations"]) + noise).clamp(-1, 1)
            qf1_next = qf1_target(data["next_observations"], next_actions)
            qf2_next = qf2_target(data["next_observations"], next_actions)
            next_q_value = data["rewards"] + GAMMA * torch.min(qf1_next, qf2_next)
        qf1_loss = F.mse_loss(qf1(data["observations"], data["actions"]), next_q_value)
        qf2_loss = F.mse_loss(qf2(data["observations"], data["actions"]), next_q_value)
        q_optimizer.zero_grad()
        (qf1_loss + qf2_loss).backward()
        q_optimizer.step()

        # actor and targets, every second step
        if step % 2 == 0:
            actor_loss = -qf1(data["observations"], actor(data["observations"])).mean()
            actor_optimizer.zero_grad()
            actor_loss.backward()
            actor_optimizer.step()
            move_target(target_actor, actor)
            move_target(qf1_target, qf1)
            move_target(qf2_target, qf2)

    return one_step
