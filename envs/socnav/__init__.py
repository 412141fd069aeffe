"""SocNavGrid-v0: a robot drives to its goal among pedestrians, seeing structured state and an occupancy grid."""

# What a 1 stands for in an observation
GOAL_RANGE, PEDESTRIAN_RANGE = 10.0, 16.0  # m; farther points keep their direction but not their distance
PEDESTRIAN_SPEED = 2.0  # m/s
