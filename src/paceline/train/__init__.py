"""The replica, the step, and the loop around it."""
