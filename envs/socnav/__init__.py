"""SocNavGrid-v0: a robot drives to its goal among pedestrians, seeing structured state and an occupancy grid."""
