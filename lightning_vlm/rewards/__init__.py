"""Reinforcement learning's rewards: named weighted parts, users' functions among them."""

from .rewards import Rewards
from .settings import Reward
from .table import Group, RewardError, RewardTable
