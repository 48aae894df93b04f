"""Refinement of labels between rounds, where the network is uncertain."""

from semisam_o1.refinement.engine import Guard, refinement_engine
from semisam_o1.refinement.kinds import VolumeVotes, VoxelVotes, no_votes

__all__ = ["Guard", "VolumeVotes", "VoxelVotes", "no_votes", "refinement_engine"]
